"""A task's own temperature, from support examples that its posterior was not told of."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch

from abmll.calibration import Calibration, HeldOut
from abmll.draw_scores import score_draws
from abmll.errors import InvalidExamples
from abmll.examples import Example, check_one_kind
from abmll.layers import Attached
from abmll.objective import Labelled
from abmll.posterior import Posterior
from training.adaptation import AdaptConfig, adapt, of_part, task_posterior
from training.base_model import BaseModel as Base
from training.episodes import label

FOLDS = 4


def folds_of(support: int) -> int:
    """Number of folds for a support set; 0 where it is too small to leave something out."""
    return 0 if support < 2 else min(FOLDS, support)


def _groups(support: Sequence[Labelled]) -> list[list[int]]:
    """Places of the examples that ask the same: where one is held out, its twins must not be learnt from."""
    found: dict[object, list[int]] = {}
    for place, item in enumerate(support):
        found.setdefault((item.question.prompt, frozenset(item.question.options)), []).append(place)
    return list(found.values())


def held_out_scores(
    attached: Attached,
    theta: Posterior,
    support: Sequence[Labelled],
    config: AdaptConfig,
    *,
    draws: int,
    seed: int,
    on_step: Callable[[int, int], None] | None = None,
) -> HeldOut | None:
    """Scores each support example under a posterior adapted to the other folds (cross-validation).

    Examples that ask the same are in the same fold.

    Args:
        attached: The model.
        theta: The global posterior.
        support: The support set, with options.
        config: Inner-loop settings.
        draws: Draws of each fold's posterior.
        seed: Seed of adaptation and draws.
        on_step: Called before each step with (step, steps) of all folds.

    Returns:
        Option scores (draws, n, options) in nats and answers (n,); None for fewer than two different questions.

    Raises:
        InvalidExamples: Adaptation to a part of the examples diverged.
    """
    groups = _groups(support)
    folds = folds_of(len(groups))
    if folds == 0:
        return None
    width = max(len(item.question.options) for item in support)
    scores = torch.full((draws, len(support), width), float("-inf"))
    config = config.for_parts_of(support)
    random.Random(seed).shuffle(groups)  # users list labels in turn: unshuffled, a fold could hold all of one label
    for fold in range(folds):
        left_out = [i for group in groups[fold::folds] for i in group]
        rest = [support[i] for group in groups for i in group if i not in left_out]
        report = of_part(on_step, fold, folds)
        phi = task_posterior(attached, theta, rest, config, torch.Generator().manual_seed(seed), report)
        part = score_draws(attached, phi, [support[i].question for i in left_out], range(draws), seed)
        scores[:, left_out, : part.shape[-1]] = part
    if scores.isnan().any():
        raise InvalidExamples(
            "adaptation diverged on a part of these examples; lower learning_rate or steps", field="examples"
        )
    return scores, torch.tensor([item.answer for item in support])


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
    folds = folds_of(len(_groups(support))) if usual is not None and usual.spread > 0 else 0
    phi = adapt(base, attached, prior, examples, config, seed=seed, on_step=of_part(on_step, 0, 1 + folds))
    if calibration is None:
        return phi, None
    if free_text:
        return phi, calibration.for_text_task(shots)
    held_out = None
    if folds:
        done = config.steps_on(support) * config.members

        def report_fold(step: int, steps: int) -> None:
            if on_step is not None:
                on_step(done + step, done + steps)

        held_out = held_out_scores(
            attached, prior, support, config, draws=calibration.draws, seed=seed, on_step=report_fold
        )
    return phi, calibration.for_task(shots, held_out)
