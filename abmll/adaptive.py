"""Adaptive draws: go on only while more can change the answer, or move the confidence by more than a tolerance.

A few mirrored pairs of draws tell this: the half-difference d within a pair says how much noise there is to first
order, which the pair's mean cancels; what is left between pairs is of second order, s = c d^2 / v with v = p (1 - p)
the variance of the answer (for a logit with Gaussian noise c is about 0.7 |1 - 2p|). c, and how large d usually is,
come from validation tasks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from pydantic import BaseModel, Field
from scipy.special import stdtrit
from torch import Tensor

from abmll.predictive import option_log_probs, pair_means

# What further draws may move a confidence by, at 95 %, where nothing else is said.
TOLERANCE = 0.02
# How many pairs what is usual counts for, beside a question's own: of d, and of the scatter between pairs.
_USUAL_HALVES = 8
_USUAL_PAIRS = 8
# A confidence may move either way; an answer changes only if its lead is lost.
_TWO_SIDED, _ONE_SIDED = 0.975, 0.95
_LEAST_VARIANCE = 1e-3


class Scatter(BaseModel, frozen=True):
    """How the answer's probability usually scatters between mirrored draws."""

    within: float = Field(
        ge=0, description="Root mean square, over questions, of half a pair's difference over sqrt(p (1 - p))."
    )
    curvature: float = Field(ge=0, description="c: pairs' means scatter by c d^2 / (p (1 - p)) with d that half.")


def fit_scatter(scores: Sequence[Tensor], temperatures: Sequence[float]) -> Scatter | None:
    """Learns what is usual from validation tasks.

    Args:
        scores: For each task, option scores under mirrored draws in nats, shape (draws, n, options).
        temperatures: For each task, what divides them.

    Returns:
        The scatter; None for fewer than two pairs of draws.
    """
    if not scores or min(len(item) for item in scores) < 4:
        return None
    parts = [_Pairs(item, temperature) for item, temperature in zip(scores, temperatures, strict=True)]
    relative = torch.cat([part.squared_half / part.variance for part in parts])
    between = torch.cat([part.means.var(dim=0) for part in parts])
    second_order = (relative**2).mean()
    curvature = (between.mean() / second_order).sqrt().item() if second_order > 0 else 0.0
    return Scatter(within=relative.mean().sqrt().item(), curvature=curvature)


def stages(most: int) -> Iterator[range]:
    """Yields which draws to take next: a pair, then as many again, up to ``most`` in all."""
    taken = 0
    while taken < most:
        stage = range(taken, min(max(2, 2 * taken), most))
        yield stage
        taken = stage.stop


def settled(
    scores: Tensor, temperature: float, most: int, tolerance: float, scatter: Scatter, threshold: float | None = None
) -> bool:
    """Whether the draws that are left would change nothing, at 95 %.

    With k of K pairs drawn, the mean of all K differs from the mean of k by a deviation of s sqrt(1/k - 1/K). s is the
    pairs' own, shrunk towards what is usual for this d (a scaled inverse chi-squared prior), hence Student's t. The
    lead over the next option scatters by up to twice as much; by how much is seen in its d, within pairs.

    Args:
        scores: Option scores of one question under the mirrored draws so far, shape (draws, options), in nats.
        temperature: Divides them.
        most: Draws that would be taken at most.
        tolerance: What the answer's probability may still move by.
        scatter: What is usual.
        threshold: A confidence that the answer needs; which side of it is settled too.
    """
    if len(scores) < 2:
        return False
    pairs = _Pairs(scores[:, None], temperature)
    count, variance = len(pairs.means), pairs.variance.item()
    halves = _USUAL_HALVES * scatter.within**2 * variance + count * pairs.squared_half.item()
    usual = (scatter.curvature * halves / (_USUAL_HALVES + count) / variance) ** 2
    freedom, left = _USUAL_PAIRS + count - 1, max(0.0, 1 / count - 2 / most)

    def reach(usual: float, means: Tensor, level: float) -> float:
        own = means.var(dim=0).item() if count > 1 else 0.0
        pooled = (_USUAL_PAIRS * usual + (count - 1) * own) / freedom
        return float(stdtrit(freedom, level)) * (pooled * left) ** 0.5

    moves = reach(usual, pairs.means, _TWO_SIDED)
    loses = reach(pairs.lead_ratio**2 * usual, pairs.leads, _ONE_SIDED)
    clear = threshold is None or abs(pairs.chance.item() - threshold) > moves
    return clear and moves <= tolerance and loses < pairs.leads.mean().item()


def draws_needed(scores: Tensor, temperature: float, tolerance: float, scatter: Scatter) -> int:
    """Returns how many draws settle a question of which all draws are known.

    Args:
        scores: Option scores under mirrored draws, shape (draws, options), in nats.
        temperature: Divides them.
        tolerance: As for ``settled``.
        scatter: What is usual.
    """
    most = len(scores)
    stops = (stage.stop for stage in stages(most))
    return next((stop for stop in stops if settled(scores[:stop], temperature, most, tolerance, scatter)), most)


class _Pairs:
    """The answer's probability under pairs of draws, of n questions.

    Attributes:
        means: Of each pair, shape (pairs, n).
        squared_half: Mean of d^2, shape (n,).
        chance: The answer's probability, mean over draws, shape (n,).
        variance: v, shape (n,); of an answer that is all but certain, a little more.
        leads: Of each pair, how far the answer's probability is above the next option's, shape (pairs, n).
    """

    def __init__(self, scores: Tensor, temperature: float) -> None:
        each = option_log_probs(scores.double() / temperature).exp()
        best = each.mean(dim=0).topk(2, dim=-1)
        top, second = each.gather(-1, best.indices.expand(*each.shape[:-1], 2)).unbind(dim=-1)
        self.means, self.leads = pair_means(top), pair_means(top - second)
        self.squared_half, self._lead_half = _squared_half(top), _squared_half(top - second)
        self.chance = best.values[..., 0]
        self.variance = (self.chance * (1 - self.chance)).clamp_min(_LEAST_VARIANCE)

    @property
    def lead_ratio(self) -> float:
        """How many times as much as the answer's probability its lead scatters, of one question, at most 2.

        From d of the pairs so far, and one pair more at the most.
        """
        own = self.squared_half.item()
        if own == 0:
            return 2.0
        count = len(self.means)
        return min(4.0, (4.0 + count * self._lead_half.item() / own) / (1 + count)) ** 0.5


def _squared_half(values: Tensor) -> Tensor:
    """Mean over pairs of d^2, shape (n,), of values of mirrored draws, shape (draws, n)."""
    return pair_means(values**2).sub(pair_means(values) ** 2).clamp_min(0).mean(dim=0)
