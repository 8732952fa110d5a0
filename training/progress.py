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


class _Pace:
    """Steps a second, or pieces of work where no step is told and there are several."""

    def __init__(self, total: float) -> None:
        self.total = total
        self.begin: tuple[float, float] | None = None

    def __call__(self, done: float, values: Mapping[str, float]) -> str:
        count = values.get("step", done)
        if "step" not in values and self.total <= 1:
            return ""
        now = time.monotonic()
        if self.begin is None:  # work that goes on does not begin at 0
            self.begin = (now, count)
        seconds, since = now - self.begin[0], count - self.begin[1]
        unit = "steps/s" if "step" in values else "/s"
        return f"{since / seconds:.3g} {unit}  " if seconds > 0 and since > 0 else ""


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
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    pace = _Pace(total)
    with RichProgress(*columns, console=Console(stderr=True)) as rich:
        handle = rich.add_task(name, total=total, note="")

        class _Rich:
            def update(self, done: float, values: Mapping[str, float]) -> None:
                rich.update(handle, completed=done, note=f"{pace(done, values)}{_figures(values)}")

        yield _Rich()
