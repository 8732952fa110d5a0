"""How tasks are told over HTTP."""

from __future__ import annotations

from collections.abc import Sequence

from server.schemas import PosteriorId, TaskReply, TaskSummary, VersionReply
from server.store import Version


def summarize(name: str, versions: Sequence[Version]) -> TaskSummary:
    """Tells a task by the version that answers, and what is wrong with its newest one."""
    current = next((version for version in reversed(versions) if version.stored is not None), None)
    newest = versions[-1]
    if current is None or current.stored is None:
        return TaskSummary(
            task=name, status="damaged", error=newest.error, version=newest.number, posterior=None, shots=None,
            created=None, calibrated=False,
        )  # fmt: skip
    stored = current.stored
    return TaskSummary(
        task=name,
        status="ready",
        error=newest.error,
        version=current.number,
        posterior=PosteriorId(id=stored.digest, version=current.number, task=name),
        shots=stored.record.shots,
        created=stored.record.created,
        calibrated=stored.calibration is not None,
    )


def describe(name: str, versions: Sequence[Version]) -> TaskReply:
    """Tells a task with its history."""
    current = next((version.stored for version in reversed(versions) if version.stored is not None), None)
    return TaskReply(
        **summarize(name, versions).model_dump(),
        base_model=None if current is None else current.posterior.config.base_model,
        calibration=None if current is None else current.calibration,
        versions=[_version(version) for version in versions],
    )


def _version(version: Version) -> VersionReply:
    stored = version.stored
    record = None if stored is None else stored.record
    return VersionReply(
        version=version.number,
        status=version.status,
        error=version.error,
        id=None if stored is None else stored.digest,
        parent=None if record is None else record.parent,
        shots=None if record is None else record.shots,
        seed=None if record is None else record.seed,
        created=None if record is None else record.created,
    )
