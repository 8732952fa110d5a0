"""Keeps a store's folder equal to object storage, which has the say: what is there is here, what is gone there goes."""

from __future__ import annotations

import errno
import hashlib
import logging
import shutil
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from abmll.errors import InvalidPosterior, StoreFailure
from abmll.names import is_name
from abmll.store import load_posterior, replace_file, replaced
from server.names import SERVING, version_name, version_number
from server.objects import Listing, Objects, Pointer

logger = logging.getLogger(__name__)

# In a version's folder: its mark. A version without it has not been in object storage.
_BLOB = "BLOB"
_CONTENT = ("posterior.json", "posterior.safetensors", "calibration.json")
# What a disk says that will take no other version either.
_WHOLE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class _Mark(NamedTuple):
    """Where a version has been: its blob, and in which place; an earlier version of abmll did not write the place."""

    blob: str
    place: str | None

    @classmethod
    def read(cls, path: Path) -> _Mark | None:
        """A version's; None where it has none."""
        if not path.exists():
            return None
        blob, _, place = path.read_text().partition("\n")
        return cls(blob, place or None)

    def text(self) -> str:
        return f"{self.blob}\n{self.place or ''}"


class _NotBrought(Exception):
    """One version is not brought up to date; the others may be."""


class _PlaceFailed(Exception):
    """Object storage did not give a version: told apart from the disk's failures, which have the same type.

    Args:
        failure: What it said.
    """

    def __init__(self, failure: StoreFailure) -> None:
        super().__init__(failure.message)
        self.failure = failure


class Mirror:
    """One store's folder and one place of object storage. Whoever calls holds the store's lock.

    Args:
        tasks: The folder that holds a folder for each task.
        objects: The place.
    """

    def __init__(self, tasks: Path, objects: Objects) -> None:
        self.tasks, self.objects = tasks, objects

    @contextmanager
    def publishing(self, name: str, number: int, place: str) -> Generator[Callable[[Path], None]]:
        """Gives what makes a new version visible there, from its files here; where the block fails, it is taken back.

        Raises:
            StoreFailure: The place does not take it, or another server has made a version of that number.
        """
        made: list[Pointer] = []

        def publish(partial: Path) -> None:
            made.append(self.objects.publish(name, number, partial, _content(partial)))
            (partial / _BLOB).write_text(_Mark(made[0].blob, place).text())

        try:
            yield publish
        except BaseException:
            for pointer in made:
                with suppress(StoreFailure):
                    self.objects.remove(name, number, pointer)
            raise

    def refresh(self, task: str | None = None) -> Listing:
        """Uploads what has never been in this place, fetches what others have made, drops what they have deleted.

        Where one version cannot be brought up to date, the others are all the same.

        Args:
            task: The task whose versions matter; None for all.

        Returns:
            What is there.

        Raises:
            StoreFailure: The place, or this folder, cannot be read or written; or both have a version of a task that
                matters that is not the same. What was done stays.
        """
        there, failed = self.objects.listing(), list[str]()
        try:
            for name in sorted({*there.versions, *filter(is_name, (entry.name for entry in self.tasks.iterdir()))}):
                pointers, here = there.versions[name], self._marks(name, there.place)
                if here and not any(here.values()) and not pointers and (self.tasks / name / SERVING).exists():
                    there.serving[name] = (self.tasks / name / SERVING).read_bytes()
                    self.objects.serve(name, there.serving[name])
                # What a pointer that cannot be read stands for is not deleted.
                for number in sorted({*pointers, *here} - there.unreadable[name]):
                    try:
                        self._bring(name, number, here, pointers, there.place)
                    except (_NotBrought, OSError) as error:
                        if isinstance(error, OSError) and error.errno in _WHOLE_DISK:
                            raise
                        if task in (None, name):
                            failed.append(f"version {number} of task {name!r}: {error}")
                if pointers:
                    self._bring_serving(name, there.serving.get(name))
        except OSError as error:
            raise StoreFailure(f"{self.tasks} cannot be brought up to date: {error}; mend its disk") from error
        if failed:
            more = f"; and {len(failed) - 1} more" if len(failed) > 1 else ""
            raise StoreFailure(f"not all versions are as in {self.objects.url}: {failed[0]}{more}")
        return there

    def remove(self, name: str) -> bool:
        """Deletes a task there, its oldest version first; says whether there was one.

        Raises:
            StoreFailure: It cannot be; the task is still there, perhaps without its oldest versions.
        """
        there = self.objects.listing()
        versions = there.versions[name] | dict.fromkeys(there.unreadable[name])
        self.objects.serve(name, None)
        for number, pointer in sorted(versions.items()):
            self.objects.remove(name, number, pointer)
        return bool(versions)

    def remove_version(self, name: str, number: int, there: Listing) -> None:
        """Deletes a version there, of what a listing says; it may be that there is none.

        Raises:
            StoreFailure: It cannot be; the version is still there.
        """
        pointer = there.versions[name].get(number)
        if pointer is not None or number in there.unreadable[name]:
            self.objects.remove(name, number, pointer)

    def _bring(
        self, name: str, number: int, here: dict[int, _Mark | None], pointers: dict[int, Pointer], place: str
    ) -> None:
        folder, pointer = self._folder(name, number), pointers.get(number)
        mark = here.get(number)
        if number not in here:
            self._fetch(name, number, pointers[number], place)
        elif mark is None:
            if pointer is None:
                logger.info("version %d of task %s goes to %s", number, name, self.objects.url)
                pointer = pointers[number] = self.objects.publish(name, number, folder, _content(folder))
            elif pointer.content != _content(folder):
                raise _NotBrought(
                    f"it is in {self.tasks} and, another one, in {self.objects.url}; delete one of the two"
                )
            replace_file(folder / _BLOB, _Mark(pointer.blob, place).text().encode())
        elif pointer is None:
            logger.info("version %d of task %s was deleted elsewhere", number, name)
            self._remove(name, number)
        elif pointer.blob != mark.blob:
            self._fetch(name, number, pointer, place)

    def _marks(self, name: str, place: str) -> dict[int, _Mark | None]:
        """Versions of a task that are here, each with its mark; None for one that has not been in this place."""
        found: dict[int, _Mark | None] = {}
        with suppress(FileNotFoundError):
            for folder in (self.tasks / name).iterdir():
                number = version_number(folder.name)
                if number is not None:
                    mark = _Mark.read(folder / _BLOB)
                    found[number] = None if mark is None or mark.place not in (None, place) else mark
        return found

    def _folder(self, name: str, number: int) -> Path:
        return self.tasks / name / version_name(number)

    def _fetch(self, name: str, number: int, pointer: Pointer, place: str) -> None:
        try:
            with replaced(self._folder(name, number)) as partial:
                try:
                    self.objects.fetch(pointer, partial)
                except StoreFailure as error:
                    raise _PlaceFailed(error) from error
                load_posterior(partial)  # cut short on the way, it would stay damaged here
                (partial / _BLOB).write_text(_Mark(pointer.blob, place).text())
        except InvalidPosterior as error:  # deleted meanwhile, or damaged there
            logger.warning("version %d of task %s cannot be fetched: %s", number, name, error.message)
        except _PlaceFailed as error:
            raise error.failure from None
        except StoreFailure as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno in _WHOLE_DISK:
                raise
            raise _NotBrought(error.message) from error
        else:
            logger.info("version %d of task %s was fetched", number, name)

    def _remove(self, name: str, number: int) -> None:
        grave = Path(tempfile.mkdtemp(prefix=".deleted.", dir=self.tasks))
        self._folder(name, number).rename(grave / "was")
        shutil.rmtree(grave, ignore_errors=True)
        if not any(version_number(entry.name) is not None for entry in (self.tasks / name).iterdir()):
            shutil.rmtree(self.tasks / name, ignore_errors=True)

    def _bring_serving(self, name: str, data: bytes | None) -> None:
        path = self.tasks / name / SERVING
        if data is None:
            path.unlink(missing_ok=True)
        elif path.parent.is_dir() and (not path.exists() or path.read_bytes() != data):
            replace_file(path, data)


def _content(folder: Path) -> str:
    """Hash of a version's files, but for those that say nothing of how it answers."""
    files = [folder / name for name in _CONTENT]
    return hashlib.sha256(b"".join(hashlib.sha256(f.read_bytes()).digest() for f in files if f.exists())).hexdigest()
