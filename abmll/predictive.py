"""The predictive distribution over answers, and what its uncertainty is made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Predictive:
    """Predictive distributions of a batch of questions; all entropies in nats.

    Attributes:
        probabilities: Mean over draws, shape (..., options).
        total: Entropy of the mean, shape (...).
        aleatoric: Mean of the draws' entropies: doubt that more data would not remove, shape (...).
        epistemic: Mutual information of answer and weights, total - aleatoric, shape (...).
        standard_errors: Monte Carlo standard errors of the probabilities, shape (..., options).
        draws: Number of draws.
    """

    probabilities: Tensor
    total: Tensor
    aleatoric: Tensor
    epistemic: Tensor
    standard_errors: Tensor
    draws: int

    @property
    def answer(self) -> Tensor:
        """Index of the most probable option, shape (...)."""
        return self.probabilities.argmax(dim=-1)

    @property
    def confidence(self) -> Tensor:
        """Probability of the answer, shape (...)."""
        return self.probabilities.amax(dim=-1)

    @property
    def standard_error(self) -> Tensor:
        """Monte Carlo standard error of the confidence, shape (...)."""
        return self.standard_errors.gather(-1, self.answer.unsqueeze(-1)).squeeze(-1)


def entropy(probabilities: Tensor) -> Tensor:
    """Entropy in nats over the last dimension, with 0 log 0 = 0."""
    return torch.special.entr(probabilities).sum(dim=-1)


def option_log_probs(scores: Tensor) -> Tensor:
    """Normalizes option scores over the options: log p(y | x, phi), the likelihood of a label."""
    return scores.log_softmax(dim=-1)


def mean_error(values: Tensor, mirrored: bool = False) -> Tensor:
    """Monte Carlo standard error of the mean over the first dimension; 0 for one value.

    Args:
        values: A value for each draw, shape (draws, ...).
        mirrored: Whether values 2k and 2k + 1 are of mirrored draws. Their mean varies less than that of two
            independent ones; a single pair does not say by how much, and is taken for two independent ones. So
            are three; of a larger odd number the last is left out.
    """
    if len(values) < 2:
        return torch.zeros_like(values[0])
    if mirrored and len(values) >= 4:
        values = pair_means(values)
    return values.std(dim=0) / len(values) ** 0.5


def pair_means(values: Tensor) -> Tensor:
    """Means of mirrored pairs, shape (pairs, ...), of values of draws, shape (draws, ...); an odd last is left out."""
    pairs = len(values) // 2
    return values[: 2 * pairs].unflatten(0, (pairs, 2)).mean(dim=1)


def draw_probabilities(scores: Tensor, temperature: float = 1.0) -> Tensor:
    """Returns p(y | x, phi_s) of each draw in float64, of the shape of ``scores``; arguments as for ``predictive``."""
    return option_log_probs(scores.double() / temperature).exp()


def predictive(scores: Tensor, temperature: float = 1.0, *, mirrored: bool = False) -> Predictive:
    """Averages the draws: p(y|x) = 1/S sum_s p(y|x, phi_s), entropy split as in Depeweg et al. (2018).

    Args:
        scores: Option scores under each draw in nats, shape (draws, ..., options); -inf where a
            question has fewer options.
        temperature: Divides the scores of every draw, so that probabilities and all parts of the
            uncertainty are on one scale: calibrated, or neither. Above 1 less sure, below 1 surer.
        mirrored: Whether draws 2k and 2k + 1 are mirrored, as those of ``abmll.draws``; for the standard error.

    Returns:
        The predictive distribution, computed in float64.
    """
    each = draw_probabilities(scores, temperature)
    mean = each.mean(dim=0)
    total, aleatoric = entropy(mean), entropy(each).mean(dim=0)
    return Predictive(
        mean, total, aleatoric, (total - aleatoric).clamp_min(0.0), mean_error(each, mirrored), each.shape[0]
    )
