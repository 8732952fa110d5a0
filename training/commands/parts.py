"""Which tasks a command works on: the split, made or read, and its parts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from abmll.examples import Template
    from abmll.store import StoredPosterior
    from training.adaptation import AdaptConfig
    from training.base_model import BaseModel
    from training.evaluation import EvalConfig
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
        path: Split file; made where it is None.
        seed: Seed of a split that is made.
        pins: FAMILY=PART each, for one that is made.
        target: Where to write it.

    Raises:
        AbmllError: A pin is malformed, or the file is or is missing, or pins are given beside it.
    """
    from typing import get_args

    from abmll.errors import AbmllError
    from training.splits import Part, read_split, split_families, write_split

    if path is not None:
        if pins:
            raise AbmllError("--pin holds for a split that is made; leave it out, or --split", field="pin")
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


def within_context(base: BaseModel, template: Template, tasks: Sequence[Task], main: bool = True) -> list[Task]:
    """Returns the tasks without the items that the model cannot read whole; the main process tells of them.

    Raises:
        AbmllError: No item is left.
    """
    from dataclasses import replace

    from abmll.errors import AbmllError
    from training.episodes import fits

    kept: list[Task] = []
    for task in tasks:
        fitting = [fits(base, template, example) for example in task.examples]
        count = fitting.count(False)
        if count and main:
            typer.echo(
                f"abmll: task {task.name}: {count} of {len(fitting)} items left out, the first is number "
                f"{fitting.index(False) + 1}: longer than the {base.context} tokens that the model reads",
                err=True,
            )
        examples = tuple(example for example, whole in zip(task.examples, fitting, strict=True) if whole)
        if examples:
            kept.append(replace(task, examples=examples) if count else task)
    if tasks and not kept:
        raise AbmllError(f"no item fits into the {base.context} tokens that the model reads", field="tasks")
    return kept


def tell_of_small(tasks: Sequence[Task], shots: Sequence[int], main: bool = True) -> None:
    """Has the main process tell which numbers of shots some tasks have too few examples for.

    Raises:
        AbmllError: No task has enough for any of the numbers.
    """
    from abmll.errors import AbmllError
    from training.evaluation import has_enough

    if not any(has_enough(task, min(shots)) for task in tasks):
        most = max(len(task.examples) for task in tasks)
        raise AbmllError(
            f"no task has examples enough for {min(shots)} shots: the largest has {most}, of which half are asked; "
            f"give at most {most // 2} shots",
            field="shots",
        )
    for count in shots:
        small = [task for task in tasks if not has_enough(task, count)]
        if small and main:
            typer.echo(
                f"abmll: {count} shots: {len(small)} of {len(tasks)} tasks left out, the first is {small[0].name}: "
                f"with fewer than {2 * count} items",
                err=True,
            )


def tell_of_unfamiliar(training: Sequence[Task], config: EvalConfig, main: bool = True) -> None:
    """Has the main process tell where no task of the training families can take part in calibration."""
    from training.evaluation import FAMILIAR_CHARACTERS, FAMILIAR_QUERIES, familiar_tasks

    if main and any(config.shots) and not familiar_tasks(training, config)[0]:
        typer.echo(
            f"abmll: no training family has a task of {FAMILIAR_QUERIES} items of at most {FAMILIAR_CHARACTERS} "
            "characters: temperatures rest on the validation tasks alone",
            err=True,
        )


def tell_of_factors(inner: AdaptConfig, config: EvalConfig, main: bool = True) -> None:
    """Has the main process tell where tasks have more freedom than any that calibration looks at."""
    if main and inner.factor_rate > 0 and max(config.shots) < inner.factor_examples:
        typer.echo(
            f"abmll: tasks of {inner.factor_examples} examples and more have factors of their own, and calibration "
            f"looks at {max(config.shots)} at most: `abmll calibrate POSTERIOR --shots 0,4,16,64` looks at more",
            err=True,
        )


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
            raise AbmllError("the posterior carries no split; name one with --split FILE", field="split")
        chosen = read_split(split) if split is not None else Split.model_validate(own)
        parts = PARTS.get(part)
        if parts is None:
            raise AbmllError(f"--part {part!r} must be train, validation, test, held-out or all", field="part")
        loaded = [task for name in parts for task in chosen.select(loaded, name)]
    if not loaded:
        raise AbmllError(f"no task belongs to the part {part!r}", field="part")
    return loaded


def tell_of_components(chosen: Sequence[Task], wanted: int, main: bool = True) -> None:
    """Has the main process tell where fewer training tasks can be components of the prior than were asked for."""
    from training.components import FEWEST_EXAMPLES

    if main and len(chosen) < wanted:
        typer.echo(
            f"abmll: the prior has {len(chosen)} components, not {wanted}: no more training tasks have "
            f"{FEWEST_EXAMPLES} examples with options",
            err=True,
        )
