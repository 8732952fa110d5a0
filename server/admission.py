"""Who may ask the engine now: a bounded queue before it, fair between tasks."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from abmll.errors import Overloaded
from server.clock import current_clock
from server.tracing import stage

# Weight of the newest question in the running mean of how long one holds its place.
_RECENT = 0.05


class Admission:
    """Lets a number of questions into the engine at a time; the others wait, up to a limit.

    A place that falls free goes to the waiting task that has the fewest questions in the engine (max-min
    fair share), and among equals to the one that has waited longest for its turn. Past the limit, the task
    with the most waiting questions gives up its newest, as in McKenney's stochastic fairness queueing
    (INFOCOM 1990): a busy task is refused before a quiet one.

    Args:
        places: Questions in the engine at a time.
        limit: Questions that may wait.

    Attributes:
        refused: Questions refused since the start.
    """

    def __init__(self, places: int, limit: int) -> None:
        self.places, self.limit = places, limit
        self.refused = 0
        self._inside: Counter[str] = Counter()
        self._queues: dict[str, deque[asyncio.Future[None]]] = {}
        self._waiting = 0
        self._held = 0.1  # seconds that a question holds its place

    @property
    def waiting(self) -> int:
        """Questions that wait for a place."""
        return self._waiting

    @property
    def inside(self) -> int:
        """Questions in the engine."""
        return self._inside.total()

    @asynccontextmanager
    async def admitted(self, task: str) -> AsyncGenerator[None]:
        """Waits for a place, and holds it while the context lasts; the wait counts as the clock's queue.

        Args:
            task: The task that is asked.

        Raises:
            Overloaded: Too many questions wait.
        """
        begun = time.perf_counter()
        with stage("queue"):
            await self._enter(task)
        entered = time.perf_counter()
        clock = current_clock()
        if clock is not None:
            clock.queued += entered - begun
        try:
            with stage("engine"):
                yield
        finally:
            self._held += _RECENT * (time.perf_counter() - entered - self._held)
            self._leave(task)

    async def _enter(self, task: str) -> None:
        if self.inside < self.places:  # then nobody waits
            self._inside[task] += 1
            return
        if self._waiting >= self.limit:
            self._make_room(task)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queues.setdefault(task, deque()).append(turn)
        self._waiting += 1
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self._leave(task)  # its turn came as its client went away
            elif task in self._queues and turn in self._queues[task]:
                self._take(task, turn)
            raise

    def _make_room(self, task: str) -> None:
        busiest = max(self._queues, key=lambda name: len(self._queues[name]), default=task)
        if len(self._queues.get(busiest, ())) <= len(self._queues.get(task, ())) + 1:
            self.refused += 1
            raise self._overloaded()
        newest = self._queues[busiest][-1]
        self._take(busiest, newest)
        if not newest.done():  # else its client has just gone away
            self.refused += 1
            newest.set_exception(self._overloaded())

    def _overloaded(self) -> Overloaded:
        seconds = max(1, math.ceil(self._held * (self._waiting + self.inside) / self.places))
        return Overloaded(
            f"{self._waiting} questions wait already; ask again in {seconds} s, or ask fewer at a time",
            retry_after=seconds,
        )

    def _take(self, task: str, turn: asyncio.Future[None]) -> None:
        self._queues[task].remove(turn)
        self._waiting -= 1
        if not self._queues[task]:
            del self._queues[task]

    def _leave(self, task: str) -> None:
        self._inside[task] -= 1
        if not self._inside[task]:
            del self._inside[task]
        if task in self._queues:  # it has just been served: its turn comes after those of the others
            self._queues[task] = self._queues.pop(task)
        while self._queues:
            chosen = min(self._queues, key=lambda name: self._inside[name])
            turn = self._queues[chosen][0]
            self._take(chosen, turn)
            if chosen in self._queues:  # to the end of the round
                self._queues[chosen] = self._queues.pop(chosen)
            if not turn.done():  # else its client has just gone away
                self._inside[chosen] += 1
                turn.set_result(None)
                return
