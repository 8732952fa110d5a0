"""A prior that is a mixture of the posteriors of tasks met before, and where a new task begins in it.

One Gaussian around which all tasks lie says little where tasks come in kinds. The tasks that the global posterior was
learnt from say more: each one's posterior is a component of the prior, as in the variational mixture of posteriors
(VampPrior, Tomczak & Welling 2018, arXiv 1705.07120), and a new task's examples weigh them by their likelihood, as in
Bayesian model averaging. Where the examples leave many components likely, what is begun at is a mean of several.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from abmll.draw_scores import score_draws
from abmll.layers import Attached
from abmll.objective import Labelled
from abmll.posterior import Components, Posterior
from abmll.predictive import option_log_probs
from abmll.scoring import Question
from abmll.together import Together

# Power of the likelihood in a component's weight: its answers are more certain than they are right. Of 0.5, 0.7 and 1
# the best with 16 and 64 examples on the generated world's validation tasks.
_TEMPER = 0.5
# Components whose mean a task, or a member of its mixture, begins at. Of 1, 4 and 16 the best there with 1 to 16.
_AVERAGED = 16
# Components that the model runs with at a time, and examples after which those of negligible weight are left out.
_AT_ONCE = 8
_SCREEN = 16
_NEGLIGIBLE = -6.0

# Of questions, the log-probabilities of their options under each component of one posterior, shape (components,
# options), float32; NaN where a component was not asked. Kept so that folds of a support set do not ask it again.
Known = dict[Question, Tensor]


def _certain(theta: Posterior, components: Components) -> Posterior:
    """The mixture of components without their noise: pairs of its draws are the components in turn."""
    members = len(components.tasks)
    cores = {name: own[0] if members == 1 else own for name, own in components.cores.items()}
    means = {f"{name}.mean.core": core for name, core in cores.items()}
    scales = {f"{name}.scale.log_s": torch.full_like(core, -torch.inf) for name, core in cores.items()}
    config = theta.config.model_copy(update={"members": members})
    return replace(theta.with_tensors(theta.tensors() | means | scales), config=config)


def log_likelihood(
    attached: Attached,
    theta: Posterior,
    components: Components,
    support: Sequence[Labelled],
    max_tokens: int = 4096,
    on_part: Callable[[], None] | None = None,
    known: Known | None = None,
) -> Tensor:
    """The support set's log-likelihood, log p(support | component), under each component's mean.

    After each few examples those components are left out whose weight is negligible by then.

    Args:
        attached: The model.
        theta: The global posterior.
        components: Around its factors.
        support: The support set, with options.
        max_tokens: Padded tokens in one forward pass.
        on_part: Called before each part of the work; what it raises ends it.
        known: What these components were asked before, which is not asked again; what they are asked now is added.

    Returns:
        In nats, shape (components,), float64, on the CPU; -inf for those that were left out.
    """
    known = {} if known is None else known
    result = torch.zeros(len(components.tasks), dtype=torch.float64)
    # Users list labels in turn or one after the other: what a component is left out by should have some of each.
    shuffled = random.Random(0).sample(list(support), len(support))
    for start in range(0, len(shuffled), _SCREEN):
        part = shuffled[start : start + _SCREEN]
        questions = list({item.question: None for item in part})
        for question in questions:
            known.setdefault(question, torch.full((len(components.tasks), len(question.options)), torch.nan))
        unasked = torch.stack([known[question].isnan().any(dim=-1) for question in questions], dim=-1)
        # Components that were left out at different times before lack answers to different questions.
        for lacking in unasked[result.isfinite()].unique(dim=0):
            missing = [question for question, lacks in zip(questions, lacking.tolist(), strict=True) if lacks]
            alike = (result.isfinite() & (unasked == lacking).all(dim=-1)).nonzero().squeeze(-1)
            for chosen in alike.split(_AT_ONCE) if missing else ():
                if on_part is not None:
                    on_part()
                certain, draws = _certain(theta, components.only(chosen.tolist())), range(0, 2 * len(chosen), 2)
                scores = score_draws(attached, certain, missing, draws, 0, max_tokens=max_tokens)
                for number, question in enumerate(missing):
                    known[question][chosen] = option_log_probs(scores[:, number, : len(question.options)])
        for item in part:
            result += known[item.question][:, item.answer].double().where(result.isfinite(), 0.0)
        if attached.together is not None:
            result = _same_everywhere(result, attached.together, next(attached.model.parameters()).device)
        result[_TEMPER * (result - result.max()) < _NEGLIGIBLE] = -torch.inf
    return result


def _same_everywhere(result: Tensor, together: Together, device: torch.device) -> Tensor:
    """The mean over processes, which rounding may tell apart, and which have to go on alike."""
    sums = torch.cat([result, result.new_ones(1)]).to(device)
    together.add_up([sums])
    return (sums[:-1] / sums[-1]).to(result.device)


def beginning(theta: Posterior, components: Components, likelihood: Tensor, generator: torch.Generator) -> Posterior:
    """Where a task's posterior, or a member of it, begins; also the prior that it is held near.

    Args:
        theta: The global posterior, whose standard deviations it has.
        components: Around its factors.
        likelihood: See ``log_likelihood``.
        generator: Source of the components that are drawn, each time anew, by their weights.
    """
    weights = (_TEMPER * likelihood).softmax(dim=0)
    drawn = torch.multinomial(weights, _AVERAGED, replacement=True, generator=generator).tolist()
    means = {f"{name}.mean.core": own.mean(dim=0) for name, own in components.only(drawn).cores.items()}
    return theta.with_tensors(theta.tensors() | means)
