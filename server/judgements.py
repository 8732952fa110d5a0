"""From scores under draws to an answer with its confidence and uncertainty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from abmll.calibration import ShotCalibration
from abmll.predictive import predictive
from abmll.sequences import TokenScores, sequence_predictive
from abmll.text_calibration import TextCalibration, text_confidence
from server.schemas import Candidate, Finish, Semantics, TokenReply, Uncertainty


@dataclass(frozen=True)
class Judged:
    """What a question's two kinds, options and free text, are answered with; see ``GenerateReply``."""

    answer: str | None
    answer_index: int | None
    probabilities: list[float] | None
    confidence: float
    raw_confidence: float
    calibrated: bool
    prediction_set: list[str] | None
    uncertainty: Uncertainty
    standard_error: float
    draws: int
    standard_errors: list[float] | None = None
    finish: Finish | None = None
    tokens: list[TokenReply] | None = None
    semantics: Semantics | None = None


def judge_options(options: Sequence[str], scores: Tensor, entry: ShotCalibration | None) -> Judged:
    """From option scores, shape (draws, options) in nats, to the answer; ``entry`` where a calibration holds for it."""
    temperature = 1.0 if entry is None else entry.temperature
    raw, result = predictive(scores), predictive(scores, temperature, mirrored=True)
    index, probabilities = int(result.answer), result.probabilities
    return Judged(
        answer=options[index],
        answer_index=index,
        probabilities=probabilities.tolist(),
        confidence=probabilities[index].item(),
        raw_confidence=raw.probabilities[index].item(),
        calibrated=entry is not None,
        prediction_set=_set(probabilities, options, entry),
        uncertainty=Uncertainty(
            total=result.total.item(), aleatoric=result.aleatoric.item(), epistemic=result.epistemic.item()
        ),
        standard_error=result.standard_error.item(),
        draws=result.draws,
        standard_errors=result.standard_errors.tolist(),
    )


def judge_text(text: str, scores: TokenScores, entry: TextCalibration | None) -> Judged:
    """From the scores of a free text to its confidence; ``entry`` where a calibration holds for it."""
    result = sequence_predictive(scores.log_probs)
    confidence = text_confidence(scores.log_probs.double().sum(dim=1), result, entry)
    return Judged(
        answer=text,
        answer_index=None,
        probabilities=None,
        confidence=confidence,
        raw_confidence=result.probability,
        calibrated=entry is not None,
        prediction_set=None,
        uncertainty=Uncertainty(total=result.total, aleatoric=result.aleatoric, epistemic=result.epistemic),
        standard_error=result.standard_error,
        draws=len(scores.log_probs),
    )


def candidates_of(answer: Judged, options: Sequence[str] | None) -> list[Candidate]:
    """What might be the answer, likeliest first."""
    if options is None or answer.probabilities is None:
        return [Candidate(answer=answer.answer or "", probability=answer.raw_confidence)]
    pairs = zip(options, answer.probabilities, strict=True)
    found = [Candidate(answer=option, probability=probability) for option, probability in pairs]
    return sorted(found, key=lambda candidate: -candidate.probability)


def _set(probabilities: Tensor, options: Sequence[str], entry: ShotCalibration | None) -> list[str] | None:
    inside = None if entry is None else entry.prediction_set(probabilities)
    if inside is None:
        return None
    return [option for option, member in zip(options, inside.tolist(), strict=True) if member]
