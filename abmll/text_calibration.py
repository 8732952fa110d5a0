"""Calibration of free texts: from the predictive probability of a decoded text to that of its being right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, Field
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from abmll.curves import Curves
from abmll.risk import lenient_threshold
from abmll.sequences import SequencePredictive

# Logits beyond are as good as certain; a text of a hundred improbable tokens must not outweigh all others in a fit.
_LOGIT_LIMIT = 40.0
# Of log slope and offset: where all are right, or all wrong, there is no best slope.
_BOUNDS = ((-6.0, 3.0), (-50.0, 50.0))


@dataclass(frozen=True)
class JudgedTexts:
    """Decoded answers of one task that were compared with the right ones.

    Attributes:
        logits: Of each text's predictive probability, shape (n,), see ``text_logits``.
        correct: Whether it was right, shape (n,), bool.
    """

    logits: Tensor
    correct: Tensor


def text_logits(log_probs: Tensor) -> Tensor:
    """Log-odds of texts' predictive probabilities, shape (n,), float64, within +-40.

    Args:
        log_probs: log p(text | x, phi_s) of whole texts, shape (draws, n), nats.
    """
    mean = log_probs.double().logsumexp(dim=0) - math.log(len(log_probs))
    # Not log(p / (1 - p)): a probability of nearly 1 would lose what it lacks of it.
    rest = torch.log(-torch.expm1(mean.clamp_max(-1e-15)))
    return (mean - rest).clamp(-_LOGIT_LIMIT, _LOGIT_LIMIT)


class TextConfidence(BaseModel, frozen=True):
    """How probable it is that a text is right: Platt scaling (Platt 1999) of its predictive probability.

    P(right | text) = sigmoid(slope logit p(text) + offset)
    """

    slope: float = Field(gt=0, description="Above 0, so that of two texts the likelier one has more confidence.")
    offset: float = Field(description="Log-odds of a text with a predictive probability of a half.")

    def confidence(self, logits: Tensor) -> Tensor:
        """Returns the probability that texts are right, of the same shape as ``logits``."""
        return torch.sigmoid(self.slope * logits + self.offset)


class TextCalibration(TextConfidence, frozen=True):
    """How free texts' confidence is made after adaptation with a number of shots."""

    shots: int = Field(ge=0, description="Labelled examples that the tasks were adapted with.")
    risk: dict[str, float] = Field(
        default_factory=dict, description='Risk (as text, "0.10") to the confidence that answers must pass.'
    )
    accuracy: float = Field(description="Share of right answers on the validation tasks.")
    ece_before: float = Field(
        description="Expected calibration error of the predictive probability on the validation tasks."
    )
    ece_after: float = Field(description="Of the confidence, on held-out families.")
    questions: int = Field(description="Validation answers that it was fitted on.")
    curves: Curves | None = Field(default=None, description="Of the answers that `ece_after` is of; null: not known.")

    def risk_threshold(self, risk: float) -> float | None:
        """Returns the confidence that answers must pass for a risk of at most this; None where none is known."""
        return lenient_threshold(self.risk, risk)


def text_confidence(each: Tensor, result: SequencePredictive, entry: TextConfidence | None) -> float:
    """Returns how sure a text is: calibrated, or the geometric mean per token of its predictive probability.

    Args:
        each: log p of the whole text under each draw, shape (draws,), nats.
        result: What these say of it.
        entry: The calibration that holds for it; None: there is none.
    """
    return result.per_token if entry is None else entry.confidence(text_logits(each[:, None])).item()


def fit_texts(tasks: Sequence[JudgedTexts], weights: Sequence[float] | None = None) -> TextConfidence:
    """Fits slope and offset to answers by their log loss.

    Answers count as right with probability (n + 1) / (n + 2) rather than 1, n being how many were, and likewise for
    wrong ones (Platt 1999), so that nothing is certain.

    Args:
        tasks: Answers to each validation task's queries.
        weights: What each task counts, positive, whatever its number of answers; the same by default.

    Raises:
        ValueError: No task, or one without answers.
    """
    from scipy.optimize import minimize

    if not tasks or any(len(item.correct) == 0 for item in tasks):
        raise ValueError("fitting the confidence of texts needs at least one task, and answers of each")
    counts = torch.tensor([len(item.correct) for item in tasks])
    share = torch.ones(len(tasks)) if weights is None else torch.tensor(weights)
    each = torch.repeat_interleave(share.double() / share.sum() / counts, counts)
    logits, correct = torch.cat([item.logits for item in tasks]), torch.cat([item.correct for item in tasks])
    right = int(correct.sum())
    wrong = len(correct) - right
    target = torch.where(correct, (right + 1) / (right + 2), 1 / (wrong + 2)).double()

    def loss(values: Any) -> tuple[float, list[float]]:
        scaled = math.exp(values[0]) * logits
        total = scaled + float(values[1])
        slopes = each * (torch.sigmoid(total) - target)
        value = each @ binary_cross_entropy_with_logits(total, target, reduction="none")
        return value.item(), [(slopes @ scaled).item(), slopes.sum().item()]

    slope, offset = minimize(loss, [0.0, 0.0], jac=True, method="L-BFGS-B", bounds=_BOUNDS).x.tolist()
    return TextConfidence(slope=math.exp(slope), offset=offset)
