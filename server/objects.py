"""Object storage: versions of tasks in any place that fsspec knows, such as s3://bucket/prefix.

Below the place's address::

    PLACE                      which place it is: a random name, given once
    blobs/ID/FILE              a version's files; nobody looks there before a pointer says so
    tasks/NAME/v0001.json      that pointer, made in one piece, and only where there is none: the version is there
    tasks/NAME/serving.json    which versions answer, where somebody has said so
"""

from __future__ import annotations

import contextlib
import logging
import re
import uuid
from collections import defaultdict
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError

from abmll.errors import AbmllError, StoreFailure
from abmll.store import create_file, replace_file
from server.names import SERVING, version_name

logger = logging.getLogger(__name__)

_PLACE = "PLACE"
# Names as in names.py: what is there may have been put there by anybody.
_POINTER = re.compile(r"/tasks/([a-z0-9][a-z0-9._-]{0,63})/v(\d{4,})\.json$")
_SERVING = re.compile(r"/tasks/([a-z0-9][a-z0-9._-]{0,63})/serving\.json$")
_FILE = re.compile(r"/([A-Za-z0-9][A-Za-z0-9._-]{0,63})$")


class Pointer(BaseModel, frozen=True):
    """Where a version's files are.

    Attributes:
        blob: Name of their folder.
        content: Hash of what is in them.
    """

    blob: str = Field(pattern=r"^[0-9a-f]{32}$")
    content: str = Field(pattern=r"^[0-9a-f]{64}$")


@dataclass
class Listing:
    """What is there.

    Attributes:
        place: Which place it is.
        versions: Of each task, by number.
        unreadable: Numbers of each task whose pointers say nothing: there is a version, but nobody knows where.
        serving: Contents of ``serving.json`` by task.
    """

    place: str
    versions: defaultdict[str, dict[int, Pointer]] = field(default_factory=lambda: defaultdict(dict))
    unreadable: defaultdict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    serving: dict[str, bytes] = field(default_factory=dict)


class Objects:
    """Task versions under ``url``; several servers may use one place at once.

    Credentials and endpoints come from where fsspec's implementation takes them, for S3 the AWS variables and files.
    All methods raise ``StoreFailure`` where the place does not answer, or refuses.

    Args:
        url: The place's address.

    Raises:
        AbmllError: No such kind of address, or its package is not installed.
    """

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs
        from fsspec.implementations.local import LocalFileSystem

        self.url = url
        try:
            # Another server's changes must be seen; a listing kept from before would hide them.
            self._fs, root = url_to_fs(url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise AbmllError(
                f"cannot use {url}: {error}; give an address such as s3://bucket/prefix (pip install 'abmll[s3]')",
                field="objects",
            ) from error
        self._root = root.rstrip("/")
        self._is_folder = isinstance(self._fs, LocalFileSystem)
        self._read: dict[str, tuple[Any, bytes]] = {}
        self._place: str | None = None

    def listing(self) -> Listing:
        """Looks up what is there; reads only what has changed since the last look."""
        read = dict[str, tuple[Any, bytes]]()
        with self._asking("read"):
            self._fs.invalidate_cache()
            found = Listing(self._which())
            files: dict[str, dict[str, Any]] = self._fs.find(f"{self._root}/tasks", detail=True)
            for path, about in files.items():
                mark = about.get("ETag") or (about.get("mtime") or about.get("updated"), about.get("size"))
                pointer, serving = _POINTER.search(path), _SERVING.search(path)
                if pointer is None and serving is None:
                    continue
                try:
                    known = self._read.get(path)
                    data = known[1] if known is not None and known[0] == mark else self._fs.cat_file(path)
                except FileNotFoundError:  # deleted meanwhile
                    continue
                read[path] = mark, data
                if serving is not None:
                    found.serving[serving[1]] = data
                elif pointer is not None:
                    try:
                        found.versions[pointer[1]][int(pointer[2])] = Pointer.model_validate_json(data)
                    except ValidationError:
                        logger.warning("%s is no pointer to a version; it is left alone, mend or delete it", path)
                        found.unreadable[pointer[1]].add(int(pointer[2]))
        self._read = read
        return found

    def _which(self) -> str:
        """Names the place, the first time for good: an empty one is not taken for one where all was deleted."""
        with contextlib.suppress(FileNotFoundError):
            found = self._fs.cat_file(f"{self._root}/{_PLACE}").decode()
            if self._place is None or self._place == found:
                self._place = found
                return found
        if self._place is not None:
            raise StoreFailure(
                f"{self.url} is not the place that it was a moment ago: its {_PLACE} is gone, or another; mount or "
                "mend it, or start the server anew to upload every version"
            )
        with contextlib.suppress(FileExistsError):  # another server was faster
            self._put(_PLACE, uuid.uuid4().hex.encode(), "create")
        found = self._place = self._fs.cat_file(f"{self._root}/{_PLACE}").decode()
        return found

    def publish(self, name: str, number: int, folder: Path, content: str) -> Pointer:
        """Uploads a version's files, then makes it visible; a crash leaves it whole or not there."""
        pointer = Pointer(blob=uuid.uuid4().hex, content=content)
        with self._asking("written"):
            try:
                for path in sorted(folder.iterdir()):
                    self._put(f"blobs/{pointer.blob}/{path.name}", path.read_bytes())
            except Exception:
                self._forget(pointer)
                raise
            try:
                self._put(_path(name, number), pointer.model_dump_json().encode(), "create")
            except Exception as error:
                # A client that had no reply sends it again, and is then told that it is there already.
                there = self._pointer(name, number)
                if there != pointer:
                    self._forget(pointer)
                    if not isinstance(error, FileExistsError):
                        raise
                    told = f"another server makes version {number} of task {name!r}; try again"
                    raise StoreFailure(told) from error
        return pointer

    def _pointer(self, name: str, number: int) -> Pointer | None:
        try:
            return Pointer.model_validate_json(self._fs.cat_file(f"{self._root}/{_path(name, number)}"))
        except (FileNotFoundError, ValidationError):
            return None

    def fetch(self, pointer: Pointer, folder: Path) -> None:
        """Downloads a version's files into an empty folder."""
        with self._asking("read"):
            paths: list[str] = self._fs.find(f"{self._root}/blobs/{pointer.blob}")
        for path in paths:
            file = _FILE.search(path)
            if file is not None:
                with self._asking("read"):
                    data = self._fs.cat_file(path)
                (folder / file[1]).write_bytes(data)

    def remove(self, name: str, number: int, pointer: Pointer | None) -> None:
        """Removes a version: out of sight first, then, where its pointer says where it is, from the place."""
        with self._asking("written"):
            self._drop(_path(name, number))
            if pointer is not None:
                self._forget(pointer)

    def serve(self, name: str, data: bytes | None) -> None:
        """Writes a task's ``serving.json``; None removes it."""
        path = f"tasks/{name}/{SERVING}"
        with self._asking("written"):
            if data is None:
                self._drop(path)
            else:
                self._put(path, data)

    def _put(self, path: str, data: bytes, mode: Literal["overwrite", "create"] = "overwrite") -> None:
        full = f"{self._root}/{path}"
        if self._is_folder:
            # fsspec looks whether a local file is there, then writes into it: another server may come between.
            Path(full).parent.mkdir(parents=True, exist_ok=True)
            (create_file if mode == "create" else replace_file)(Path(full), data)
        else:
            self._fs.pipe_file(full, data, mode=mode)

    def _drop(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(f"{self._root}/{path}")

    def _forget(self, pointer: Pointer) -> None:
        try:
            self._fs.rm(f"{self._root}/blobs/{pointer.blob}", recursive=True)
        except Exception as error:  # nobody sees it any more
            logger.warning("%s/blobs/%s is needed no more, but cannot be removed: %s", self.url, pointer.blob, error)

    @contextmanager
    def _asking(self, what: str) -> Generator[None]:
        try:
            yield
        except AbmllError:
            raise
        except Exception as error:  # every implementation has errors of its own
            text = str(error) or type(error).__name__
            raise StoreFailure(f"{self.url} cannot be {what}: {text}; mend it, or the way to it") from error


def _path(name: str, number: int) -> str:
    return f"tasks/{name}/{version_name(number)}.json"
