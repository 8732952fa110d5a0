"""The predictive probability of a free-text answer, and what its uncertainty is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from abmll.predictive import mean_error


@dataclass(frozen=True)
class SequencePredictive:
    """Uncertainty of one decoded sequence; entropies are rates in nats per token.

    Attributes:
        probability: Predictive probability of the whole sequence, mean over draws.
        per_token: Its geometric mean per token, probability ** (1 / tokens): comparable across lengths.
        standard_error: Monte Carlo standard error of ``probability``.
        total: Estimate of the predictive entropy.
        aleatoric: Estimate of the draws' mean entropy.
        epistemic: Estimate of the mutual information, total - aleatoric.
    """

    probability: float
    per_token: float
    standard_error: float
    total: float
    aleatoric: float
    epistemic: float


def sequence_predictive(log_probs: Tensor) -> SequencePredictive:
    r"""Splits the uncertainty of a sequence y by what it says about the weights.

    With p_s = p(y|x, phi_s), pbar = 1/S sum_s p_s and w_s = p_s / sum p_s (the draws' posterior weights
    once y is seen), sequence-level entropies as in Malinin & Gales (2021, section 3), each estimated
    from the one sequence y, with importance weights p_s / pbar for the draws' own entropies:

        total      H[pbar]             ~ -log pbar(y)
        aleatoric  E_s H[p_s]          ~ -sum_s w_s log p_s(y)
        epistemic  I[y; phi]           ~ sum_s w_s log(p_s / pbar) = KL(w || uniform)

    so that epistemic = total - aleatoric >= 0, as for answer options, and at most log S. The estimates
    are unbiased for y sampled from pbar; y here is the greedy answer, so they speak of that answer
    alone. All are divided by the number of tokens.

    Args:
        log_probs: log p of each token under each draw, shape (draws, tokens), at least one token; draws 2k and
            2k + 1 are mirrored.
    """
    draws, tokens = log_probs.shape[0], max(1, log_probs.shape[1])
    each = log_probs.double().sum(dim=1)
    log_mean = (each.logsumexp(dim=0) - math.log(draws)).item()
    weights = each.softmax(dim=0)
    total, aleatoric = -log_mean / tokens, -torch.dot(weights, each).item() / tokens
    return SequencePredictive(
        probability=math.exp(log_mean),
        per_token=math.exp(log_mean / tokens),
        standard_error=mean_error(each.exp(), mirrored=True).item(),
        total=total,
        aleatoric=aleatoric,
        epistemic=max(0.0, total - aleatoric),
    )
