"""The folder that an engine's adapters lie in: in memory, and gone with the process that made it, if not by itself."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
from io import FileIO
from pathlib import Path

logger = logging.getLogger(__name__)

_PREFIX = "abmll-adapters-"
_LOCK = "lock"
_MEMORY = Path("/dev/shm")


class AdapterFolder:
    """A folder of this process's own; those that killed processes left are removed first.

    Attributes:
        path: The folder.
    """

    def __init__(self) -> None:
        place = _MEMORY if os.access(_MEMORY, os.W_OK) else Path(tempfile.gettempdir())
        _sweep(place)
        made = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}", dir=place))
        self._lock = (made / _LOCK).open("ab", buffering=0)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        # Under its name, by which others look for it, it is locked from the first moment on.
        self.path = made.rename(place / made.name.removeprefix("."))

    def remove(self) -> None:
        """Removes it with all that is in it; who still writes into it fails from now on."""
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.path.rename(self.path.with_name(f".{self.path.name}")), ignore_errors=True)
        self._lock.close()


def _sweep(place: Path) -> None:
    for folder in place.glob(f"{_PREFIX}*"):
        try:
            with (folder / _LOCK).open("rb", buffering=0) as lock:
                if _is_free(lock):
                    shutil.rmtree(folder)
                    logger.info("removed %s, which a killed process had left", folder)
        except OSError:  # another's, or just being removed
            continue


def _is_free(lock: FileIO) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
