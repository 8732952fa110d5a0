"""Keeps a store's folder equal to object storage, which has the say: what is there is here, what is gone there goes."""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from abmll.errors import InvalidPosterior, StoreFailure
from abmll.store import load_posterior, replace_file, replaced
from server.names import SERVING, is_name, version_name, version_number
from server.objects import Objects, Pointer

logger = logging.getLogger(__name__)

# In a version's folder: its blob. A version without it has not been in object storage.
_BLOB = "BLOB"
_CONTENT = ("posterior.json", "posterior.safetensors", "calibration.json")


class Mirror:
    """One store's folder and one place of object storage. Whoever calls holds the store's lock.

    Args:
        tasks: The folder that holds a folder for each task.
        objects: The place.
    """

    def __init__(self, tasks: Path, objects: Objects) -> None:
        self.tasks, self.objects = tasks, objects

    @contextmanager
    def publishing(self, name: str, number: int) -> Generator[Callable[[Path], None]]:
        """Gives what makes a new version visible there, from its files here; where the block fails, it is taken back.

        Raises:
            StoreFailure: The place does not take it, or another server has made a version of that number.
        """
        made: list[Pointer] = []

        def publish(partial: Path) -> None:
            made.append(self.objects.publish(name, number, partial, _content(partial)))
            (partial / _BLOB).write_text(made[0].blob)

        try:
            yield publish
        except BaseException:
            for pointer in made:
                with suppress(StoreFailure):
                    self.objects.remove(name, number, pointer)
            raise

    def refresh(self) -> None:
        """Uploads what has never been there, fetches what others have made, drops what they have deleted.

        Raises:
            StoreFailure: The place, or this folder, cannot be read or written; or both have a task of the same name
                that is not the same. What was done stays.
        """
        there = self.objects.listing()
        try:
            for name in sorted({*there.versions, *filter(is_name, (entry.name for entry in self.tasks.iterdir()))}):
                pointers, here = there.versions.get(name, {}), self._blobs(name)
                if here and not any(here.values()) and not pointers and (self.tasks / name / SERVING).exists():
                    there.serving[name] = (self.tasks / name / SERVING).read_bytes()
                    self.objects.serve(name, there.serving[name])
                for number in sorted({*pointers, *here}):
                    self._bring(name, number, here, pointers)
                if pointers:
                    self._bring_serving(name, there.serving.get(name))
        except OSError as error:
            raise StoreFailure(f"{self.tasks} cannot be brought up to date: {error}; mend its disk") from error

    def remove(self, name: str) -> None:
        """Deletes a task there, its oldest version first.

        Raises:
            StoreFailure: It cannot be; the task is still there, perhaps without its oldest versions.
        """
        there = self.objects.listing()
        self.objects.serve(name, None)
        for number, pointer in sorted(there.versions.get(name, {}).items()):
            self.objects.remove(name, number, pointer)

    def _bring(self, name: str, number: int, here: dict[int, str | None], pointers: dict[int, Pointer]) -> None:
        folder, pointer = self._folder(name, number), pointers.get(number)
        if number not in here:
            self._fetch(name, number, pointers[number])
        elif here[number] is None:
            if pointer is None:
                logger.info("version %d of task %s goes to %s", number, name, self.objects.url)
                pointer = pointers[number] = self.objects.publish(name, number, folder, _content(folder))
            elif pointer.content != _content(folder):
                raise StoreFailure(
                    f"task {name!r} is in {self.tasks} and, another one, in {self.objects.url}; delete one of the two"
                )
            replace_file(folder / _BLOB, pointer.blob.encode())
        elif pointer is None:
            logger.info("version %d of task %s was deleted elsewhere", number, name)
            self._remove(name, number)
        elif pointer.blob != here[number]:
            self._fetch(name, number, pointer)

    def _blobs(self, name: str) -> dict[int, str | None]:
        """Versions of a task that are here, each with its blob."""
        found: dict[int, str | None] = {}
        with suppress(FileNotFoundError):
            for folder in (self.tasks / name).iterdir():
                number = version_number(folder.name)
                if number is not None:
                    mark = folder / _BLOB
                    found[number] = mark.read_text() if mark.exists() else None
        return found

    def _folder(self, name: str, number: int) -> Path:
        return self.tasks / name / version_name(number)

    def _fetch(self, name: str, number: int, pointer: Pointer) -> None:
        try:
            with replaced(self._folder(name, number)) as partial:
                self.objects.fetch(pointer, partial)
                load_posterior(partial)  # cut short on the way, it would stay damaged here
                (partial / _BLOB).write_text(pointer.blob)
        except InvalidPosterior as error:  # deleted meanwhile, or damaged there
            logger.warning("version %d of task %s cannot be fetched: %s", number, name, error.message)
        else:
            logger.info("version %d of task %s was fetched", number, name)

    def _remove(self, name: str, number: int) -> None:
        grave = Path(tempfile.mkdtemp(prefix=".deleted.", dir=self.tasks))
        self._folder(name, number).rename(grave / "was")
        shutil.rmtree(grave, ignore_errors=True)
        if not self._blobs(name):
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
