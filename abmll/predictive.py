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
        standard_error: Monte Carlo standard error of the top option's probability, shape (...).
        draws: Number of draws.
    """

    probabilities: Tensor
    total: Tensor
    aleatoric: Tensor
    epistemic: Tensor
    standard_error: Tensor
    draws: int

    @property
    def answer(self) -> Tensor:
        """Index of the most probable option, shape (...)."""
        return self.probabilities.argmax(dim=-1)

    @property
    def confidence(self) -> Tensor:
        """Probability of the answer, shape (...)."""
        return self.probabilities.amax(dim=-1)


def entropy(probabilities: Tensor) -> Tensor:
    """Entropy in nats over the last dimension, with 0 log 0 = 0."""
    return torch.special.entr(probabilities).sum(dim=-1)


def option_log_probs(scores: Tensor) -> Tensor:
    """Normalizes option scores over the options: log p(y | x, phi), the likelihood of a label."""
    return scores.log_softmax(dim=-1)


def predictive(scores: Tensor, temperature: float = 1.0) -> Predictive:
    """Averages the draws: p(y|x) = 1/S sum_s p(y|x, phi_s), entropy split as in Depeweg et al. (2018).

    Args:
        scores: Option scores under each draw in nats, shape (draws, ..., options); -inf where a
            question has fewer options.
        temperature: Divides the scores of every draw, so that probabilities and all parts of the
            uncertainty are on one scale: calibrated, or neither. Above 1 less sure, below 1 surer.

    Returns:
        The predictive distribution, computed in float64.
    """
    each = option_log_probs(scores.double() / temperature).exp()
    mean = each.mean(dim=0)
    total, aleatoric = entropy(mean), entropy(each).mean(dim=0)
    draws = each.shape[0]
    top = each.gather(-1, mean.argmax(dim=-1, keepdim=True).expand(*each.shape[:-1], 1)).squeeze(-1)
    error = top.std(dim=0) / draws**0.5 if draws > 1 else torch.zeros_like(total)
    return Predictive(mean, total, aleatoric, (total - aleatoric).clamp_min(0.0), error, draws)
