"""Several processes that hold one model together, a part of its weights each, and run every pass together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Together(Protocol):
    """What the objective asks of such processes; all of them call it at the same point."""

    def part(self, rows: int) -> tuple[list[int], float]:
        """Returns the rows of a pass that this process runs, at least one, and what their loss counts for, 1 or 0."""
        ...

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replaces tensors by their sums over all processes, the same in each of them."""
        ...
