"""Questions in the torch engine's queue, and what may share a pass of the model."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from abmll.sampling import Sampling
from abmll.scoring import Question
from server.clock import Clock
from server.engine import Served, Tell

# Keys and values of so many kept tokens take about as much of a pass as one token that is read.
KEPT = 8


@dataclass(frozen=True)
class Kind:
    """What may share a pass: the same work under the same draws of the same posterior."""

    work: str
    key: str
    draws: tuple[int, ...] = ()
    seed: int = 0
    sampling: Sampling | None = None
    others: int = 0
    beginning: tuple[int, ...] = ()

    @property
    def new_tokens(self) -> int:
        """The most tokens that are decoded."""
        return 0 if self.sampling is None else self.sampling.max_tokens


@dataclass
class Item:
    """A question in the queue."""

    kind: Kind
    served: Served
    question: Question
    result: asyncio.Future[Any]
    clock: Clock | None
    tell: Tell | None = None
    arrived: float = field(default_factory=time.perf_counter)


def teller(batch: Sequence[Item]) -> Callable[[int, int, float], None] | None:
    """Tells those of a batch who want to know of each token as it comes, in their event loop; None if nobody does."""
    if all(item.tell is None for item in batch):
        return None

    def tell(row: int, token: int, log_prob: float) -> None:
        item = batch[row]
        if item.tell is not None:
            item.result.get_loop().call_soon_threadsafe(item.tell, token, log_prob)

    return tell


def row_tokens(question: Question, kind: Kind) -> int:
    """Tokens of a question's row, as packed; those that are kept count for what they take of memory."""
    kept = len(kind.beginning)
    return question.packed - kept + kept // KEPT
