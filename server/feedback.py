"""Answers given and what was said of them: stored, and measured per version of a task."""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from sqlite3 import Connection, Row

import numpy as np
import torch
from torch import Tensor

from abmll.curves import Curves, curves
from abmll.errors import AnswerNotFound, InvalidRequest, StoreFailure
from abmll.metrics import brier, expected_calibration_error, negative_log_likelihood
from server.database import Database

logger = logging.getLogger(__name__)

# Answers and judgements that the rolling measures look back on.
WINDOW = 1000
# A version's first answers, which later ones are compared with. The mean over validation tasks would not do: there is
# no telling a task that has changed from one with other numbers of options, or one that is easier.
FIRST = 200
# Answers that wait for a disk that takes nothing; older ones are given up.
_BUFFERED = 20_000
# Seconds after which no answer is under way any more.
_LONGEST_ANSWER = 3600.0
_SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
  number INTEGER PRIMARY KEY AUTOINCREMENT, request_id TEXT UNIQUE NOT NULL, task TEXT NOT NULL,
  version INTEGER NOT NULL, options TEXT, draws INTEGER NOT NULL, scores BLOB, standard INTEGER NOT NULL,
  answer INTEGER, probabilities TEXT, confidence REAL NOT NULL, epistemic REAL NOT NULL, created TEXT NOT NULL,
  correct INTEGER, label INTEGER, judged TEXT, posterior TEXT
);
CREATE INDEX IF NOT EXISTS by_version ON answers(task, version, number);
"""
_INSERT = """
INSERT OR IGNORE INTO answers (request_id, task, version, options, draws, scores, standard, answer, probabilities,
confidence, epistemic, created, posterior) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""
# Earlier versions of abmll did not write which posterior answered: that is taken for the present one.
_BY = "(posterior IS NULL OR posterior IS ?)"


@dataclass(frozen=True)
class Answered:
    """An answer as it was given; the question itself is not kept.

    Attributes:
        request_id: The request's id.
        task: The task that was asked.
        version: Its version that answered.
        posterior: ``StoredPosterior.answering`` of it.
        options: The options; None for free text.
        scores: Log-probabilities of the options in nats, shape (draws, options); None for free text.
        standard: Whether options were scored as the posterior was trained; of free text, whether it was calibrated.
        draws: Draws used.
        answer: Index of the answer in the options; None for free text, or where none was given.
        probabilities: Of the options, as they were told; None for free text.
        confidence: As it was told.
        epistemic: Epistemic uncertainty in nats, as it was told.
        begun: When the question came, in seconds of ``time.monotonic``.
    """

    request_id: str
    task: str
    version: int
    posterior: str
    options: Sequence[str] | None
    scores: Tensor | None
    standard: bool
    draws: int
    answer: int | None
    probabilities: Sequence[float] | None
    confidence: float
    epistemic: float
    begun: float

    def row(self) -> tuple[object, ...]:
        """The answer as a row of the table."""
        scores = None if self.scores is None else self.scores.float().numpy().tobytes()
        options = None if self.options is None else json.dumps(self.options)
        probabilities = None if self.probabilities is None else json.dumps(self.probabilities)
        created = datetime.now(UTC).isoformat(timespec="milliseconds")
        return (self.request_id, self.task, self.version, options, self.draws, scores, self.standard, self.answer,
                probabilities, self.confidence, self.epistemic, created, self.posterior)  # fmt: skip


@dataclass(frozen=True)
class Judged:
    """What was said of an answer.

    Attributes:
        task: The task that was asked.
        version: Its version that answered.
        posterior: ``StoredPosterior.answering`` of it; None where it is not known.
        confidence: As it was told.
        correct: Whether the answer was right.
        label: The right option, where it is known.
        brier: Squared distance of the probabilities to the right option, 0 to 2; None where it is not known.
        nll: -log probability of the right option, in nats; None where it is not known.
    """

    task: str
    version: int
    posterior: str | None
    confidence: float
    correct: bool
    label: int | None
    brier: float | None
    nll: float | None


@dataclass
class Window:
    """The first and the newest answers with options of one version of a task; and judgements, of texts too.

    Of free texts those that were calibrated are counted. ``first`` has the confidence and epistemic uncertainty of the
    oldest answers that are kept; ``posterior`` is what answered, None where it is not known.
    """

    posterior: str | None = None
    confidence: deque[float] = field(default_factory=lambda: deque[float](maxlen=WINDOW))
    epistemic: deque[float] = field(default_factory=lambda: deque[float](maxlen=WINDOW))
    judged: OrderedDict[str, Judged] = field(default_factory=OrderedDict[str, Judged])
    first: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])

    def is_of(self, posterior: str | None) -> bool:
        """Whether that posterior may have given these answers."""
        return None in (self.posterior, posterior) or self.posterior == posterior

    def copy(self) -> Window:
        """Returns the same, which later answers do not enter."""
        return Window(
            self.posterior, self.confidence.copy(), self.epistemic.copy(), self.judged.copy(), self.first.copy()
        )

    def add(self, confidence: float, epistemic: float) -> None:
        """Adds an answer with options."""
        if len(self.first) < FIRST:
            self.first.append((confidence, epistemic))
        self.confidence.append(confidence)
        self.epistemic.append(epistemic)

    def judge(self, request_id: str, judged: Judged) -> None:
        """Adds a judgement, or replaces it."""
        self.judged.pop(request_id, None)
        self.judged[request_id] = judged
        while len(self.judged) > WINDOW:
            self.judged.popitem(last=False)

    def told(self) -> dict[str, float]:
        """Measures of the judged, and of the newest answers judged or not, by the names of their metrics.

        Drift is told once there are enough first answers to compare with.
        """
        told = {f"feedback_{name}": value for name, value in self.measures().items()}
        if self.confidence:
            told["recent_count"] = float(len(self.confidence))
            told["recent_confidence"] = math.fsum(self.confidence) / len(self.confidence)
            told["recent_epistemic_nats"] = math.fsum(self.epistemic) / len(self.epistemic)
        if len(self.first) == FIRST:
            confidence, epistemic = (math.fsum(values) / FIRST for values in zip(*self.first, strict=True))
            told["confidence_drift"] = told["recent_confidence"] - confidence
            told["epistemic_drift_nats"] = told["recent_epistemic_nats"] - epistemic
        return told

    def measures(self) -> dict[str, float]:
        """Accuracy, ECE (15 bins), Brier score and NLL of the judged, as far as they are known; their number."""
        found = list(self.judged.values())
        told = {"count": float(len(found))}
        if found:
            correct = torch.tensor([item.correct for item in found])
            confidence = torch.tensor([item.confidence for item in found])
            told |= {"accuracy": correct.double().mean().item()}
            told |= {"ece": expected_calibration_error(confidence, correct)}
            for name in ("brier", "nll"):
                values = [value for item in found if (value := getattr(item, name)) is not None]
                if values:
                    told[name] = sum(values) / len(values)
        return told


class Feedback:
    """Answers and judgements in a file, and their rolling measures.

    Answers are written a second later, many at once: what a killed server had not written yet cannot be judged. A
    judgement that was acknowledged has reached the disk.

    Args:
        path: The file.
        kept: Newest answers that can be judged.

    Raises:
        AbmllError: The file is damaged, or cannot be made.
    """

    def __init__(self, path: Path, kept: int) -> None:
        self.kept = kept
        self._database = Database(path, _SCHEMA, "answers and feedback")
        self._add_posterior()
        self._lock = threading.Lock()
        # Held while the file is written: what is forgotten must not be written by a thread that began before.
        self._writing = threading.Lock()
        self._waiting: deque[Answered] = deque(maxlen=_BUFFERED)
        self._windows: dict[tuple[str, int], Window] = {}
        # By task and version; None for all versions.
        self._forgotten: dict[tuple[str, int | None], float] = {}
        self._to_delete: set[tuple[str, int | None]] = set()

    def _add_posterior(self) -> None:
        """Adds the column to a file of an earlier version."""
        try:
            with self._database.transaction() as db:
                if "posterior" not in {column["name"] for column in db.execute("PRAGMA table_info(answers)")}:
                    db.execute("ALTER TABLE answers ADD COLUMN posterior TEXT")
        except StoreFailure as error:
            logger.warning("answers cannot be written until this is mended: %s", error.message)

    def load(self, tasks: Collection[str], has: Callable[[str, int], bool] = lambda task, version: True) -> None:
        """Reads the rolling measures' windows, as they were when the server stopped.

        Args:
            tasks: All that there are: of others, deleted just before a crash, nothing is kept.
            has: Says whether such a task has such a version; of others nothing is kept either.

        Raises:
            StoreFailure: The disk is full or not writable, or the file is damaged.
        """
        windows: dict[tuple[str, int], Window] = {}
        with self._writing, self._database.open() as db:
            versions = db.execute("SELECT DISTINCT task, version FROM answers").fetchall()
            for task, version in versions:
                if task not in tasks or not has(task, version):
                    db.execute("DELETE FROM answers WHERE task = ? AND version = ?", (task, version))
                    continue
                newest = "SELECT * FROM answers WHERE task = ? AND version = ? AND {} ORDER BY number DESC LIMIT {}"
                last = db.execute(newest.format("1", 1), (task, version)).fetchone()["posterior"]
                window = windows[task, version] = Window(last)
                of_it = task, version, last
                answered = f"{_BY} AND options IS NOT NULL"
                for row in reversed(db.execute(newest.format(answered, WINDOW), of_it).fetchall()):
                    window.confidence.append(row["confidence"])
                    window.epistemic.append(row["epistemic"])
                oldest = (
                    f"SELECT confidence, epistemic FROM answers WHERE task = ? AND version = ? AND {answered} "
                    "ORDER BY number LIMIT ?"
                )
                window.first = [(row["confidence"], row["epistemic"]) for row in db.execute(oldest, (*of_it, FIRST))]
                counted = f"{_BY} AND judged IS NOT NULL AND (options IS NOT NULL OR standard)"
                for row in reversed(db.execute(newest.format(counted, WINDOW), of_it).fetchall()):
                    window.judge(row["request_id"], _judged(row, bool(row["correct"]), row["label"]))
        with self._lock:
            for key, newer in self._windows.items():  # answers that came meanwhile
                window = windows.get(key)
                if window is None or not window.is_of(newer.posterior):
                    windows[key] = newer
                    continue
                window.posterior = newer.posterior
                for confidence, epistemic in zip(newer.confidence, newer.epistemic, strict=True):
                    window.add(confidence, epistemic)
                for request_id, judged in newer.judged.items():
                    window.judge(request_id, judged)
            self._windows = windows

    def note(self, answered: Answered) -> None:
        """Keeps an answer, to be written soon; not one of a task that was deleted after the question came."""
        with self._lock:
            if answered.begun < self._forgotten_at(answered.task, answered.version):
                return
            self._waiting.append(answered)
            if answered.options is not None:
                window = self._window(answered.task, answered.version)
                if not window.is_of(answered.posterior):  # another task had the name, or another global posterior
                    window = self._windows[answered.task, answered.version] = Window()
                window.posterior = answered.posterior
                window.add(answered.confidence, answered.epistemic)

    def flush(self) -> None:
        """Writes the answers that wait.

        Raises:
            StoreFailure: The disk is full or not writable; they wait on.
        """
        with self._writing:
            with self._lock:
                batch, gone = list(self._waiting), set(self._to_delete)
            if not batch and not gone:
                return
            with self._database.transaction() as db:
                db.executemany("DELETE FROM answers WHERE task = ?1 AND (?2 IS NULL OR version = ?2)", gone)
                db.executemany(_INSERT, [answered.row() for answered in batch])
                db.execute("DELETE FROM answers WHERE number <= (SELECT MAX(number) FROM answers) - ?", (self.kept,))
            with self._lock:
                written = {answered.request_id for answered in batch}
                self._waiting = deque((a for a in self._waiting if a.request_id not in written), maxlen=_BUFFERED)
                self._to_delete -= gone

    def judge(self, request_id: str, answer: str | int | None, correct: bool | None) -> Judged:
        """Stores what is said of an answer; saying it again replaces it.

        Args:
            request_id: The request's id.
            answer: The right option: its text, or its index. None if ``correct`` is given.
            correct: Whether the answer was right. None if ``answer`` is given.

        Raises:
            AnswerNotFound: No such answer is kept.
            InvalidRequest: Neither or both are given, or the right answer is not among the options.
            StoreFailure: The disk is full or not writable; nothing is stored.
        """
        if (answer is None) == (correct is None):
            raise InvalidRequest("give either answer, the right one, or correct, true or false", field="answer")
        self.flush()
        begun = time.monotonic()
        with self._database.transaction() as db:
            row = _find(db, request_id)
            withheld = row["options"] is not None and row["answer"] is None
            if withheld and answer is None:
                raise InvalidRequest("no answer was given to this question; say which option is right", field="correct")
            label = None if answer is None else _label(row, answer)
            right = bool(correct) if answer is None else label == _likeliest(row)
            # Of more than two, a no does not say which is right: to know only the yeses would be a biased sample.
            if label is None and row["options"] is not None and len(json.loads(row["options"])) == 2:
                label = row["answer"] if right else 1 - row["answer"]
            db.execute(
                "UPDATE answers SET correct = ?, label = ?, judged = ? WHERE number = ?",
                (right, label, datetime.now(UTC).isoformat(timespec="milliseconds"), row["number"]),
            )
        judged = _judged(row, right, label)
        # A text's confidence is a probability where it is calibrated alone.
        if row["options"] is not None or row["standard"]:
            with self._lock:
                window = self._window(judged.task, judged.version)
                if begun >= self._forgotten_at(judged.task, judged.version) and window.is_of(judged.posterior):
                    window.judge(request_id, judged)
        return judged

    def labelled(self, task: str, version: int, posterior: str) -> list[tuple[Tensor, int]]:
        """Scores, shape (draws, options), and the right option of a version's newest judged answers.

        ``posterior`` is ``StoredPosterior.answering`` of the version.
        Only of those whose options were scored as the posterior was trained.
        """
        self.flush()
        query = (
            f"SELECT draws, scores, label FROM answers WHERE task = ? AND version = ? AND {_BY} AND label IS NOT NULL "
            f"AND standard AND scores IS NOT NULL ORDER BY number DESC LIMIT {2 * WINDOW}"
        )
        with self._database.open() as db:
            rows = db.execute(query, (task, version, posterior)).fetchall()
        return [
            (torch.from_numpy(np.frombuffer(scores, dtype=np.float32).copy().reshape(draws, -1)), label)
            for draws, scores, label in rows
        ]

    def forget(self, task: str, before: float, version: int | None = None) -> None:
        """Removes all that is kept of a task, or of one version, from the disk as soon as it takes it.

        Answers that are still under way are not kept either: another task may soon have the name.

        Args:
            task: The task.
            before: When it was deleted, in seconds of ``time.monotonic``.
            version: The version; None for all.
        """

        def is_gone(of: str, number: int) -> bool:
            return of == task and version in (None, number)

        with self._writing, self._lock:
            self._waiting = deque((a for a in self._waiting if not is_gone(a.task, a.version)), maxlen=_BUFFERED)
            self._windows = {key: window for key, window in self._windows.items() if not is_gone(*key)}
            still = time.monotonic() - _LONGEST_ANSWER
            self._forgotten = {name: when for name, when in self._forgotten.items() if when > still}
            self._forgotten[task, version] = before
            self._to_delete.add((task, version))
        try:
            self.flush()
        except StoreFailure as error:
            logger.warning("answers of the deleted task %r are not removed from the disk yet: %s", task, error.message)

    def windows(self) -> list[tuple[str, int, dict[str, float]]]:
        """Task, version and rolling measures of each version that has answered."""
        with self._lock:  # copied, so that no answer waits for the sums
            windows = {key: window.copy() for key, window in self._windows.items()}
        return [(task, version, window.told()) for (task, version), window in windows.items()]

    def answering(self) -> dict[tuple[str, int], str | None]:
        """``StoredPosterior.answering`` of each version that has answered, as far as it is known."""
        with self._lock:
            return {key: window.posterior for key, window in self._windows.items()}

    def curves(self, task: str, version: int, posterior: str) -> Curves | None:
        """Reliability and risk-coverage of a version's newest judged answers; None where none was judged.

        ``posterior`` is ``StoredPosterior.answering`` of the version.
        """
        with self._lock:
            window = self._windows.get((task, version))
            found = [] if window is None or not window.is_of(posterior) else list(window.judged.values())
        if not found:
            return None
        return curves(torch.tensor([item.confidence for item in found]), torch.tensor([item.correct for item in found]))

    def _forgotten_at(self, task: str, version: int) -> float:
        return max(self._forgotten.get((task, of), -math.inf) for of in (None, version))

    def _window(self, task: str, version: int) -> Window:
        return self._windows.setdefault((task, version), Window())


def _find(db: Connection, request_id: str) -> Row:
    row = db.execute("SELECT * FROM answers WHERE request_id = ?", (request_id,)).fetchone()
    if row is None:
        raise AnswerNotFound(
            f"no answer {request_id[:40]!r} is kept; request_id is in the reply to POST /generate or /score",
            "request_id",
        )
    return row


def _likeliest(row: Row) -> int | None:
    """The likeliest option, whether it was given as the answer or withheld; None for free text."""
    if row["probabilities"] is None:
        return None
    probabilities: list[float] = json.loads(row["probabilities"])
    return max(range(len(probabilities)), key=probabilities.__getitem__)


def _label(row: Row, answer: str | int) -> int:
    if row["options"] is None:
        raise InvalidRequest("a free-text answer is judged by correct: true or false", field="answer")
    options: list[str] = json.loads(row["options"])
    if isinstance(answer, str) and answer in options:
        return options.index(answer)
    if isinstance(answer, int) and 0 <= answer < len(options):
        return answer
    raise InvalidRequest(f"answer is not among the {len(options)} options that were asked", field="answer")


def _judged(row: Row, correct: bool, label: int | None) -> Judged:
    squared = nll = None
    if label is not None and row["probabilities"] is not None:
        told, right = torch.tensor([json.loads(row["probabilities"])], dtype=torch.float64), torch.tensor([label])
        squared, nll = brier(told, right), negative_log_likelihood(told, right)
    return Judged(row["task"], row["version"], row["posterior"], row["confidence"], correct, label, squared, nll)
