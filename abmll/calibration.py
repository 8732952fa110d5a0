"""Calibration of the predictive distribution: temperatures of tasks, and split conformal sets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor

from abmll.adaptive import Scatter
from abmll.curves import Curves
from abmll.predictive import draw_probabilities
from abmll.risk import lenient_threshold
from abmll.text_calibration import TextCalibration

# Option scores of support examples, each by a posterior that has not seen it, shape (draws, n, options) in nats,
# and the right options, shape (n,).
HeldOut = tuple[Tensor, Tensor]

# Of the prediction sets that answers come with.
_TOLD_COVERAGE = "0.9"
_RANGE = (0.05, 20.0)
_GRID_POINTS = 121
# Scores that are tempered at once, over all temperatures of a block: what bounds memory.
_BLOCK_ENTRIES = 1 << 22
# Standard deviations of log T among tasks that a prior is chosen from. 0: all tasks share one temperature.
_SPREADS = (0.0, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0)


def _grid() -> Tensor:
    return torch.linspace(math.log(_RANGE[0]), math.log(_RANGE[1]), _GRID_POINTS, dtype=torch.float64)


def temperature_evidence(held_out: HeldOut) -> Tensor:
    """-log likelihood of each held-out answer at each temperature of the grid, in nats, shape (temperatures, n)."""
    scores, answers = held_out
    at_once = max(1, _BLOCK_ENTRIES // max(1, scores.numel()))
    parts: list[Tensor] = []
    for temperatures in _grid().exp().split(at_once):
        right = answers[None, :, None].expand(len(temperatures), -1, 1)
        tempered = scores.double()[:, None] / temperatures[:, None, None]
        parts.append(-draw_probabilities(tempered).mean(dim=0).gather(-1, right).squeeze(-1).clamp_min(1e-12).log())
    return torch.cat(parts)


def _evidence(held_out: HeldOut | None) -> Tensor:
    """-log likelihood of held-out answers at each temperature of the grid; zeros where there are none."""
    if held_out is None:
        return torch.zeros(_GRID_POINTS, dtype=torch.float64)
    return temperature_evidence(held_out).sum(dim=1)


def _shares(weights: Sequence[float] | None, count: int) -> Tensor:
    share = torch.ones(count) if weights is None else torch.tensor(weights)
    return share.double() / share.sum()


class TemperaturePrior(BaseModel, frozen=True):
    """How tasks' temperatures are spread: log T of a task ~ N(log median, spread^2).

    Attributes:
        median: The temperature of a task of which nothing is known.
        spread: Standard deviation of log T among tasks; 0 where all share one.
    """

    median: float = Field(gt=0)
    spread: float = Field(default=0.0, ge=0)

    def penalty(self) -> Tensor:
        """-log p(T) up to a constant at each temperature of the grid."""
        deviation = (_grid() - math.log(self.median)) ** 2
        if self.spread == 0:
            return torch.where(deviation == deviation.min(), 0.0, torch.inf)
        return deviation / (2 * self.spread**2)


def task_temperature(prior: TemperaturePrior, held_out: HeldOut | None) -> float:
    """A task's own temperature: the mode of its posterior given held-out answers of its support set.

    log p(T | support) = sum_n log p(y_n | x_n, T, support without n) + log N(log T; log median, spread^2)

    Tasks differ far more in how far to trust the model than one temperature can say: one that it half
    knows needs T below 1, one that it cannot do needs T near infinity.

    Args:
        prior: How temperatures are spread among tasks.
        held_out: Scores and answers of its support examples; None where there are none.

    Returns:
        The temperature; the prior's median where there are no answers or the spread is 0.
    """
    return prior.median if held_out is None else own_temperature(prior, temperature_evidence(held_out))


def own_temperature(prior: TemperaturePrior, evidence: Tensor) -> float:
    """A task's own temperature, see ``task_temperature``; ``evidence`` as ``temperature_evidence`` gives it."""
    if prior.spread == 0 or evidence.shape[1] == 0:
        return prior.median
    return _grid()[(evidence.sum(dim=1) + prior.penalty()).argmin()].exp().item()


def fit_temperature_prior(
    support: Sequence[HeldOut | None],
    query: Sequence[tuple[Tensor, Tensor]],
    weights: Sequence[float] | None = None,
) -> TemperaturePrior:
    """Fits the prior of tasks' temperatures: with it, tasks' own temperatures minimize NLL on their queries.

    A temperature divides every draw's scores before the draws are averaged, as ``predictive`` does. A task
    weighs the same whatever its size. Without support sets this is temperature scaling (Guo et al. 2017)
    with one temperature for all. Temperatures lie on a logarithmic grid from 0.05 to 20.

    Args:
        support: For each validation task, what ``task_temperature`` takes.
        query: For each task, scores (draws, n, options) and answers (n,) of its query set.
        weights: What each task counts, positive; the same by default.

    Raises:
        ValueError: No task, or one without queries.
    """
    if not query or any(len(answers) == 0 for _, answers in query):
        raise ValueError("fitting temperatures needs at least one task, and queries of each")
    evidence = torch.stack([_evidence(held_out) for held_out in support])
    cost = torch.stack([temperature_evidence(item).mean(dim=1) for item in query])
    share = _shares(weights, len(query))
    best: tuple[float, TemperaturePrior] | None = None
    for spread in _SPREADS if evidence.any() else (0.0,):
        for log_median in _grid().tolist():
            prior = TemperaturePrior(median=math.exp(log_median), spread=spread)
            chosen = (evidence + prior.penalty()).argmin(dim=-1, keepdim=True)
            loss = (share @ cost.gather(-1, chosen)).item()
            if best is None or loss < best[0] - 1e-9:
                best = loss, prior
    assert best is not None
    return best[1]


def conformal_scores(probabilities: Tensor, answers: Tensor, seed: int = 0) -> Tensor:
    """Nonconformity of the right answers: the probability that lies above them, and a random part of their own.

    The score of adaptive prediction sets (Romano et al. 2020, arXiv 2006.02544). Where the probabilities are right it
    is uniform between 0 and 1 for two options as for twenty, so that one threshold does for every number of them.

    Args:
        probabilities: Shape (n, options).
        answers: The right option's index, shape (n,).
        seed: Of the random parts.

    Returns:
        Shape (n,), between 0 and 1.
    """
    own = probabilities.gather(-1, answers[:, None])
    above = ((probabilities > own) * probabilities).sum(dim=-1)
    as_likely = ((probabilities == own) * probabilities).sum(dim=-1)
    part = torch.rand(len(answers), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return above + part * as_likely


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
    """Which options belong to the set, shape (..., options): the likeliest, until their probability passes a threshold.

    An option belongs where the probability above it is within the threshold: whatever its random part, its
    nonconformity is no less. So the set contains that of Romano et al., depends on its question alone, and holds the
    right option at least as often as was wanted; where probabilities are right, for every question and whatever the
    number of options. For that it is larger than one that is right so often on average. No set is empty.
    """
    others, own = probabilities[..., None, :], probabilities[..., :, None]
    return ((others > own) * others).sum(dim=-1) <= threshold


class ShotCalibration(BaseModel, frozen=True):
    """Calibration after adaptation with a number of shots."""

    shots: int = Field(ge=0, description="Labelled examples that the tasks were adapted with.")
    temperature: float = Field(
        gt=0, description="Divides the scores of every draw: the median of tasks' temperatures, or one task's own."
    )
    spread: float = Field(
        default=0.0,
        ge=0,
        description="Standard deviation of log temperature among tasks; 0 where all share one, or it is a task's own.",
    )
    support: int = Field(
        default=0,
        ge=0,
        description="Held-out answers of its support set that a task's own temperature was fitted on; else 0.",
    )
    conformal: dict[str, float] = Field(
        description='Coverage (as text, "0.9") to the threshold on nonconformity after tempering: for a calibrated '
        "model the coverage itself."
    )
    risk: dict[str, float] = Field(
        default_factory=dict, description='Risk (as text, "0.10") to the confidence that answers must pass.'
    )
    ece_before: float = Field(
        description="Expected calibration error before tempering, on the answers that it was fitted on: those of the "
        "validation tasks, or a version's own that were judged."
    )
    ece_after: float = Field(description="After it, on held-out folds of them.")
    questions: int = Field(description="Answers that it was fitted on.")
    scatter: Scatter | None = Field(
        default=None, description="Of the answer's probability between draws; null: not known."
    )
    confidence: float | None = Field(
        default=None, description="Mean confidence on them, after tempering; null: not known."
    )
    epistemic: float | None = Field(
        default=None, description="Mean epistemic uncertainty on them, in nats, after tempering; null: not known."
    )
    curves: Curves | None = Field(default=None, description="Of the answers that `ece_after` is of; null: not known.")

    def risk_threshold(self, risk: float) -> float | None:
        """Returns the confidence that answers must pass for a risk of at most this; None where none is known."""
        return lenient_threshold(self.risk, risk)

    def prediction_set(self, probabilities: Tensor) -> Tensor | None:
        """Returns the options of a 90 % set, see the function ``prediction_set``; None: not known."""
        threshold = self.conformal.get(_TOLD_COVERAGE)
        return None if threshold is None else prediction_set(probabilities, threshold)

    def for_task(self, held_out: HeldOut | None) -> ShotCalibration:
        """Returns the calibration of one task with its own temperature; ``held_out`` as in ``task_temperature``."""
        prior = TemperaturePrior(median=self.temperature, spread=self.spread)
        own = task_temperature(prior, held_out)
        return self.model_copy(
            update={"temperature": own, "spread": 0.0, "support": 0 if held_out is None else len(held_out[1])}
        )


_Entry = TypeVar("_Entry", ShotCalibration, TextCalibration)


class Calibration(BaseModel, frozen=True):
    """How a posterior's confidence is made from its predictive distribution."""

    by_shots: list[ShotCalibration] = Field(
        description="For questions with options: one a number of shots, ascending; none for a task taught without."
    )
    texts: list[TextCalibration] = Field(
        default_factory=list, description="For free text, likewise; none for a task taught with options."
    )
    fitted_on: list[str] = Field(description="Names of the validation tasks.")
    draws: int = Field(description="Draws used in fitting.")

    @model_validator(mode="after")
    def _of_something(self) -> Calibration:
        if not self.by_shots and not self.texts:
            raise ValueError("by_shots and texts are both empty: a calibration needs at least one entry")
        return self

    def nearest(self, shots: int) -> ShotCalibration | None:
        """Returns the entry for options whose number of shots is nearest on a log scale; None where there is none."""
        return _nearest(self.by_shots, shots)

    def nearest_text(self, shots: int) -> TextCalibration | None:
        """Returns the entry for free text whose number of shots is nearest on a log scale; None: there is none.

        One of no shots is for those alone, where there is another: without examples a text is hardly ever right.
        """
        return _nearest([entry for entry in self.texts if (entry.shots > 0) == (shots > 0)] or self.texts, shots)

    def for_task(self, shots: int, held_out: HeldOut | None) -> Calibration | None:
        """Returns the calibration of a task taught with options; ``held_out`` as in ``task_temperature``."""
        entry = self.nearest(shots)
        if entry is None:
            return None
        own = entry.for_task(held_out).model_copy(update={"shots": shots})
        return self.model_copy(update={"by_shots": [own], "texts": []})

    def for_text_task(self, shots: int) -> Calibration | None:
        """Returns the calibration of a task taught without options."""
        entry = self.nearest_text(shots)
        if entry is None:
            return None
        return self.model_copy(update={"by_shots": [], "texts": [entry.model_copy(update={"shots": shots})]})


def _nearest(entries: Sequence[_Entry], shots: int) -> _Entry | None:
    return min(entries, key=lambda entry: abs(math.log1p(entry.shots) - math.log1p(shots)), default=None)
