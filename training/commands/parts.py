"""Which tasks a command works on: the split, made or read, and its parts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from abmll.store import StoredPosterior
    from training.splits import Split
    from training.tasks import Task

PARTS: dict[str, tuple[Literal["train", "validation", "test"], ...]] = {
    "train": ("train",),
    "validation": ("validation",),
    "test": ("test",),
    "held-out": ("validation", "test"),
}


def chosen_split(tasks: list[Task], path: Path | None, seed: int, pins: list[str] | None, target: Path) -> Split:
    """Reads the split of the tasks' families, or makes it; writes it beside what is made from it.

    Args:
        tasks: The tasks.
        path: Split file; made where it is None or absent.
        seed: Seed of a split that is made.
        pins: FAMILY=PART each, for one that is made.
        target: Where to write it.

    Raises:
        AbmllError: A pin is malformed, or the file is.
    """
    from typing import get_args

    from abmll.errors import AbmllError
    from training.splits import Part, read_split, split_families, write_split

    if path is not None and path.is_file():
        split = read_split(path)
    else:
        pinned: dict[str, Part] = {}
        for pin in pins or []:
            family, _, part = pin.rpartition("=")
            if not family or part not in get_args(Part):
                raise AbmllError(f"--pin {pin!r} must be FAMILY=train, =validation or =test", field="pin")
            pinned[family] = part  # pyright: ignore[reportArgumentType] -- checked above
        split = split_families(tasks, seed, pinned=pinned)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_split(split, target)
    return split


def tasks_of_part(loaded: list[Task], split: Path | None, part: str, stored: StoredPosterior) -> list[Task]:
    """Returns the tasks of a part of the split; all of them for the part ``all``.

    Raises:
        AbmllError: There is no split or no such part, or no task belongs to it.
    """
    from abmll.errors import AbmllError
    from training.splits import Split, read_split

    if part != "all":
        own = stored.record.training.get("split")
        if split is None and own is None:
            raise AbmllError("the posterior carries no split; give --split FILE or --part all", field="split")
        chosen = read_split(split) if split is not None else Split.model_validate(own)
        parts = PARTS.get(part)
        if parts is None:
            raise AbmllError(f"--part {part!r} must be train, validation, test, held-out or all", field="part")
        loaded = [task for name in parts for task in chosen.select(loaded, name)]
    if not loaded:
        raise AbmllError(f"no task belongs to the part {part!r}", field="part")
    return loaded
