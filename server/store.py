"""The task store: every version of every task's posterior, in folders."""

from __future__ import annotations

import bisect
import fcntl
import itertools
import logging
import math
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field, ValidationError

from abmll.calibration import Calibration
from abmll.errors import AbmllError, InvalidPosterior, InvalidRequest, StoreFailure, TaskConflict, TaskNotFound
from abmll.names import GLOBAL, check_name, is_name
from abmll.posterior import Posterior
from abmll.store import Record, StoredPosterior, load_posterior, replace_file, save_posterior
from server.cache import ByteCache, tensor_bytes
from server.mirror import Mirror
from server.names import SERVING, version_name, version_number
from server.objects import Listing, Objects

logger = logging.getLogger(__name__)

UNKNOWN_SERVING = "which version answers cannot be read from serving.json; say it anew with PUT /tasks/{name}/serving"
# A version found damaged is looked at again after so long: it may have been restored.
_DAMAGED_SECONDS = 10.0


@dataclass(frozen=True)
class Version:
    """One version of a task: the stored posterior, or what is wrong with it.

    Attributes:
        number: Counts up from 1.
        stored: The posterior; None if it cannot be used.
        error: Why not; None if it can.
    """

    number: int
    stored: StoredPosterior | None
    error: str | None

    @property
    def status(self) -> Literal["ready", "damaged"]:
        """Whether it can be asked."""
        return "damaged" if self.stored is None else "ready"


# A version's folder, and what tells it from another that stood there before.
_Key = tuple[Path, int, int]


class _Serving(BaseModel, frozen=True):
    shares: dict[int, float] = Field(min_length=1)


def _usable(name: str, version: Version) -> StoredPosterior:
    if version.stored is None:
        raise InvalidPosterior(f"version {version.number} of task {name!r} cannot be used: {version.error}", "task")
    return version.stored


class TaskStore:
    """Task posteriors under ``root/tasks/<name>/v0001`` and so on, and the global one beside them.

    A version is written once and never changed. Several processes may use a store at once: the folders
    are read anew at each call, only what was loaded from them is kept.

    Args:
        root: The store's folder; made if absent.
        global_posterior: Served as task ``global``.
        check: Called on each posterior when it is loaded; raises ``PosteriorMismatch`` for one that was
            made for another base model.
        cache_bytes: Bytes of loaded posteriors to keep.
        objects: Object storage that has every version, too; what changes here changes there first.
    """

    def __init__(
        self,
        root: Path,
        global_posterior: StoredPosterior,
        check: Callable[[Posterior], None] = lambda _: None,
        cache_bytes: int = 1 << 30,
        objects: Objects | None = None,
    ) -> None:
        self.tasks = root / "tasks"
        self.global_posterior = global_posterior
        self.check = check
        self._loaded: ByteCache[_Key, Version] = ByteCache(
            cache_bytes,
            lambda v: 0 if v.stored is None else tensor_bytes(v.stored.posterior.tensors().values()),
        )
        self._damaged: dict[_Key, tuple[float, Version]] = {}
        self._lock = threading.Lock()
        try:
            self.tasks.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise AbmllError(f"cannot make the store {root}: {error}; choose another folder", field="store") from error
        self._mirror = None if objects is None else Mirror(self.tasks, objects)
        self._seen = dict[str, list[int]]()

    def refresh(self) -> dict[tuple[str, int | None], list[str]]:
        """Brings the store up to date with its object storage.

        Returns:
            Tasks (None) and versions of them that are gone since the last time, deleted elsewhere, each with the
            digests of its posteriors that had been loaded.

        Raises:
            StoreFailure: It does not answer, the disk is full or not writable, or a version is not brought up to date.
        """
        if self._mirror is None:
            return {}
        with self._changing():
            self._mirror.refresh()
            there = {name: numbers for name in self._folders() if (numbers := self._numbers_or(name, self._seen))}
        before, self._seen = self._seen, there
        gone: list[tuple[str, int | None]] = [(name, None) for name in before.keys() - there.keys()]
        gone += [(name, number) for name, now in there.items() for number in before.get(name, []) if number not in now]
        return {(name, number): self._unload(name, number) for name, number in gone}

    def _numbers_or(self, name: str, before: dict[str, list[int]]) -> list[int]:
        """A task's versions; those of before where it cannot be read now."""
        try:
            return self._numbers(name)
        except StoreFailure:
            return before.get(name, [])

    def names(self) -> list[str]:
        """All tasks, ``global`` first.

        Raises:
            StoreFailure: The store cannot be read.
        """
        return [GLOBAL, *filter(self._exists, self._folders())]

    def has(self, name: str, number: int) -> bool:
        """Whether a task has a version, damaged or not; of ``global``, and where that cannot be read, yes."""
        try:
            return name == GLOBAL or number in self._numbers(name)
        except StoreFailure:
            return True

    def _exists(self, name: str) -> bool:
        try:
            return bool(self._numbers(name))
        except StoreFailure:
            return True

    def current(self, name: str) -> StoredPosterior:
        """Returns the newest version of a task that is not damaged.

        Raises:
            TaskNotFound: There is no such task.
            InvalidPosterior: All its versions are damaged, or made for another base model.
        """
        return self.global_posterior if name == GLOBAL else self._newest(name, self._known(name))

    def _newest(self, name: str, known: Sequence[int]) -> StoredPosterior:
        error = ""
        for number in reversed(known):
            version = self._load(name, number)
            if version.stored is not None:
                return version.stored
            error = error or version.error or ""
        raise InvalidPosterior(f"task {name!r} cannot be used: {error}", field="task")

    def versions(self, name: str) -> list[Version]:
        """All versions of a task, oldest first.

        Raises:
            TaskNotFound: There is no such task.
        """
        if name == GLOBAL:
            return [Version(self.global_posterior.record.version, self.global_posterior, None)]
        found: list[Version] = []
        for number in (known := self._known(name)):
            with suppress(TaskNotFound):  # that version was deleted meanwhile
                found.append(self._load(name, number))
        if not found:
            raise TaskNotFound(f"there is no task {name!r} any more: its versions {known} were deleted", field="task")
        return found

    def answering(self, name: str) -> tuple[list[Version], dict[int, float] | None]:
        """The versions of a task that may answer, and the newest, oldest first; and their shares, see ``serving``.

        The weights of no others are read.

        Raises:
            TaskNotFound: There is no such task.
        """
        if name == GLOBAL:
            return self.versions(name), None
        known, shares = self._known(name), self._shares(name)
        if shares is not None:
            return [self._load(name, number) for number in known if number in shares or number == known[-1]], shares
        found: list[Version] = []
        for number in reversed(known):
            found.insert(0, self._load(name, number))
            if found[0].stored is not None:
                break
        return found, None

    def choose(self, name: str, version: int | None, lot: float) -> StoredPosterior:
        """Returns the version that answers a question.

        Args:
            name: The task.
            version: The version that was asked for; None: as the task is served.
            lot: Between 0 and 1; decides between the versions that share the traffic.

        Raises:
            TaskNotFound: There is no such task or version.
            InvalidPosterior: What should answer is damaged, or made for another base model.
        """
        if name == GLOBAL and version in (None, self.global_posterior.record.version):
            return self.global_posterior
        known = [] if name == GLOBAL else self._known(name)
        if version is not None:
            if version not in known:
                raise TaskNotFound(f"task {name!r} has no version {version}; GET /tasks/{name} lists them", "version")
            return _usable(name, self._load(name, version))
        shares = self._shares(name)
        if shares is None:
            return self._newest(name, known)
        if not shares:
            raise InvalidPosterior(f"task {name!r} cannot be used: {UNKNOWN_SERVING}", field="task")
        limits = list(itertools.accumulate(shares.values()))
        chosen = list(shares)[min(bisect.bisect_right(limits, lot), len(limits) - 1)]
        return _usable(name, self._load(name, chosen))

    def serving(self, name: str) -> dict[int, float] | None:
        """The versions that share a task's traffic, each with its share.

        Returns:
            None where the newest answers; nothing where the file that says so is damaged.

        Raises:
            TaskNotFound: There is no such task.
        """
        if name == GLOBAL:
            return None
        self._known(name)
        return self._shares(name)

    def _shares(self, name: str) -> dict[int, float] | None:
        path = self.tasks / name / SERVING
        try:
            return _Serving.model_validate_json(path.read_bytes()).shares
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            logger.warning("%s is damaged: %s", path, error)
            return {}

    def serve(self, name: str, shares: dict[int, float] | None) -> None:
        """Says which versions of a task answer: one (a roll-back), several (an A/B test), or always the newest.

        Args:
            name: The task.
            shares: Share of the questions by version, made to sum to 1; None: the newest.

        Raises:
            InvalidRequest: No version, or a share that is not positive.
            TaskNotFound: There is no such task or version.
            InvalidPosterior: A version is damaged.
            TaskConflict: The task is ``global``.
            StoreFailure: The disk is full or not writable; all is as before.
        """
        if name == GLOBAL:
            raise TaskConflict("the global posterior has one version, the one that the server began with", "name")
        path = self.tasks / name / SERVING
        data: bytes | None = None
        if shares is not None:
            if not shares or not all(0 < share < math.inf for share in shares.values()):
                raise InvalidRequest("versions needs a positive share for each; null: the newest", field="versions")
            total = sum(shares.values())
            normal = {number: share / total for number, share in sorted(shares.items())}
            data = _Serving(shares=normal).model_dump_json().encode()
        with self._changing():
            if self._mirror is not None:
                self._mirror.refresh(name)  # another server may have deleted a version
            known = {version.number: version for version in self.versions(name)}
            for number in shares or ():
                if number not in known:
                    raise TaskNotFound(f"task {name!r} has no version {number}; it has {sorted(known)}", "versions")
                _usable(name, known[number])
            if self._mirror is not None:
                self._mirror.objects.serve(name, data)
            try:
                if data is None:
                    path.unlink(missing_ok=True)
                else:
                    replace_file(path, data)
            except OSError as error:
                raise StoreFailure(f"task {name!r} is served as before: {error}; mend the store's disk") from error

    def add(
        self,
        name: str,
        posterior: Posterior,
        calibration: Calibration | None,
        make_record: Callable[[int], Record],
        source: StoredPosterior | None = None,
    ) -> StoredPosterior:
        """Writes a task's next version.

        Args:
            name: The task.
            posterior: Its parameters.
            calibration: How its confidence is made.
            make_record: Given the version's number, says where it comes from.
            source: The version that it is made from, which must still be there; None for no such.

        Raises:
            InvalidRequest: Not a task name, or the reserved one.
            TaskNotFound: The version that it is made from is gone.
            StoreFailure: The disk is full or not writable, or object storage does not take it.
        """
        check_name(name)
        with self._changing():
            there = None if self._mirror is None else self._mirror.refresh(name)
            numbers = self._numbers(name)
            if source is not None and not self._holds(name, numbers, source):
                raise TaskNotFound(
                    f"version {source.record.version} of task {name!r} was deleted meanwhile", field="name"
                )
            # Also past those that are there, but could not be fetched.
            taken = [] if there is None else [*there.versions[name], *there.unreadable[name]]
            number = max([*numbers, *taken], default=0) + 1
            folder, record = self._folder(name, number), make_record(number)
            if self._mirror is None or there is None:
                return save_posterior(folder, posterior, record, calibration)
            with self._mirror.publishing(name, number, there.place) as publish:
                return save_posterior(folder, posterior, record, calibration, publish)

    def _holds(self, name: str, numbers: Sequence[int], wanted: StoredPosterior) -> bool:
        number = wanted.record.version
        stored = self._load(name, number).stored if number in numbers else None
        return stored is not None and stored.digest == wanted.digest

    def delete(self, name: str) -> list[str]:
        """Removes a task with all versions: out of sight first, then from the disk.

        Returns:
            The digests of its posteriors that had been loaded.

        Raises:
            InvalidRequest: Not a task name, or ``global``.
            TaskNotFound: There is no such task.
            StoreFailure: The disk is full or not writable; the task is still there.
        """
        check_name(name)
        if self._mirror is None:
            self._known(name)
        folder = self.tasks / name
        with self._changing():
            elsewhere = self._mirror is not None and self._mirror.remove(name)
            if elsewhere and not self._numbers(name):
                return []  # it could not be fetched
            self._known(name)  # another may have deleted it while this one waited
            grave = self._bury(folder, f"task {name!r}")
        gone = self._unload(name)
        shutil.rmtree(grave, ignore_errors=True)
        return gone

    def delete_version(self, name: str, number: int) -> list[str]:
        """Removes a version of a task that does not answer; its number is not given again.

        Returns:
            The digest of its posterior, if it had been loaded.

        Raises:
            TaskNotFound: There is no such task or version.
            TaskConflict: The version answers, or is the newest; or the task is ``global``.
            StoreFailure: The disk is full or not writable, or object storage does not take it; the version is there,
                or gone from object storage alone, and from here with the next refresh.
        """
        if name == GLOBAL:
            raise TaskConflict("the global posterior has one version, which cannot be deleted", "name")
        with self._changing():
            there = None if self._mirror is None else self._mirror.refresh(name)
            known = self._known(name)
            if number not in known:
                raise TaskNotFound(f"task {name!r} has no version {number}; it has {known}", "version")
            if number in self._needed(name, known):
                raise TaskConflict(
                    f"version {number} of task {name!r} answers, or is the newest; only others can be deleted: say "
                    "with PUT /tasks/{name}/serving which answers, or delete the whole task",
                    "version",
                )
            grave = self._remove_version(name, number, there)
        gone = self._unload(name, number)
        shutil.rmtree(grave, ignore_errors=True)
        return gone

    def prune(self, name: str, kept: int) -> dict[int, list[str]]:
        """Removes the versions of a task that are not among its newest and do not answer.

        What cannot be loaded now stays, and where nothing can, all: the disk may come back, or the right base model.

        Args:
            name: The task.
            kept: Newest versions that stay.

        Returns:
            The versions that are gone, each with the digest of its posterior, if it had been loaded.

        Raises:
            StoreFailure: The disk is full or not writable, or object storage does not take it.
        """
        graves: dict[int, Path] = {}
        if self._superfluous(name, kept):
            with self._changing():
                there = None if self._mirror is None else self._mirror.refresh(name)
                for number in self._superfluous(name, kept):
                    try:
                        graves[number] = self._remove_version(name, number, there)
                    except StoreFailure:
                        if not graves:
                            raise
                        break  # what is gone is told
        gone = {number: self._unload(name, number) for number in graves}
        for grave in graves.values():
            shutil.rmtree(grave, ignore_errors=True)
        return gone

    def _superfluous(self, name: str, kept: int) -> list[int]:
        known = self._numbers(name)
        if len(known) <= kept:
            return []
        try:
            needed = self._needed(name, known)
            if all(self._load(name, number).stored is None for number in needed):
                return []
            others = [number for number in known[:-kept] if number not in needed]
            return [number for number in others if self._load(name, number).stored is not None]
        except (TaskNotFound, TaskConflict):  # deleted meanwhile; nobody knows which version answers
            return []

    def _needed(self, name: str, known: Sequence[int]) -> set[int]:
        """The versions of a task that share its questions, and the newest: the next one is numbered after it.

        Raises:
            TaskNotFound: It was deleted meanwhile.
            TaskConflict: Nobody knows which answer.
        """
        shares = self._shares(name)
        if shares == {}:
            raise TaskConflict(f"nothing is deleted of task {name!r}: {UNKNOWN_SERVING}", "name")
        if shares is not None:
            return {*shares, known[-1]}
        return {*(version.number for version in self.answering(name)[0] if version.stored is not None), known[-1]}

    def _remove_version(self, name: str, number: int, there: Listing | None) -> Path:
        """Removes a version from object storage, and here out of sight; says where it is to be removed from."""
        if self._mirror is not None and there is not None:
            self._mirror.remove_version(name, number, there)
        return self._bury(self._folder(name, number), f"version {number} of task {name!r}")

    def _bury(self, folder: Path, what: str) -> Path:
        """Moves a folder out of sight; says where it is to be removed."""
        grave: Path | None = None
        try:
            grave = Path(tempfile.mkdtemp(prefix=".deleted.", dir=self.tasks))
            folder.rename(grave / folder.name)
        except OSError as error:
            if grave is not None:
                grave.rmdir()
            raise StoreFailure(f"{what} cannot be deleted: {error}; mend the store's disk") from error
        return grave

    def _unload(self, name: str, number: int | None = None) -> list[str]:
        """Forgets a task that is gone, or a version; gives the digests of its posteriors that had been loaded.

        Not one that another version has, too: a recalibrated one has the same weights.
        """
        folder = self.tasks / name

        def is_gone(key: _Key) -> bool:
            return key[0].parent == folder if number is None else key[0] == self._folder(name, number)

        with self._lock:
            gone = [self._loaded.pop(key) for key in self._loaded.present() if is_gone(key)]
            kept = [self._loaded.find(key) for key in self._loaded.present() if key[0].parent == folder]
            self._damaged = {key: found for key, found in self._damaged.items() if not is_gone(key)}
        used = {version.stored.digest for version in kept if version is not None and version.stored is not None}
        lost = [version.stored.digest for version in gone if version is not None and version.stored is not None]
        return [digest for digest in lost if digest not in used]

    def sweep(self) -> None:
        """Removes what processes that were killed have left half written or half removed, where it can."""
        with suppress(StoreFailure, OSError), self._changing():
            for pattern in (".deleted.*", "*/.v*.*", f"*/.{SERVING}.*"):
                for left in self.tasks.glob(pattern):
                    if ".old." in left.name:  # perhaps the only copy of what was to be replaced
                        continue
                    logger.info("removing %s, which a killed process had left", left)
                    if left.is_dir():
                        shutil.rmtree(left, ignore_errors=True)
                    else:
                        left.unlink(missing_ok=True)

    @contextmanager
    def _changing(self) -> Generator[None]:
        """Holds the store's lock: server and worker both make versions, and a task may be deleted meanwhile."""
        try:
            lock = (self.tasks.parent / ".adding").open("a")
        except OSError as error:
            raise StoreFailure(f"cannot write to {self.tasks}: {error}; free space or mend the store's disk") from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def damaged(self) -> dict[str, str]:
        """Loads every task's newest version; names those that cannot be used, with the reason."""
        found: dict[str, str] = {}
        for name in self.names()[1:]:
            try:
                error = self._load(name, self._known(name)[-1]).error
            except TaskNotFound:  # deleted meanwhile
                continue
            except StoreFailure as failure:
                error = failure.message
            if error is not None:
                found[name] = error
        return found

    def _folders(self) -> Sequence[str]:
        try:
            return sorted(entry.name for entry in self.tasks.iterdir() if is_name(entry.name))
        except OSError as error:
            raise StoreFailure(f"the store cannot be read: {error}; mend its disk") from error

    def _folder(self, name: str, number: int) -> Path:
        return self.tasks / name / version_name(number)

    def _numbers(self, name: str) -> list[int]:
        try:
            entries = [entry.name for entry in (self.tasks / name).iterdir()]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:  # it is there, and nobody may take it for deleted
            raise StoreFailure(f"task {name!r} cannot be read: {error}; mend the store's disk") from error
        return sorted(number for number in map(version_number, entries) if number is not None)

    def _known(self, name: str) -> list[int]:
        numbers = self._numbers(name) if is_name(name) else []
        if not numbers:
            names = self.names()
            shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
            raise TaskNotFound(f"there is no task {name[:80]!r}; known tasks: {shown}", field="task")
        return numbers

    def _load(self, name: str, number: int) -> Version:
        folder = self._folder(name, number)
        try:
            stat = (folder / "posterior.json").stat()
            # A task that was deleted and made again has the same paths, but other files.
            key = (folder, stat.st_ino, stat.st_mtime_ns)
        except OSError:
            if not folder.exists():
                raise TaskNotFound(f"version {number} of task {name!r} was deleted meanwhile", field="task") from None
            key = (folder, 0, 0)
        with self._lock:
            found = self._loaded.find(key)
            since, damaged = self._damaged.get(key, (-math.inf, None))
        if found is not None:
            return found
        if damaged is not None and time.monotonic() < since + _DAMAGED_SECONDS:
            return damaged
        try:
            stored = load_posterior(folder)
            self.check(stored.posterior)
        except InvalidPosterior as error:
            if damaged is None or damaged.error != error.message:
                logger.warning("task %s, version %d cannot be used: %s", name, number, error.message)
            version = Version(number, None, error.message)
            with self._lock:
                self._damaged[key] = time.monotonic(), version
            return version
        version = Version(number, stored, None)
        with self._lock:
            self._loaded.put(key, version)
            self._damaged.pop(key, None)
        return version
