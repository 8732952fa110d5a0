"""How far a version's confidence held: on validation tasks, and on its own answers that were judged."""

from __future__ import annotations

from abmll.curves import Curves
from abmll.store import StoredPosterior
from server.feedback import Feedback
from server.task_schemas import ReliabilityReply


def reliability(stored: StoredPosterior, feedback: Feedback) -> ReliabilityReply:
    """Tells the curves of a version."""
    task, version = stored.record.task, stored.record.version
    judged = feedback.curves(task, version, stored.answering)
    return ReliabilityReply(task=task, version=version, validation=_validation(stored), feedback=judged)


def _validation(stored: StoredPosterior) -> Curves | None:
    """Those of the calibration that holds for questions with options, else of that for free text."""
    if stored.calibration is None:
        return None
    shots = stored.record.shots
    entry = stored.calibration.nearest(shots) or stored.calibration.nearest_text(shots)
    return None if entry is None else entry.curves
