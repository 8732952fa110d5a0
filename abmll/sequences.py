"""The predictive probability of a free text, whole and token by token, and what its uncertainty is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from abmll.predictive import entropy, mean_error


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
    are unbiased for y sampled from pbar; y here is one answer, greedy as a rule, so they speak of that
    answer alone. All are divided by the number of tokens.

    Args:
        log_probs: log p of each token under each draw, shape (draws, tokens), at least one token; draws 2k and
            2k + 1 are mirrored.
    """
    return text_predictive(log_probs.double().sum(dim=1), log_probs.shape[1])


def text_predictive(each: Tensor, tokens: int) -> SequencePredictive:
    """Splits the uncertainty of a text, see ``sequence_predictive``.

    Args:
        each: log p of the whole text under each draw, shape (draws,), nats.
        tokens: How many it has.
    """
    draws, tokens, each = len(each), max(1, tokens), each.double()
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


@dataclass(frozen=True)
class TokenScores:
    """What the tokens of a text y score under draws, and what might stand in their places.

    Attributes:
        tokens: y, shape (tokens,).
        log_probs: log p(y_t | x, y_<t, phi_s), shape (draws, tokens), nats.
        others: At each place the token ids that are likeliest under the posterior mean, shape (tokens, k); perhaps y_t.
        other_log_probs: The same of these, shape (draws, tokens, k).
    """

    tokens: Tensor
    log_probs: Tensor
    others: Tensor
    other_log_probs: Tensor


def no_tokens(draws: int, others: int) -> TokenScores:
    """Scores of an empty text."""
    none = torch.zeros(draws, 0)
    ids = torch.zeros(0, dtype=torch.long)
    return TokenScores(ids, none, ids[:, None].expand(0, others), none[..., None].expand(draws, 0, others))


@dataclass(frozen=True)
class TokenPredictive:
    """Uncertainty at each place of a text, given what stands before it; entropies in nats.

    Attributes:
        probability: Predictive probability of the token, shape (tokens,); the product is that of the text.
        total: Entropy of the predictive distribution of the next token, shape (tokens,).
        aleatoric: The draws' mean entropy, shape (tokens,).
        epistemic: Mutual information of next token and weights, total - aleatoric, shape (tokens,).
        others: Predictive probabilities of the likeliest tokens, shape (tokens, k).
    """

    probability: Tensor
    total: Tensor
    aleatoric: Tensor
    epistemic: Tensor
    others: Tensor


def token_predictive(scores: TokenScores) -> TokenPredictive:
    r"""Splits the uncertainty at each place of a text by what it says about the weights.

    What stands before a token says which draws to believe: with w_s = p_s(y_<t | x) / sum p_s(y_<t | x), the predictive
    distribution of the next token is sum_s w_s p_s(. | x, y_<t) (the expectation of products of Malinin & Gales 2021,
    arXiv 2002.07650, section 3), and

        total      H[sum_s w_s p_s]
        aleatoric  sum_s w_s H[p_s]
        epistemic  I[y_t; phi | x, y_<t] = total - aleatoric

    Entropies are of the k tokens in ``others``, the text's own, and all the rest as one event. That merges what is
    improbable, so that each is at most that of the whole vocabulary, and epistemic too (data processing inequality).

    Args:
        scores: Of a text under draws; k may be 0.
    """
    log_probs, others = scores.log_probs.double(), scores.other_log_probs.double().exp()
    weights = (log_probs.cumsum(dim=1) - log_probs).softmax(dim=0)
    own = log_probs.exp()
    # The text's own token is an event of its own only where it is none of the others.
    known = (scores.others == scores.tokens[:, None]).any(dim=-1)
    apart = own.masked_fill(known, 0.0)
    rest = (1 - others.sum(dim=-1) - apart).clamp_min(0.0)
    each = torch.cat([others, apart[..., None], rest[..., None]], dim=-1)
    mean = (weights[..., None] * each).sum(dim=0)
    total, aleatoric = entropy(mean), (weights * entropy(each)).sum(dim=0)
    return TokenPredictive(
        probability=(weights * own).sum(dim=0),
        total=total,
        aleatoric=aleatoric,
        epistemic=(total - aleatoric).clamp_min(0.0),
        others=mean[..., : others.shape[-1]],
    )
