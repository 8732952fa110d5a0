"""A task's own temperature, from support examples that its posterior was not told of."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from abmll.calibration import Calibration, HeldOut
from abmll.components import Known
from abmll.draw_scores import score_draws
from abmll.errors import InvalidExamples
from abmll.examples import Example, check_one_kind
from abmll.layers import Attached
from abmll.objective import Labelled
from abmll.posterior import Posterior
from training.adaptation import AdaptConfig, adapt, of_part, task_posterior
from training.base_model import BaseModel as Base
from training.episodes import label, what_is_asked
from training.folds import folds_of, held_out


def _questions(support: Sequence[Labelled]) -> list[Hashable]:
    return [what_is_asked(item.question) for item in support]


def held_out_scores(
    attached: Attached,
    theta: Posterior,
    support: Sequence[Labelled],
    config: AdaptConfig,
    *,
    draws: int,
    seed: int,
    on_step: Callable[[int, int], None] | None = None,
    known: Known | None = None,
) -> HeldOut | None:
    """Scores each support example under a posterior adapted to the other folds (cross-validation).

    Args:
        attached: The model.
        theta: The global posterior.
        support: The support set, with options.
        config: Inner-loop settings.
        draws: Draws of each fold's posterior.
        seed: Seed of adaptation and draws.
        on_step: Called before each step with (step, steps) of all folds.
        known: See ``log_likelihood``; of this theta.

    Returns:
        Option scores (draws, n, options) in nats and answers (n,); None for fewer than two different questions.

    Raises:
        InvalidExamples: Adaptation to a part of the examples diverged.
    """
    known = {} if known is None else known
    questions = _questions(support)
    parts, config = folds_of(len(set(questions))), config.for_parts_of(support)
    done = itertools.count()

    def score(rest: list[int], left_out: list[int]) -> Tensor:
        report, generator = of_part(on_step, next(done), parts), torch.Generator().manual_seed(seed)
        phi = task_posterior(attached, theta, [support[i] for i in rest], config, generator, report, known)
        return score_draws(attached, phi, [support[i].question for i in left_out], range(draws), seed)

    found = held_out(questions, [item.answer for item in support], seed, score)
    if found is not None and found[0].isnan().any():
        raise InvalidExamples(
            "adaptation diverged on a part of these examples; lower learning_rate or steps", field="examples"
        )
    return found


def adapt_and_calibrate(
    base: Base,
    attached: Attached,
    prior: Posterior,
    examples: Sequence[Example],
    config: AdaptConfig,
    calibration: Calibration | None,
    *,
    seed: int = 0,
    on_step: Callable[[int, int], None] | None = None,
) -> tuple[Posterior, Calibration | None]:
    """Adapts a posterior to a task and fits the task's own temperature; a task without options has none.

    Args:
        base: Model and tokenizer.
        attached: The same model, attached.
        prior: The global posterior, on the model's device.
        examples: The support set.
        config: Inner-loop settings.
        calibration: The global posterior's; None if it has none.
        seed: The same seed and examples give the same posterior and calibration.
        on_step: Called before each step with (step, steps); what it raises ends the adaptation.

    Returns:
        The task posterior and its calibration; none where the global posterior has none for such examples.

    Raises:
        InvalidExamples: There are no examples, they are of two kinds, or adaptation diverged on them.
        PromptTooLong: An example exceeds the model's context.
    """
    check_one_kind(examples)
    shots, free_text = len(examples), bool(examples) and examples[0].is_free_text
    usual = None if calibration is None or free_text else calibration.nearest(shots)
    support = [] if usual is None else label(base, prior.config.template, examples)
    parts = folds_of(len(set(_questions(support)))) if usual is not None and usual.spread > 0 else 0
    known: Known = {}
    phi = adapt(base, attached, prior, examples, config, seed=seed, on_step=of_part(on_step, 0, 1 + parts), known=known)
    if calibration is None:
        return phi, None
    if free_text:
        return phi, calibration.for_text_task(shots)
    of_support = None
    if parts:
        done = config.steps_on(support) * config.members

        def report_fold(step: int, steps: int) -> None:
            if on_step is not None:
                on_step(done + step, done + steps)

        of_support = held_out_scores(
            attached, prior, support, config, draws=calibration.draws, seed=seed, on_step=report_fold, known=known
        )
    return phi, calibration.for_task(shots, of_support)
