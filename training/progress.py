"""Progress of long work: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Bar(Protocol):
    """Takes what has been done so far."""

    def update(self, done: float, values: Mapping[str, float]) -> None:
        """Reports ``done`` out of the total, with the figures that matter now."""
        ...


class Progress(Protocol):
    """Opens a bar for a named piece of work."""

    def __call__(self, name: str, total: float) -> AbstractContextManager[Bar]:
        """Returns a context that shows the work while it lasts."""
        ...


def _figures(values: Mapping[str, float]) -> str:
    return "  ".join(f"{key} {value:.4g}" for key, value in values.items())


class _Silent:
    def update(self, done: float, values: Mapping[str, float]) -> None:
        pass


@contextmanager
def silent(name: str, total: float) -> Generator[Bar, None, None]:
    """Shows nothing."""
    yield _Silent()


class _Lines:
    """A line on stderr at most every ``every`` seconds, for logs."""

    def __init__(self, name: str, total: float, every: float = 15.0) -> None:
        self.name, self.total, self.every, self.last = name, total, every, 0.0

    def update(self, done: float, values: Mapping[str, float]) -> None:
        now = time.monotonic()
        if now - self.last < self.every and done < self.total:
            return
        self.last = now
        print(f"{self.name} {100 * done / self.total:5.1f}%  {_figures(values)}", file=sys.stderr, flush=True)


@contextmanager
def track(name: str, total: float) -> Generator[Bar, None, None]:
    """Shows a bar with rate and time left on a terminal, or a line now and then in a log."""
    if not sys.stderr.isatty():
        yield _Lines(name, total)
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
    with RichProgress(*columns, console=Console(stderr=True)) as rich:
        handle = rich.add_task(name, total=total, note="")

        class _Rich:
            def update(self, done: float, values: Mapping[str, float]) -> None:
                rich.update(handle, completed=done, note=_figures(values))

        yield _Rich()
