"""How tasks are told over HTTP."""

from __future__ import annotations

from collections.abc import Sequence

from abmll.errors import InvalidRequest
from server.schemas import PosteriorId
from server.store import UNKNOWN_SERVING, Version
from server.task_schemas import TaskReply, TaskSummary, VersionReply


def summarize(name: str, versions: Sequence[Version], serving: dict[int, float] | None) -> TaskSummary:
    """Tells a task by the version that answers (most), and what is wrong with its newest one."""
    current = _answering(versions, serving)
    if current is None or current.stored is None:
        blamed = ([version for version in versions if version.number in (serving or {})] or versions)[-1]
        return damaged(name, blamed.number, UNKNOWN_SERVING if serving == {} else blamed.error)
    stored = current.stored
    return TaskSummary(
        task=name,
        status="ready",
        error=versions[-1].error,
        version=current.number,
        posterior=PosteriorId(id=stored.digest, version=current.number, task=name),
        shots=stored.record.shots,
        created=stored.record.created,
        calibrated=stored.calibration is not None,
    )


def damaged(name: str, version: int | None, error: str | None) -> TaskSummary:
    """Tells a task that is there and cannot be used; ``version`` is the one at fault, if it is known."""
    return TaskSummary(
        task=name, status="damaged", error=error, version=version, posterior=None, shots=None, created=None,
        calibrated=False,
    )  # fmt: skip


def describe(name: str, versions: Sequence[Version], serving: dict[int, float] | None) -> TaskReply:
    """Tells a task with its history."""
    answering = _answering(versions, serving)
    current = None if answering is None else answering.stored
    return TaskReply(
        **summarize(name, versions, serving).model_dump(),
        base_model=None if current is None else current.posterior.config.base_model,
        calibration=None if current is None else current.calibration,
        versions=[_version(version) for version in versions],
        serving=None if serving is None else {str(number): share for number, share in serving.items()},
    )


def _answering(versions: Sequence[Version], serving: dict[int, float] | None) -> Version | None:
    usable = [version for version in versions if version.stored is not None]
    if serving is None:
        return usable[-1] if usable else None
    return max((v for v in usable if v.number in serving), key=lambda v: serving[v.number], default=None)


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


def read_shares(given: dict[str, float]) -> dict[int, float]:
    """Reads shares by version.

    Raises:
        InvalidRequest: A version is not a number, or named twice.
    """
    if not all(number.isascii() and number.isdigit() and len(number) < 10 for number in given):
        raise InvalidRequest(f"versions are numbers, not {', '.join(given)[:80]!r}", field="versions")
    shares = {int(number): share for number, share in given.items()}
    if len(shares) < len(given):
        raise InvalidRequest("versions names a version twice", field="versions")
    return shares
