"""What judged answers show of a confidence: a reliability diagram and a risk-coverage curve."""

from __future__ import annotations

from pydantic import BaseModel, Field
from torch import Tensor

from abmll.metrics import calibration_bins, risk_coverage

BINS = 15
# Points of a risk-coverage curve: one for each twentieth of the answers.
_POINTS = 20


class Bin(BaseModel, frozen=True):
    """Answers with a confidence above ``low`` and up to ``high``."""

    low: float = Field(description="Their confidence is above this,", examples=[0.8])
    high: float = Field(description="and not above this.", examples=[0.8667])
    count: int = Field(description="Answers.", examples=[57])
    confidence: float = Field(description="Their mean confidence.", examples=[0.83])
    accuracy: float = Field(description="Share of them that were right.", examples=[0.81])


class RiskPoint(BaseModel, frozen=True):
    """A point of the risk-coverage curve."""

    coverage: float = Field(description="Share of the questions that are answered, the surest first.", examples=[0.5])
    risk: float = Field(description="Share of these answers that are wrong.", examples=[0.07])


class Curves(BaseModel, frozen=True):
    """Reliability diagram (Naeini et al. 2015) and risk-coverage curve (Geifman & El-Yaniv 2017) of judged answers."""

    answers: int = Field(description="Judged answers.", examples=[1300])
    bins: list[Bin] = Field(description=f"Those with answers, of {BINS} of equal width.")
    risk_coverage: list[RiskPoint] = Field(description="By ascending coverage; the last is of all answers.")


def curves(confidence: Tensor, correct: Tensor) -> Curves:
    """Returns both curves of answers.

    Args:
        confidence: Of each answer, shape (n,), at least one.
        correct: Whether it was right, shape (n,).
    """
    count, mean, right = (values.tolist() for values in calibration_bins(confidence, correct, BINS))
    bins = [
        Bin(low=at / BINS, high=(at + 1) / BINS, count=int(count[at]), confidence=mean[at], accuracy=right[at])
        for at in range(BINS)
        if count[at]
    ]
    risk, n = risk_coverage(confidence, correct), len(confidence)
    answered = sorted({max(1, round(n * point / _POINTS)) for point in range(1, _POINTS + 1)})
    points = [RiskPoint(coverage=k / n, risk=risk[k - 1].item()) for k in answered]
    return Curves(answers=n, bins=bins, risk_coverage=points)
