"""The command ``abmll bench``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from training.benchmark.world import World
    from training.tasks import Task

# Small enough for under five minutes on two cores.
QUICK = {
    "shots": (4, 16),
    "seeds": (0,),
    "train_tasks": 60,
    "validation_tasks": 3,
    "test_tasks": 6,
    "queries": 16,
    "meta_steps": 3,
    "steps": 6,
    "draws": 4,
}


def bench_command(
    out: Annotated[Path, typer.Option(help="Folder for results, tables and pictures; a run goes on from it.")],
    tasks: Annotated[
        Path | None, typer.Option(help="Folder of tasks with a split in the posterior; default: the generated world.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Base model: hub name or folder. Default: the embedded one.")
    ] = None,
    methods: Annotated[str | None, typer.Option(help="Names of methods, joined by commas; default: all.")] = None,
    shots: Annotated[str, typer.Option(help="Numbers of shots, joined by commas.")] = "1,4,16,64",
    seeds: Annotated[str, typer.Option(help="Seeds, joined by commas.")] = "0,1,2",
    meta_steps: Annotated[int, typer.Option(help="Steps of learning over tasks.")] = 300,
    test_tasks: Annotated[int, typer.Option(help="Tasks to measure on.")] = 40,
    quick: Annotated[bool, typer.Option(help="A run of minutes that shows how it works, not how good it is.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... Default: a GPU if there is one.")] = None,
) -> None:
    """Compare ABMLL with what one would use instead: same base model, data, shots and budget."""
    from training.benchmark.catalogue import choose
    from training.benchmark.pictures import draw_all
    from training.benchmark.run import BenchConfig, run
    from training.benchmark.world import World
    from training.embedded import resolve
    from training.progress import track
    from training.settings import checked, choose_device, numbers

    values: dict[str, Any] = {"shots": numbers(shots, "shots"), "seeds": numbers(seeds, "seeds")}
    values |= {"meta_steps": meta_steps, "test_tasks": test_tasks}
    config: BenchConfig = checked(BenchConfig, values | (QUICK if quick else {}))
    world = World() if tasks is None else None
    train, validation, test = _generated(world, config) if world is not None else _real(tasks, resolve(model), config)
    rows = run(
        choose(methods, world),
        train,
        validation,
        test,
        resolve(model),
        config,
        out / "results.jsonl",
        world=world,
        device=choose_device(device),
        progress=track,
    )
    text = _report(rows, config)
    (out / "report.md").write_text(text, encoding="utf-8")
    typer.echo(text)
    for picture in draw_all(rows, out):
        typer.echo(f"drew {picture}")


def _generated(world: World, config: Any) -> tuple[list[Task], list[Task], list[Task]]:
    return (
        world.tasks(config.train_tasks, seed=1),
        world.tasks(config.validation_tasks, seed=2),
        world.tasks(config.test_tasks, seed=3),
    )


def _real(tasks: Path | None, model: str, config: Any) -> tuple[list[Task], list[Task], list[Task]]:
    """Tasks of a folder by the split of the embedded posterior, short ones, spread over the families."""
    import random

    from abmll.errors import AbmllError
    from abmll.store import load_posterior
    from training.base.corpus import unseen_items
    from training.embedded import POSTERIOR
    from training.episodes import short_items
    from training.splits import Part, Split
    from training.tasks import load_tasks

    assert tasks is not None
    split = Split.model_validate(load_posterior(POSTERIOR).record.training["split"])
    loaded = short_items(load_tasks(tasks), 500)
    need = config.queries + 2
    parts: list[list[Task]] = []
    counts: dict[Part, int] = {
        "train": config.train_tasks,
        "validation": config.validation_tasks,
        "test": config.test_tasks,
    }
    for part, count in counts.items():
        own = [task for task in split.select(loaded, part) if len(task.examples) >= need]
        own = unseen_items(Path(model), own) if part == "train" else own
        random.Random(0).shuffle(own)
        order: dict[str, int] = {}
        rank: dict[str, int] = {}
        for task in own:  # the first task of every family, then the second of each, ...
            rank[task.name] = order[task.family] = order.get(task.family, -1) + 1
        parts.append(sorted(own, key=lambda task: rank[task.name])[:count])
    if not all(parts):
        raise AbmllError(f"{tasks} has no task with {need} short items for each part of the split", field="tasks")
    return parts[0], parts[1], parts[2]


def _report(rows: list[dict[str, Any]], config: Any) -> str:
    from training.bench import machine
    from training.benchmark.catalogue import OURS
    from training.benchmark.report import BOUND, cost_table, names, paired_table, quality_table

    present = names(rows)
    ours = [name for name in OURS if name in present]
    parts = [f"# Benchmark\n\n{machine()}; settings: {config.model_dump_json()}\n"]
    for calibrated in (True, False):
        for shots in config.shots:
            kind = "calibrated on the validation tasks" if calibrated else "not calibrated"
            parts.append(f"## {shots} shots, {kind}\n\n{quality_table(rows, shots, calibrated)}\n")
            if calibrated and ours and set(present) - set(ours) - {BOUND}:
                parts.append(f"Paired differences, below 0 is better:\n\n{paired_table(rows, shots, True, ours)}\n")
    parts.append(f"## Cost\n\n{cost_table(rows)}\n")
    return "\n".join(parts)
