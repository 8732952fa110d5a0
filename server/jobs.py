"""The registry of adaptation jobs: a SQLite file that server and worker share, and that outlives both."""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, TypeAdapter

from abmll.errors import JobNotFound, Overloaded, TaskConflict
from abmll.examples import Example
from server.database import Database

Status = Literal["queued", "running", "done", "failed", "cancelled"]

# Deaths of the adaptation process on a job, and of whole servers that had it under way, after which it fails. What ends
# a server is seldom the job; one that takes all the machine's memory each time must come to an end all the same.
ATTEMPTS = 2
SERVERS = 5
# Progress of a job whose result is not being saved yet.
_NEARLY = 0.999
# Seconds after which to ask again where too many jobs wait: about as long as one takes.
_RETRY_AFTER = 30
_EXAMPLES = TypeAdapter(list[Example])
_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
  number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, task TEXT NOT NULL, status TEXT NOT NULL,
  progress REAL NOT NULL DEFAULT 0, error TEXT, examples TEXT NOT NULL, steps INTEGER, seed INTEGER NOT NULL,
  attempts INTEGER NOT NULL DEFAULT 0, digest TEXT, version INTEGER, created TEXT NOT NULL, started TEXT, finished TEXT
);
CREATE UNIQUE INDEX IF NOT EXISTS one_active ON jobs(task) WHERE status IN ('queued', 'running');
CREATE TABLE IF NOT EXISTS server_deaths (job INTEGER PRIMARY KEY, times INTEGER NOT NULL);
"""


class Job(BaseModel, frozen=True):
    """One adaptation job.

    Attributes:
        id: 16 hexadecimal digits.
        task: The task that it makes a version of.
        status: queued, running, done, failed or cancelled.
        progress: 0 to 1.
        error: Why it failed.
        steps: Gradient steps asked for; None for those of meta-training.
        seed: Seed of the adaptation.
        attempts: Adaptation processes that died on it, of servers that lived on.
        digest: Id of the posterior that it made.
        version: Version of the task that it made.
        created: UTC time, ISO 8601.
        started: When a worker took it up.
        finished: When it ended.
    """

    id: str
    task: str
    status: Status
    progress: float
    error: str | None
    steps: int | None
    seed: int
    attempts: int
    digest: str | None
    version: int | None
    created: str
    started: str | None
    finished: str | None


_COLUMNS = ", ".join(Job.model_fields)
# What people taught is kept for as long as the job may need it.
_ENDS = "status = '{}', finished = ?, examples = '[]'"
_AGAIN = "UPDATE jobs SET status = 'queued', progress = 0 WHERE status = 'running'"


class JobCancelled(Exception):
    """The job at hand was cancelled."""


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class JobRegistry:
    """Jobs in ``path``; every method is one transaction, callable from any thread and process.

    A method that has returned has reached the disk (write-ahead log, synced at each commit). A job's labelled
    examples are kept until it ends. Every method raises ``StoreFailure`` where the disk is full, read-only or failing.

    Raises:
        AbmllError: The file is damaged, or cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self._database = Database(path, _SCHEMA, "jobs")

    def submit(
        self, task: str, examples: Sequence[Example], steps: int | None, seed: int, limit: int | None = None
    ) -> Job:
        """Queues a job.

        Args:
            task: The task to make a version of.
            examples: Its labelled examples.
            steps: Gradient steps; None for those of meta-training.
            seed: Seed of the adaptation.
            limit: Jobs that may wait; None for any number.

        Raises:
            TaskConflict: A job for the task is queued or running.
            Overloaded: So many jobs wait already.
        """
        job = uuid.uuid4().hex[:16]
        text = _EXAMPLES.dump_json(list(examples)).decode()
        with self._database.transaction() as db:
            (waiting,) = db.execute("SELECT COUNT(*) FROM jobs WHERE status = 'queued'").fetchone()
            if limit is not None and waiting >= limit:
                raise Overloaded(
                    f"{waiting} adaptation jobs wait already; ask again when GET /adapt shows fewer", _RETRY_AFTER
                )
            try:
                db.execute(
                    "INSERT INTO jobs (id, task, status, examples, steps, seed, created) VALUES (?,?,'queued',?,?,?,?)",
                    (job, task, text, steps, seed, _now()),
                )
            except sqlite3.IntegrityError as error:
                raise TaskConflict(
                    f"a job for task {task!r} is under way; wait for it, or cancel it with DELETE /adapt/{{job}}",
                    field="task",
                ) from error
        return self.get(job)

    def get(self, job: str) -> Job:
        """Returns a job.

        Raises:
            JobNotFound: There is none with that id.
        """
        with self._database.open() as db:
            row = db.execute(f"SELECT {_COLUMNS} FROM jobs WHERE id = ?", (job,)).fetchone()
        if row is None:
            raise JobNotFound(f"there is no adaptation job {job[:40]!r}; GET /adapt lists them", field="job")
        return Job.model_validate(dict(row))

    def list(self, limit: int = 100) -> Sequence[Job]:
        """Returns the newest jobs, newest first."""
        with self._database.open() as db:
            rows = db.execute(f"SELECT {_COLUMNS} FROM jobs ORDER BY number DESC LIMIT ?", (limit,)).fetchall()
        return [Job.model_validate(dict(row)) for row in rows]

    def active(self, task: str) -> bool:
        """Whether a job for the task is queued or running."""
        with self._database.open() as db:
            query = "SELECT 1 FROM jobs WHERE task = ? AND status IN ('queued', 'running')"
            return db.execute(query, (task,)).fetchone() is not None

    def counts(self) -> dict[str, int]:
        """Number of jobs in each status."""
        with self._database.open() as db:
            return dict(db.execute("SELECT status, COUNT(*) FROM jobs GROUP BY status").fetchall())

    def time_spent(self) -> tuple[int, float]:
        """Number of jobs done, and the sum of their run times in seconds."""
        with self._database.open() as db:
            days = "SUM(julianday(finished) - julianday(started))"
            count, total = db.execute(f"SELECT COUNT(*), {days} FROM jobs WHERE status = 'done'").fetchone()
        return count, 86400 * (total or 0.0)

    def examples(self, job: str) -> Sequence[Example]:
        """Returns a running job's labelled examples.

        Raises:
            JobCancelled: It is not running any more, so they are not kept.
        """
        with self._database.open() as db:
            row = db.execute("SELECT examples FROM jobs WHERE id = ? AND status = 'running'", (job,)).fetchone()
        if row is None:
            raise JobCancelled(job)
        return _EXAMPLES.validate_json(row[0])

    def claim(self) -> Job | None:
        """Takes the oldest queued job up; None if there is none."""
        with self._database.transaction() as db:
            row = db.execute(
                "UPDATE jobs SET status = 'running', progress = 0, started = ? WHERE number = "
                f"(SELECT number FROM jobs WHERE status = 'queued' ORDER BY number LIMIT 1) RETURNING {_COLUMNS}",
                (_now(),),
            ).fetchone()
        return None if row is None else Job.model_validate(dict(row))

    def give_back(self) -> None:
        """Queues running jobs again, at a server's orderly end: nobody died on them."""
        with self._database.open() as db:
            db.execute(_AGAIN)

    def report(self, job: str, progress: float) -> None:
        """Writes a running job's progress, 0 to 1.

        Raises:
            JobCancelled: It is not running any more.
        """
        with self._database.open() as db:
            query = "UPDATE jobs SET progress = ? WHERE id = ? AND status = 'running'"
            if db.execute(query, (min(progress, _NEARLY), job)).rowcount == 0:
                raise JobCancelled(job)

    def complete(self, job: str, save: Callable[[], tuple[str, int]]) -> None:
        """Saves a job's result and marks it done; while it saves, the job cannot be cancelled.

        Saving may take as long as object storage does; the registry is not locked meanwhile.

        Args:
            job: The job.
            save: Saves, and returns the posterior's digest and version.

        Raises:
            JobCancelled: The job is not running any more; nothing was saved.
        """
        saving = "UPDATE jobs SET progress = ? WHERE id = ? AND status = 'running'"
        with self._database.open() as db:
            if db.execute(saving, (1.0, job)).rowcount == 0:
                raise JobCancelled(job)
        try:
            digest, version = save()
        except BaseException:
            with self._database.open() as db:
                db.execute(saving, (_NEARLY, job))
            raise
        with self._database.open() as db:
            db.execute(
                f"UPDATE jobs SET {_ENDS.format('done')}, progress = 1, digest = ?, version = ? WHERE id = ?",
                (_now(), digest, version, job),
            )

    def fail(self, job: str, error: str) -> None:
        """Marks a running job as failed."""
        with self._database.open() as db:
            db.execute(
                f"UPDATE jobs SET {_ENDS.format('failed')}, error = ? WHERE id = ? AND status = 'running'",
                (_now(), error, job),
            )

    def cancel(self, job: str) -> Job:
        """Cancels a job that is queued or running; one that is being saved, or has ended, stays as it is.

        Raises:
            JobNotFound: There is none with that id.
        """
        with self._database.open() as db:
            db.execute(
                f"UPDATE jobs SET {_ENDS.format('cancelled')} "
                "WHERE id = ? AND status IN ('queued', 'running') AND progress < 1",
                (_now(), job),
            )
        return self.get(job)

    def recover(self, job: str | None = None) -> None:
        """Queues running jobs of a worker that died again, or one job; those that saw ``ATTEMPTS`` workers die fail."""
        which, value = ("", ()) if job is None else (" AND id = ?", (job,))
        with self._database.transaction() as db:
            db.execute(f"UPDATE jobs SET attempts = attempts + 1 WHERE status = 'running'{which}", value)
            db.execute(
                f"UPDATE jobs SET {_ENDS.format('failed')}, error = ? "
                f"WHERE status = 'running' AND attempts >= ?{which}",
                (
                    _now(),
                    f"the adaptation process died {ATTEMPTS} times on this job; see the server's log",
                    ATTEMPTS,
                    *value,
                ),
            )
            db.execute(f"{_AGAIN}{which}", value)

    def recover_after_server(self) -> None:
        """Queues jobs again that a killed server had under way; those that saw ``SERVERS`` servers die fail.

        Examples that an earlier version of abmll left with jobs that have ended are removed.
        """
        with self._database.transaction() as db:
            db.execute(
                "INSERT INTO server_deaths SELECT number, 1 FROM jobs WHERE status = 'running' "
                "ON CONFLICT (job) DO UPDATE SET times = times + 1"
            )
            db.execute(
                f"UPDATE jobs SET {_ENDS.format('failed')}, error = ? WHERE status = 'running' "
                "AND number IN (SELECT job FROM server_deaths WHERE times >= ?)",
                (
                    _now(),
                    f"the server was killed {SERVERS} times while this job was under way, which may take more memory "
                    "than there is; see what ended the server, then teach it again",
                    SERVERS,
                ),
            )
            db.execute(_AGAIN)
            db.execute("UPDATE jobs SET examples = '[]' WHERE finished IS NOT NULL AND examples != '[]'")
            db.execute("DELETE FROM server_deaths WHERE job IN (SELECT number FROM jobs WHERE finished IS NOT NULL)")
