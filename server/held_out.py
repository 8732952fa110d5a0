"""What a served task's answers to labelled questions were worth: do its confidences hold when counted?"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import Tensor

from abmll import metrics
from abmll.examples import Example
from abmll.meanings import normalized
from clients.replies import Answer

LEAST = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
_BINS = 10
_SAMPLES = 1000


class Counted(BaseModel, frozen=True):
    """Answers: what they said of themselves, and how many were right."""

    confidence: float = Field(description="mean confidence")
    accuracy: float = Field(description="share of right ones")
    accuracy_low: float = Field(description="95 % Wilson interval of accuracy, from")
    accuracy_high: float = Field(description="to")


class Share(Counted, frozen=True):
    """Some of the answers."""

    low: float = Field(description="their confidence is above this (from it on, in at_least)")
    high: float = Field(description="and not above this")
    answers: int


class HeldOutMeasures(Counted, frozen=True):
    """Measures of a task's answers to labelled questions."""

    task: str
    versions: list[int] = Field(description="the versions that answered")
    questions: int
    free_text: bool
    uncalibrated: int = Field(description="answers whose confidence is not calibrated")
    ece: float = Field(description="expected calibration error, 15 bins of equal width")
    ece_by_chance: float = Field(
        description="ECE that so many answers exceed in 5 % of cases where every confidence is true"
    )
    nll: float = Field(description="nats: -log p(right option); of free text, of being right or wrong as it was")
    brier: float = Field(description="summed over the options; of free text, (confidence - right)^2")
    auroc: float | None = Field(description="of confidence for telling right from wrong; null where all are the same")
    set_coverage: float | None = Field(description="share of prediction sets that hold the right option")
    set_size: float | None = Field(description="their mean size")
    epistemic: float = Field(description="mean, nats (of free text, per token)")
    aleatoric: float = Field(description="mean, nats (of free text, per token)")
    draws: float = Field(description="mean number of draws")
    bins: list[Share] = Field(description=f"by confidence, those with answers, of {_BINS} of equal width")
    at_least: list[Share] = Field(description="all answers that are at least so sure")


def measure(rows: Sequence[Example], answers: Sequence[Answer]) -> HeldOutMeasures:
    """Measures answers.

    Args:
        rows: Labelled questions of one kind, at least one.
        answers: The answer to each, none of them withheld.
    """
    free_text = rows[0].is_free_text
    confidence = torch.tensor([answer.confidence for answer in answers], dtype=torch.float64)
    correct = torch.tensor([is_right(row, answer) for row, answer in zip(rows, answers, strict=True)])
    if free_text:
        probabilities, truth = torch.stack([1 - confidence, confidence], dim=1), correct.long()
        brier = ((confidence - correct.double()) ** 2).mean().item()
    else:
        probabilities = _padded([answer.probabilities or [] for answer in answers])
        truth = torch.tensor([row.answer for row in rows])
        brier = metrics.brier(probabilities, truth)
    sets = [(row.text.strip(), answer.prediction_set) for row, answer in zip(rows, answers, strict=True)]
    told = [(right, [option.strip() for option in inside]) for right, inside in sets if inside is not None]
    auroc = metrics.confidence_auroc(confidence, correct)
    index = metrics.bin_of(confidence, _BINS)

    def share(inside: Tensor, low: float, high: float) -> Share:
        return Share(low=low, high=high, answers=int(inside.sum()), **counted(confidence[inside], correct[inside]))

    return HeldOutMeasures(
        task=answers[0].task,
        versions=sorted({answer.posterior.version for answer in answers}),
        questions=len(rows),
        free_text=free_text,
        uncalibrated=sum(answer.calibrated is not True for answer in answers),
        **counted(confidence, correct),
        ece=metrics.expected_calibration_error(confidence, correct),
        ece_by_chance=ece_by_chance(confidence),
        nll=metrics.negative_log_likelihood(probabilities, truth),
        brier=brier,
        auroc=None if auroc != auroc else auroc,
        set_coverage=fmean(right in inside for right, inside in told) if told else None,
        set_size=fmean(len(inside) for _, inside in told) if told else None,
        epistemic=fmean(answer.uncertainty.epistemic for answer in answers),
        aleatoric=fmean(answer.uncertainty.aleatoric for answer in answers),
        draws=fmean(answer.draws for answer in answers),
        bins=[share(index == at, at / _BINS, (at + 1) / _BINS) for at in range(_BINS) if (index == at).any()],
        at_least=[share(confidence >= least, least, 1.0) for least in LEAST if (confidence >= least).any()],
    )


def is_right(row: Example, answer: Answer) -> bool:
    """Whether an answer is the right option, or a text that was not cut short and says the same as the right one."""
    if not row.is_free_text:
        return answer.answer_index == row.answer
    return answer.finish != "length" and normalized(answer.answer or "") == normalized(row.text)


def counted(confidence: Tensor, correct: Tensor) -> dict[str, float]:
    """The fields of ``Counted`` for answers, at least one: confidence and whether they were right, shape (n,) each."""
    from scipy.stats import binomtest

    right, count = int(correct.sum()), len(correct)
    interval = binomtest(right, count).proportion_ci(0.95, method="wilson")
    return {
        "confidence": confidence.mean().item(),
        "accuracy": right / count,
        "accuracy_low": float(interval.low),
        "accuracy_high": float(interval.high),
    }


def ece_by_chance(confidence: Tensor, seed: int = 0) -> float:
    """The 95 % quantile of ECE where each answer is right with the probability that its confidence says.

    An ECE of few answers is far from 0 by chance alone (Bröcker & Smith 2007, consistency bars): one below this is no
    sign that confidence is off.

    Args:
        confidence: Of each answer, shape (n,).
        seed: Seed of the simulated answers.
    """
    random, bins = np.random.default_rng(seed), torch.nn.functional.one_hot(metrics.bin_of(confidence)).double()
    errors: list[Tensor] = []
    for _ in range(_SAMPLES):  # one by one: all at once are gigabytes for a long file
        drawn = torch.from_numpy(random.random(len(confidence))) < confidence
        errors.append(((drawn.double() - confidence) @ bins).abs().sum() / len(confidence))
    return torch.stack(errors).quantile(0.95).item()


def _padded(rows: Sequence[Sequence[float]]) -> Tensor:
    """Probabilities of rows with different numbers of options, shape (n, most), 0 where there is no option."""
    most = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0.0] * (most - len(row))] for row in rows], dtype=torch.float64)
