"""Which calibration holds for a question."""

from __future__ import annotations

from abmll.calibration import ShotCalibration
from abmll.store import StoredPosterior
from abmll.text_calibration import TextCalibration
from server.schemas import GenerateRequest, ScoreRequest


def calibration_of(stored: StoredPosterior, request: GenerateRequest) -> ShotCalibration | TextCalibration | None:
    """The calibration that a question's confidence has; None: it has none."""
    return text_calibration(stored, request) if request.options is None else options_calibration(stored, request)


def options_calibration(stored: StoredPosterior, request: GenerateRequest) -> ShotCalibration | None:
    """For options: it holds for those that are scored as the posterior was trained."""
    standard = request.normalize in (None, stored.posterior.config.normalize)
    if stored.calibration is None or not standard:
        return None
    return stored.calibration.nearest(stored.record.shots)


def text_calibration(stored: StoredPosterior, request: GenerateRequest | ScoreRequest) -> TextCalibration | None:
    """For a free text with its end: it was fitted on the likeliest text, and holds for that."""
    likeliest = isinstance(request, ScoreRequest) or (request.temperature == 0 and not request.stop)
    if stored.calibration is None or not likeliest:
        return None
    return stored.calibration.nearest_text(stored.record.shots)
