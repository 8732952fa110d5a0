"""The command ``abmll bench``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clients.command_line import is_typed
from training.commands.document import print_json

if TYPE_CHECKING:
    from collections.abc import Iterable

    from training.benchmark.method import Settings
    from training.benchmark.run import BenchConfig, Parts
    from training.benchmark.world import World
    from training.tasks import Task

RESULTS = "results.jsonl.gz"
# Small enough for under five minutes on two cores.
QUICK = {
    "shots": (4, 16),
    "train_tasks": 12,
    "validation_tasks": 3,
    "test_tasks": 4,
    "queries": 16,
    "meta_steps": 2,
    "steps": 6,
    "draws": 4,
}


def bench_command(
    ctx: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder for results, tables and pictures; a run goes on from it.")],
    tasks: Annotated[Path | None, typer.Option(help="Folder of tasks; default: the generated world.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Base model: hub name or folder. Default: the embedded one.")
    ] = None,
    methods: Annotated[str | None, typer.Option(help="Names of methods, joined by commas; default: all.")] = None,
    betas: Annotated[
        str | None, typer.Option(help="Weights of KL, joined by commas: an ablation of ABMLL in place of methods.")
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(help="Blocks with Gaussian weights, e.g. all,top-50%,last: an ablation of ABMLL likewise."),
    ] = None,
    shots: Annotated[str, typer.Option(help="Numbers of shots, joined by commas.")] = "1,4,16,64",
    episode_shots: Annotated[
        str | None, typer.Option(help="Numbers of shots to meta-learn from; default: those measured.")
    ] = None,
    growth: Annotated[
        float, typer.Option(help="Power of (shots / 16) that steps grow with: 1: K for every 16 examples, 0: always K.")
    ] = 0.0,
    own_temperatures: Annotated[
        bool, typer.Option(help="Give each task a temperature of its own, from its examples: takes five times as long.")
    ] = False,
    seeds: Annotated[str, typer.Option(help="Seeds, joined by commas.")] = "0,1,2",
    meta_steps: Annotated[int, typer.Option(help="Steps of learning over tasks.")] = 100,
    settings_of: Annotated[
        Path | None, typer.Option(help="Folder of an earlier run, whose settings are taken in place of tuning.")
    ] = None,
    train_tasks: Annotated[int, typer.Option(help="Tasks to meta-learn from.")] = 200,
    validation_tasks: Annotated[int, typer.Option(help="Tasks to tune and calibrate on.")] = 40,
    test_tasks: Annotated[int, typer.Option(help="Tasks to measure on.")] = 24,
    quick: Annotated[bool, typer.Option(help="A run of minutes that shows how it works, not how good it is.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Processes at a time, which share the cores.")] = 1,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... Default: a GPU if there is one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the measures as one JSON document.")] = False,
) -> None:
    """Compare ABMLL with what one would use instead: same base model, data, shots and budget."""
    from abmll.errors import AbmllError
    from training.benchmark.catalogue import compared
    from training.benchmark.pictures import against_beta, draw_all
    from training.benchmark.run import BenchConfig, run
    from training.benchmark.world import World
    from training.embedded import resolve
    from training.progress import track
    from training.settings import SEED_LIMIT, checked, numbers

    own = [name for name in (*QUICK, "seeds") if quick and is_typed(ctx, name)]
    if own:
        raise AbmllError(f"--quick has {own[0]} of its own; leave --{own[0].replace('_', '-')} out", field=own[0])
    values: dict[str, Any] = {
        "shots": numbers(shots, "shots"),
        "episode_shots": None if episode_shots is None else numbers(episode_shots, "episode_shots"),
        "growth": growth,
        "own_temperatures": own_temperatures,
        "meta_steps": meta_steps,
        "train_tasks": train_tasks,
        "validation_tasks": validation_tasks,
        "test_tasks": test_tasks,
    }
    config: BenchConfig = checked(BenchConfig, values | (QUICK if quick else {}))
    results = _results_in(out)
    wanted = (0,) if quick else numbers(seeds, "seeds")
    if not all(0 <= seed < SEED_LIMIT for seed in wanted):
        raise AbmllError(f"--seeds {seeds} must be whole numbers from 0 to {SEED_LIMIT - 1}", field="seeds")
    world = World() if tasks is None else None
    if world is not None:
        parts = {seed: _generated(world, config, seed) for seed in wanted}
    else:
        parts = _real(tasks, resolve(model), config, wanted)
    chosen = compared(world, methods, betas, layers)
    tuned = [method.name for method in chosen if len(method.trials) > 1]
    settings = None if settings_of is None else _earlier_settings(settings_of, tuned)
    rows = run(
        chosen,
        parts,
        resolve(model),
        config,
        results,
        world=world,
        device=device,
        jobs=jobs,
        settings=settings,
        progress=track,
    )
    text = _report(rows, config, parts.values())
    (out / "report.md").write_text(text, encoding="utf-8")
    if not as_json:
        typer.echo(text)
    pictures = draw_all(rows, out)
    if betas is not None:
        pictures.append(against_beta(rows, [method.name for method in chosen], out))
    if as_json:
        files = {"report": out / "report.md", "pictures": pictures}
        print_json(files | {"settings": config, "rows": _measures(rows)})
        return
    for picture in pictures:
        typer.echo(f"drew {picture}")


def _results_in(out: Path) -> Path:
    """Makes the folder, and returns where the results go or are."""
    from abmll.errors import AbmllError

    results = out / RESULTS
    try:
        out.mkdir(parents=True, exist_ok=True)
        # A file that a killed run had begun is none of the user's.
        if not results.is_file() and any(not entry.name.startswith(f".{results.name}.") for entry in out.iterdir()):
            raise AbmllError(f"{out} holds other things than results; name a new folder, or an empty one", field="out")
    except OSError as error:
        raise AbmllError(f"{out} cannot be a folder of results: {error.strerror}; name another", field="out") from error
    return results


def _earlier_settings(folder: Path, tuned: list[str]) -> dict[str, Settings]:
    """The settings that methods had in an earlier run."""
    from abmll.errors import AbmllError
    from training.benchmark.run import read_rows, settings_of

    file = folder / RESULTS
    if not file.is_file():
        raise AbmllError(f"{folder} has no {RESULTS}: it is no folder of `abmll bench`", field="settings_of")
    rows = read_rows(file)
    found = settings_of(rows, min(row["seed"] for row in rows)) if rows else {}
    if lacking := [name for name in tuned if name not in found]:
        raise AbmllError(
            f"{folder} says no settings of {', '.join(lacking)}; leave them out of --methods, or tune them by a run "
            "without --settings-of",
            field="settings_of",
        )
    return {name: found[name] for name in tuned}


def _measures(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows without what was measured of each single answer."""
    return [
        {key: value for key, value in row.items() if key != "identity" and not isinstance(value, list | dict)}
        for row in rows
    ]


def _generated(world: World, config: BenchConfig, seed: int) -> Parts:
    from training.benchmark.run import Parts

    return Parts(
        train=world.tasks(config.train_tasks, seed=3 * seed + 1),
        validation=world.tasks(config.validation_tasks, seed=3 * seed + 2),
        test=world.tasks(config.test_tasks, seed=3 * seed + 3),
    )


def _real(tasks: Path | None, model: str, config: BenchConfig, seeds: tuple[int, ...]) -> dict[int, Parts]:
    """Short tasks of a folder by the split of the embedded posterior, spread over the families.

    A seed chooses tasks of each part and their items, but moves no family to another part: the embedded base model
    has read the training families. A folder with other families has a split of its own, the same each time.
    """
    from abmll.errors import AbmllError
    from abmll.store import load_posterior
    from training.base.corpus import unseen_items
    from training.benchmark.run import Parts
    from training.embedded import POSTERIOR
    from training.episodes import short_items
    from training.splits import Part, Split, split_families
    from training.tasks import load_tasks, spread_over_families

    assert tasks is not None
    loaded = load_tasks(tasks)
    split = Split.model_validate(load_posterior(POSTERIOR).record.training["split"])
    if not {task.family for task in loaded} <= split.families.keys():
        split = split_families(loaded, seed=0)  # another's tasks, of which no base model here has read any
    loaded = short_items(loaded, 500)
    need = config.queries + 2

    def choose(part: Part, count: int, seed: int) -> list[Task]:
        own = [task for task in split.select(loaded, part) if len(task.examples) >= need and not task.is_free_text]
        own = unseen_items(Path(model), own) if part == "train" else own
        return spread_over_families(own, seed)[:count]

    found = {
        seed: Parts(
            train=choose("train", config.train_tasks, seed),
            validation=choose("validation", config.validation_tasks, seed),
            test=choose("test", config.test_tasks, seed),
        )
        for seed in seeds
    }
    if not all(all(parts.contents()) for parts in found.values()):
        raise AbmllError(f"{tasks} has no task with {need} short items for each part of the split", field="tasks")
    return found


def _counted(parts: Iterable[Parts]) -> str:
    """How many tasks there are of each part: fewer than were asked for where a folder has no more."""
    counts = sorted({(len(part.train), len(part.validation), len(part.test)) for part in parts})
    return "; ".join(f"{a} to learn from, {b} to tune and calibrate on, {c} to measure on" for a, b, c in counts)


def _report(rows: list[dict[str, Any]], config: BenchConfig, used: Iterable[Parts]) -> str:
    from training.benchmark.catalogue import OURS
    from training.benchmark.report import baselines_of, cost_table, names, ood_table, paired_table, quality_table

    present = names(rows)
    ours = [name for name in OURS if name in present]
    seeds = ", ".join(str(seed) for seed in sorted({row["seed"] for row in rows}))
    sources = "; ".join(sorted({row["measured"] for row in rows}))
    head = f"{sources}. Seeds: {seeds}. Tasks: {_counted(used)}. Settings: {config.model_dump_json()}"
    parts = [f"# Benchmark\n\n{head}\n"]
    calibrated_kind = "calibrated on the validation tasks"
    if config.own_temperatures:
        calibrated_kind += ", each task with a temperature of its own"
    for calibrated in (True, False):
        for shots in config.shots:
            kind = calibrated_kind if calibrated else "not calibrated"
            parts.append(f"## {shots} shots, {kind}\n\n{quality_table(rows, shots, calibrated)}\n")
            if calibrated and ours and baselines_of(rows):
                parts.append(f"Paired differences, below 0 is better:\n\n{paired_table(rows, shots, True, ours)}\n")
    parts.append(f"## Out of distribution, calibrated\n\n{ood_table(rows)}\n")
    parts.append(f"## Cost\n\n{cost_table(rows)}\n")
    return "\n".join(parts)
