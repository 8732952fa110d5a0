"""A SQLite file in the store: write-ahead log, synced at each commit, and errors of the disk told as such."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from abmll.errors import AbmllError, StoreFailure

logger = logging.getLogger(__name__)


class Database:
    """One file; each use opens it anew, from any thread and process.

    A file that exists, but cannot be written at present, is no obstacle: a server can answer without it.

    Args:
        path: The file; made if absent.
        schema: SQL that makes its tables where they are absent.
        what: What it holds, for messages.

    Raises:
        AbmllError: The file is damaged, or cannot be made.
    """

    def __init__(self, path: Path, schema: str, what: str) -> None:
        self.path, self.what = path, what
        existed = path.exists()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self.open() as db:
                db.execute("PRAGMA journal_mode=WAL")
                db.executescript(schema)
        except StoreFailure as error:
            if not isinstance(error.__cause__, sqlite3.OperationalError):
                raise AbmllError(
                    f"the {what} in {path} cannot be used: {error.__cause__}; restore or remove the file"
                ) from error
            if existed:
                logger.warning("%s cannot be written until this is mended: %s", what, error.message)
                return
            raise AbmllError(f"the {what} in {path} cannot be written: {error.message}", field="store") from error
        except OSError as error:
            raise AbmllError(f"the {what} in {path} cannot be used: {error}; restore or remove the file") from error

    @contextmanager
    def open(self) -> Generator[sqlite3.Connection]:
        """Opens the file; each statement is a transaction of its own.

        Raises:
            StoreFailure: The disk is full, read-only or failing, or the file is damaged.
        """
        try:
            db = sqlite3.connect(self.path, timeout=30, isolation_level=None)
            db.row_factory = sqlite3.Row
            try:
                db.execute("PRAGMA synchronous=FULL")
                yield db
            finally:
                db.close()
        except sqlite3.OperationalError as error:
            reason = f"the store's disk does not take or give the {self.what} ({error}); free space or mend it"
            raise StoreFailure(reason) from error
        except (sqlite3.IntegrityError, sqlite3.ProgrammingError):
            raise  # no fault of the file's
        except sqlite3.DatabaseError as error:
            raise StoreFailure(f"the file of the {self.what} is damaged ({error}); restore or remove it") from error

    @contextmanager
    def transaction(self) -> Generator[sqlite3.Connection]:
        """Opens the file; all statements are one transaction, undone by an exception.

        Raises:
            StoreFailure: The disk is full, read-only or failing.
        """
        with self.open() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
            except BaseException:
                if db.in_transaction:  # a full disk ends it by itself
                    db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")
