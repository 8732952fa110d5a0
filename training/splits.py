"""Splits of tasks by family: made once with a seed, written down, and read by everything after."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from abmll.errors import AbmllError
from training.tasks import Task

Part = Literal["train", "validation", "test"]


class Split(BaseModel, frozen=True):
    """Which family belongs to which part.

    Attributes:
        seed: The seed that the split was drawn with.
        families: Family name to part.
    """

    seed: int
    families: dict[str, Part]

    def select(self, tasks: Sequence[Task], part: Part) -> list[Task]:
        """Returns the tasks whose family is in ``part``.

        Raises:
            AbmllError: A task's family is not in the split.
        """
        unknown = sorted({task.family for task in tasks} - self.families.keys())
        if unknown:
            raise AbmllError(
                f"the split does not know the family {unknown[0]!r}: is the tasks' folder the one with the "
                "manifest.json that names the families? Else give a split of these tasks (--split), or take all of "
                "them where the command can (--part all)",
                field="split",
            )
        return [task for task in tasks if self.families[task.family] == part]


def split_families(
    tasks: Sequence[Task],
    seed: int,
    *,
    validation: float = 0.2,
    test: float = 0.2,
    pinned: Mapping[str, Part] | None = None,
) -> Split:
    """Draws a split by family, spreading each category's families over the parts.

    Args:
        tasks: All tasks.
        seed: Seed of the draw.
        validation: Share of families for validation.
        test: Share of families for test.
        pinned: Families (exact name) whose part is given.

    Returns:
        The split. Pinned families count towards the shares.

    Raises:
        AbmllError: A pinned family does not exist, or the shares leave nothing to train on.
    """
    if validation < 0 or test < 0 or validation + test >= 1:
        raise AbmllError("validation and test shares must be at least 0 and sum to less than 1", field="split")
    pinned = dict(pinned or {})
    categories = {task.family: task.category for task in tasks}
    absent = sorted(pinned.keys() - categories.keys())
    if absent:
        raise AbmllError(f"no task has the pinned family {absent[0]!r}; families: {sorted(categories)}", field="pin")
    families: dict[str, Part] = dict(pinned)
    free = sorted(family for family in categories if family not in pinned)
    rng = random.Random(seed)
    rng.shuffle(free)
    free.sort(key=lambda family: categories[family])
    pins = list(pinned.values())
    to_validate = max(0.0, validation * len(categories) - pins.count("validation"))
    to_hold_out = to_validate + max(0.0, test * len(categories) - pins.count("test"))
    held_out = _evenly(free, min(to_hold_out, len(free) - 1), rng)  # one at least is left to train on
    validating = set(_evenly(held_out, to_validate, rng))
    for family in free:
        families[family] = "validation" if family in validating else "test" if family in held_out else "train"
    spare = [family for family in free if families[family] == "train"]
    if validation and "validation" not in families.values() and len(spare) > 1:
        families[rng.choice(spare)] = "validation"  # else there is nothing to calibrate on
    return Split(seed=seed, families=dict(sorted(families.items())))


def _evenly(families: Sequence[str], count: float, rng: random.Random) -> list[str]:
    """Takes families at even steps from a random one on, so that neighbours, those of a category, are spread."""
    step, begin = (count / len(families) if families else 0.0), rng.random()
    return [family for at, family in enumerate(families) if int((at + 1) * step + begin) > int(at * step + begin)]


def write_split(split: Split, path: Path) -> None:
    """Writes a split as JSON."""
    path.write_text(split.model_dump_json(indent=1) + "\n", encoding="utf-8")


def read_split(path: Path) -> Split:
    """Reads a split.

    Raises:
        AbmllError: The file is missing or not a split.
    """
    try:
        return Split.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:  # pydantic's and JSON's errors are ValueErrors
        raise AbmllError(f"{path} is not a split file: {error}", field="split") from error
