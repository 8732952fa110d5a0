"""API keys: made, hashed at rest, and looked up."""

from __future__ import annotations

import hashlib
import os
import secrets
import sqlite3
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, get_args

from limits import RateLimitItem, parse_many
from pydantic import BaseModel

from abmll.errors import AbmllError, StoreFailure

Right = Literal["query", "adapt", "admin"]
RIGHTS: Sequence[Right] = get_args(Right)
_PREFIX = "abmll_"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS keys (
    name TEXT PRIMARY KEY, hash TEXT NOT NULL, rights TEXT NOT NULL, rate TEXT, created TEXT NOT NULL
)
"""


class Key(BaseModel, frozen=True):
    """A key, without its secret.

    Attributes:
        name: Whose it is; stands in the log.
        rights: What it may do: ``query`` asks and lists tasks, ``adapt`` makes tasks and sees jobs, ``admin``
            deletes tasks.
        rate: Most requests in a time, such as ``600/minute``; None for any number.
        created: When it was made, ISO 8601.
    """

    name: str
    rights: frozenset[Right]
    rate: str | None
    created: str


def parse_rate(rate: str) -> RateLimitItem:
    """Reads a rate such as ``10/second``.

    Raises:
        AbmllError: Not a rate.
    """
    try:
        (item,) = parse_many(rate)
        if item.amount < 1:
            raise ValueError(rate)
    except ValueError as error:
        raise AbmllError(f"{rate!r} is not one rate; give one such as 10/second or 600/minute", field="rate") from error
    return item


def _hash(secret: str) -> str:
    # A secret of 256 random bits needs no slow hash: there is nothing to guess.
    return hashlib.sha256(secret.encode()).hexdigest()


class Keys:
    """The keys in a file (SQLite); each method reads or writes it anew, so that a revoked key ends at once.

    Args:
        path: The file; made with the first key.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, name: str, rights: Sequence[str], rate: str | None = None) -> str:
        """Makes a key.

        Returns:
            The secret, which is stored nowhere.

        Raises:
            AbmllError: The name is taken or blank, a right or the rate is unknown, or the file cannot be written.
        """
        if not name.strip() or len(name) > 100 or not name.isprintable():
            raise AbmllError("a key's name is 1 to 100 printable characters", field="name")
        unknown = sorted(set(rights) - set(RIGHTS))
        if unknown or not rights:
            raise AbmllError(f"rights are {', '.join(RIGHTS)}; not {', '.join(unknown) or 'none'}", field="rights")
        if rate is not None:
            parse_rate(rate)
        secret = _PREFIX + secrets.token_urlsafe(32)
        row = (
            name,
            _hash(secret),
            ",".join(sorted(set(rights))),
            rate,
            datetime.now(UTC).isoformat(timespec="seconds"),
        )
        if not self.path.exists():
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                os.close(os.open(self.path, os.O_CREAT | os.O_WRONLY, 0o600))
            except OSError as error:
                raise AbmllError(f"cannot make {self.path}: {error}", field="keys") from error
        with self._open("rw") as db:
            db.execute(_SCHEMA)
            try:
                db.execute("INSERT INTO keys (name, hash, rights, rate, created) VALUES (?, ?, ?, ?, ?)", row)
            except sqlite3.IntegrityError as error:
                raise AbmllError(f"there is a key {name!r} already; revoke it first", field="name") from error
        return secret

    def revoke(self, name: str) -> None:
        """Ends a key.

        Raises:
            AbmllError: There is none of that name, or the file cannot be written.
        """
        with self._open("rw") as db:
            if db.execute("DELETE FROM keys WHERE name = ?", (name,)).rowcount == 0:
                raise AbmllError(f"there is no key {name!r}; `abmll keys list` shows them", field="name")

    def all(self) -> list[Key]:
        """All keys, in the order of their names."""
        return sorted(self._read(), key=lambda key: key.name)

    def find(self, secret: str) -> Key | None:
        """Returns the key of a secret.

        Raises:
            StoreFailure: The file cannot be read.
        """
        try:
            # How long the look-up takes may tell of hashes, which lead to no secret.
            found = self._read("WHERE hash = ?", _hash(secret))
        except AbmllError as error:
            raise StoreFailure(error.message) from error
        return found[0] if found else None

    def _read(self, which: str = "", *values: str) -> list[Key]:
        with self._open("ro") as db:
            rows = db.execute(f"SELECT name, rights, rate, created FROM keys {which}", values).fetchall()
        return [
            Key.model_validate({"name": name, "rights": rights.split(","), "rate": rate, "created": created})
            for name, rights, rate, created in rows
        ]

    @contextmanager
    def _open(self, mode: Literal["ro", "rw"]) -> Generator[sqlite3.Connection]:
        if not self.path.exists():
            raise AbmllError(f"there is no file of keys {self.path}; `abmll keys add` makes it", field="keys")
        try:
            name, patience = f"{self.path.absolute().as_uri()}?mode={mode}", 5.0 if mode == "rw" else 1.0
            db = sqlite3.connect(name, uri=True, isolation_level=None, timeout=patience)
            try:
                yield db
            finally:
                db.close()
        except sqlite3.Error as error:
            raise AbmllError(f"the file of keys {self.path} cannot be used: {error}", field="keys") from error
