"""A prior that is a mixture of the posteriors of tasks met before, and where a new task begins in it.

One Gaussian around which all tasks lie says little where tasks come in kinds. The tasks that the global posterior was
learnt from say more: each one's posterior is a component of the prior, as in the variational mixture of posteriors
(VampPrior, Tomczak & Welling 2018, arXiv 1705.07120), and a new task's examples weigh them by their likelihood, as in
Bayesian model averaging. Where the examples leave many components likely, what is begun at is a mean of several.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from abmll.draw_scores import score_draws
from abmll.layers import Attached
from abmll.objective import Labelled
from abmll.posterior import Posterior
from abmll.predictive import option_log_probs

# Power of the likelihood in a component's weight: its answers are more certain than they are right. Of 0.5, 0.7 and 1
# the best with 16 and 64 examples on the generated world's validation tasks.
_TEMPER = 0.5
# Components whose mean a task, or a member of its mixture, begins at. Of 1, 4 and 16 the best there with 1 to 16.
_AVERAGED = 16
# Components that the model runs with at a time, and examples after which those of negligible weight are left out.
_AT_ONCE = 8
_SCREEN = 16
_NEGLIGIBLE = -6.0


@dataclass(frozen=True)
class Components:
    """Means of the components of a prior.

    Attributes:
        cores: Module name to cores, shape (components, r, r), around the global posterior's factors.
    """

    cores: Mapping[str, Tensor]

    @staticmethod
    def of(posteriors: Sequence[Posterior]) -> Components:
        """Returns the means of ``subspace`` posteriors that share their factors."""
        each = [posterior.tensors() for posterior in posteriors]
        names = posteriors[0].layers
        return Components({name: torch.stack([tensors[f"{name}.mean.core"] for tensors in each]) for name in names})

    def only(self, chosen: Tensor) -> Components:
        """Returns some of them, by their numbers."""
        return Components({name: cores[chosen.to(cores.device)] for name, cores in self.cores.items()})

    @property
    def count(self) -> int:
        """Number of components."""
        return len(next(iter(self.cores.values())))


def _without_noise(theta: Posterior, cores: Mapping[str, Tensor]) -> Posterior:
    """The mixture of these cores, each certain."""
    members = len(next(iter(cores.values())))
    of_one = {name: core.squeeze(0) if members == 1 else core for name, core in cores.items()}
    scales = {f"{name}.scale.log_s": torch.full_like(core, -torch.inf) for name, core in of_one.items()}
    means = {f"{name}.mean.core": core for name, core in of_one.items()}
    config = theta.config.model_copy(update={"members": members})
    return replace(theta.with_tensors(theta.tensors() | means | scales), config=config)


def log_likelihood(
    attached: Attached, theta: Posterior, components: Components, support: Sequence[Labelled], max_tokens: int = 4096
) -> Tensor:
    """The support set's log-likelihood, log p(support | component), under each component's mean.

    After each few examples those components are left out whose weight is negligible by then.

    Args:
        attached: The model.
        theta: The global posterior.
        components: Around its factors.
        support: The support set, with options.
        max_tokens: Padded tokens in one forward pass.

    Returns:
        In nats, shape (components,), float64, on the CPU; -inf for those that were left out.
    """
    result = torch.zeros(components.count, dtype=torch.float64)
    for start in range(0, len(support), _SCREEN):
        left = result.isfinite().nonzero().squeeze(-1)
        for chosen in left.split(_AT_ONCE):
            result[chosen] += _log_likelihood(
                attached, theta, components.only(chosen), support[start : start + _SCREEN], max_tokens
            )
        result[_TEMPER * (result - result.max()) < _NEGLIGIBLE] = -torch.inf
    return result


def _log_likelihood(
    attached: Attached, theta: Posterior, components: Components, support: Sequence[Labelled], max_tokens: int
) -> Tensor:
    certain = _without_noise(theta, components.cores)
    draws = range(0, 2 * certain.config.members, 2)  # a pair is of one member
    scores = score_draws(attached, certain, [item.question for item in support], draws, 0, max_tokens=max_tokens)
    right = torch.tensor([item.answer for item in support])[None, :, None].expand(len(scores), -1, 1)
    return option_log_probs(scores.double()).gather(-1, right).sum(dim=(1, 2))


def beginning(theta: Posterior, components: Components, likelihood: Tensor, generator: torch.Generator) -> Posterior:
    """Where a task's posterior, or a member of it, begins; also the prior that it is held near.

    Args:
        theta: The global posterior, whose standard deviations it has.
        components: Around its factors.
        likelihood: See ``log_likelihood``.
        generator: Source of the components that are drawn, each time anew, by their weights.
    """
    weights = (_TEMPER * likelihood).softmax(dim=0)
    drawn = torch.multinomial(weights, _AVERAGED, replacement=True, generator=generator)
    means = {f"{name}.mean.core": cores[drawn.to(cores.device)].mean(dim=0) for name, cores in components.cores.items()}
    return theta.with_tensors(theta.tensors() | means)
