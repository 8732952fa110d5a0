"""How long a request waited in an engine's queue, told from the engine to whoever asked it."""

from __future__ import annotations

import time
from contextvars import ContextVar
from dataclasses import dataclass


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


class EngineTime:
    """Adds the time within a ``with`` block to a clock's ``engine``."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.begun = 0.0

    def __enter__(self) -> None:
        self.begun = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.clock.engine += time.perf_counter() - self.begun
