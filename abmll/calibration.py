"""Calibration of the predictive distribution: temperature scaling and split conformal sets."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from abmll.predictive import predictive

_RANGE = (0.05, 20.0)


def fit_temperature(
    scores: Sequence[Tensor], answers: Sequence[Tensor], weights: Sequence[float] | None = None
) -> float:
    """Fits a temperature to labelled predictions by minimizing NLL (Guo et al. 2017).

    The temperature divides every draw's scores before the draws are averaged, as ``predictive`` does.
    A group (a task) weighs the same whatever its size. Golden-section search on log T.

    Args:
        scores: For each group, option scores under each draw in nats, shape (draws, n, options).
        answers: For each group, the right option's index, shape (n,).
        weights: What each group counts, positive; the same by default.

    Returns:
        The temperature, within 0.05 to 20.

    Raises:
        ValueError: No group, or an empty one.
    """
    if not scores or any(len(y) == 0 for y in answers):
        raise ValueError("fitting a temperature needs at least one group, none of them empty")
    share = torch.ones(len(scores)) if weights is None else torch.tensor(weights)
    share = share.double() / share.sum()

    def loss(log_temperature: float) -> float:
        temperature = math.exp(log_temperature)
        losses = [
            -predictive(each, temperature).probabilities.gather(-1, y[:, None]).clamp_min(1e-12).log().mean()
            for each, y in zip(scores, answers, strict=True)
        ]
        return (share @ torch.stack(losses)).item()

    low, high = math.log(_RANGE[0]), math.log(_RANGE[1])
    ratio = (math.sqrt(5) - 1) / 2
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    f_left, f_right = loss(left), loss(right)
    for _ in range(60):
        if f_left < f_right:
            high, right, f_right = right, left, f_left
            left = high - ratio * (high - low)
            f_left = loss(left)
        else:
            low, left, f_left = left, right, f_right
            right = low + ratio * (high - low)
            f_right = loss(right)
    return math.exp((low + high) / 2)


def _mass_above(probabilities: Tensor) -> Tensor:
    """Probability of the options likelier than each, and half of what is as likely, shape (..., options)."""
    others, own = probabilities[..., None, :], probabilities[..., :, None]
    return ((others > own) * others + 0.5 * (others == own) * others).sum(dim=-1)


def conformal_scores(probabilities: Tensor, answers: Tensor) -> Tensor:
    """Nonconformity of the right answers: the probability that lies above them.

    The score of adaptive prediction sets (Romano et al. 2020, arXiv 2006.02544) with its random number
    at its mean, so that a set depends on its question alone. Unlike 1 - p it means the same for two
    options as for twenty: a threshold from questions of one kind serves the other.

    Args:
        probabilities: Shape (n, options).
        answers: The right option's index, shape (n,).

    Returns:
        Shape (n,), between 0 and 1.
    """
    return _mass_above(probabilities).gather(-1, answers[:, None]).squeeze(-1)


def conformal_threshold(scores: Tensor, coverage: float) -> float:
    """Threshold on nonconformity for split conformal prediction (Vovk et al. 2005).

    Args:
        scores: Nonconformity of calibration answers, shape (n,).
        coverage: Wanted share of sets that contain the right answer, between 0 and 1.

    Returns:
        The ceil((n + 1) coverage)-th smallest score; 1 (every option) when n is too small for it.
    """
    if not 0 < coverage < 1:
        raise ValueError(f"coverage must lie between 0 and 1, not {coverage}")
    rank = math.ceil((len(scores) + 1) * coverage)
    return 1.0 if rank > len(scores) else scores.double().sort().values[rank - 1].item()


def prediction_set(probabilities: Tensor, threshold: float) -> Tensor:
    """Which options belong to the set, shape (..., options): those with nonconformity within the threshold.

    The most probable option always belongs, so that no set is empty; coverage can only rise by it.
    """
    inside = _mass_above(probabilities) <= threshold + 1e-12
    return inside | (probabilities == probabilities.amax(dim=-1, keepdim=True))


class ShotCalibration(BaseModel, frozen=True):
    """Calibration after adaptation with a number of shots.

    Attributes:
        shots: Labelled examples that the tasks were adapted with.
        temperature: Divides the scores of every draw, see ``predictive``.
        conformal: Coverage (as text, "0.9") to threshold on nonconformity after tempering.
        ece_before: Expected calibration error on the validation tasks before tempering.
        ece_after: After it, on held-out folds of validation tasks.
        questions: Validation answers that it was fitted on.
    """

    shots: int = Field(ge=0)
    temperature: float = Field(gt=0)
    conformal: dict[str, float]
    ece_before: float
    ece_after: float
    questions: int


class Calibration(BaseModel, frozen=True):
    """How a posterior's confidence is made from its predictive distribution.

    Attributes:
        by_shots: One entry a number of shots, ascending.
        fitted_on: Names of the validation tasks.
        draws: Draws used in fitting.
    """

    by_shots: list[ShotCalibration] = Field(min_length=1)
    fitted_on: list[str]
    draws: int

    def nearest(self, shots: int) -> ShotCalibration:
        """Returns the entry whose number of shots is nearest on a log scale."""
        return min(self.by_shots, key=lambda entry: abs(math.log1p(entry.shots) - math.log1p(shots)))
