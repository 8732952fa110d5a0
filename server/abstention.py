"""When a question gets no answer, because it would be too unsure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from abmll.calibration import ShotCalibration
from abmll.errors import InvalidRequest
from abmll.text_calibration import TextCalibration
from server.schemas import Abstained, Candidate, GenerateRequest


@dataclass(frozen=True)
class Limit:
    """The confidence that an answer needs.

    Attributes:
        threshold: It must reach this; with a risk, pass it.
        risk: The share of questions that may get a wrong answer; None where the threshold was given.
        calibrated: Whether it is one of calibrated confidences of free texts, which one that was cut short has not.
    """

    threshold: float
    risk: float | None = None
    calibrated: bool = False

    def abstain(
        self, confidence: float, candidates: Sequence[Candidate], *, calibrated: bool = True
    ) -> Abstained | None:
        """Says why a question gets no answer; None: it gets one.

        Args:
            confidence: Of the likeliest answer.
            candidates: What might have been the answer, likeliest first.
            calibrated: Whether ``confidence`` is.
        """
        if self.calibrated and not calibrated:
            reason = "the text came to no end within max_tokens, so that its confidence is not known; allow more tokens"
            return Abstained(reason=reason, threshold=self.threshold, candidates=list(candidates))
        if confidence > self.threshold or (self.risk is None and confidence == self.threshold):
            return None
        tenths = round(1000 * confidence)
        if tenths >= 1000 * self.threshold:  # it would read as the one that is needed
            tenths = math.floor(1000 * confidence)
        own, least = f"{tenths / 10:g} %", f"{100 * self.threshold:.4g} %"
        reason = f"the likeliest answer has a confidence of {own}, below the {least} asked for"
        if self.risk is not None:
            reason = (
                f"the likeliest answer has a confidence of {own}; only above {least} do wrong answers stay within "
                f"{100 * self.risk:g} % of questions on average"
            )
        return Abstained(reason=reason, threshold=self.threshold, candidates=list(candidates))


def limit(request: GenerateRequest, entry: ShotCalibration | TextCalibration | None) -> Limit | None:
    """Returns what a question says of the confidence that its answer needs; None: any will do.

    Args:
        request: The question.
        entry: The calibration that its confidence has; None where it has none.

    Raises:
        InvalidRequest: The question asks for a promise that the calibration cannot give.
    """
    of_text = request.options is None and entry is not None
    if request.target_risk is None:
        return None if request.abstain_below is None else Limit(request.abstain_below, calibrated=of_text)
    if request.abstain_below is not None:
        raise InvalidRequest(
            "abstain_below and target_risk both say which confidence is needed; give one", field="target_risk"
        )
    if request.options is None and (request.temperature > 0 or request.stop):
        raise InvalidRequest(
            "target_risk holds for the likeliest text, whole: leave out temperature and stop, or give abstain_below",
            field="target_risk",
        )
    if entry is None or not entry.risk:
        what = "this posterior's confidence in " + ("free text" if request.options is None else "options")
        raise InvalidRequest(
            f"{what} is not calibrated for a risk to be promised: give abstain_below, or ask a task that was taught "
            f"{'without' if request.options is None else 'with'} options by a calibrated posterior (abmll calibrate)",
            field="target_risk",
        )
    threshold = entry.risk_threshold(request.target_risk)
    if threshold is None:
        least = min(map(float, entry.risk))
        raise InvalidRequest(
            f"target_risk {request.target_risk:g} is less than what it was calibrated on can promise; give {least:g} "
            "or more",
            field="target_risk",
        )
    return Limit(threshold, request.target_risk, of_text)
