"""How long a request waited in an engine's queue, told from the engine to whoever asked it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

_T = TypeVar("_T")


@dataclass
class Clock:
    """Times of one request, in seconds.

    Attributes:
        queued: Time that its questions waited for the engine: for their turn, and in its own queue.
        engine: Time spent on the engine, waiting included.
    """

    queued: float = 0.0
    engine: float = 0.0


_CURRENT: ContextVar[Clock | None] = ContextVar("abmll_clock", default=None)


def start_clock() -> Clock:
    """Begins a request's clock in the task at hand; engines that it calls find it."""
    clock = Clock()
    _CURRENT.set(clock)
    return clock


def current_clock() -> Clock | None:
    """The clock of the request at hand; None outside of one."""
    return _CURRENT.get()


async def together(asked: Iterable[Coroutine[Any, Any, _T]]) -> list[_T]:
    """Awaits several questions of one request at once; the longest of their waits is the request's.

    One that fails, or the request's end, ends the others.
    """
    clock, clocks = current_clock(), list[Clock]()

    async def one(question: Coroutine[Any, Any, _T]) -> _T:
        clocks.append(start_clock())  # in a task of its own, hence seen by this question alone
        return await question

    tasks = [asyncio.ensure_future(one(question)) for question in asked]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        if clock is not None:
            clock.queued += max((each.queued for each in clocks), default=0.0)


class EngineTime:
    """Adds the time within a ``with`` block to a clock's ``engine``."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.begun = 0.0

    def __enter__(self) -> None:
        self.begun = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.clock.engine += time.perf_counter() - self.begun
