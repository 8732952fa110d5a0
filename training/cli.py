"""The commands ``abmll pretrain``, ``train``, ``adapt``, ``calibrate``, ``eval`` and ``bench``.

Signatures stand here; whatever needs torch is imported inside, so that ``--help`` stays quick.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from training.benchmark.command import bench_command
from training.settings import checked, choose_device, numbers, read_toml

if TYPE_CHECKING:
    from collections.abc import Callable

    from abmll.store import StoredPosterior
    from training.splits import Split
    from training.tasks import Task

_Tasks = Annotated[Path, typer.Option(help="Folder of tasks: JSON Lines files, with a manifest.json if you have one.")]
_Model = Annotated[str | None, typer.Option(help="Base model: hub name or folder. Default: the embedded small model.")]
_Revision = Annotated[str | None, typer.Option(help="Commit or tag of the base model on the hub.")]
_Settings = Annotated[Path | None, typer.Option("--config", help="TOML file with further settings.")]
_SplitFile = Annotated[Path | None, typer.Option(help="Split file to read; made from --seed and --pin if absent.")]
_Pins = Annotated[list[str] | None, typer.Option("--pin", help="FAMILY=train|validation|test; may be repeated.")]
_Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: a GPU if there is one.")]
_Jobs = Annotated[int, typer.Option(min=1, help="Processes that share the predictions, each with its own model.")]
_Dtype = Annotated[str, typer.Option(help="Dtype of the frozen base weights: float32 or bfloat16.")]

_PARTS: dict[str, tuple[Literal["train", "validation", "test"], ...]] = {
    "train": ("train",),
    "validation": ("validation",),
    "test": ("test",),
    "held-out": ("validation", "test"),
}


def register(app: typer.Typer) -> None:
    """Adds the training commands to the command line."""
    app.command("pretrain")(pretrain_command)
    app.command("train")(train_command)
    app.command("adapt")(adapt_command)
    app.command("calibrate")(calibrate_command)
    app.command("eval")(eval_command)
    app.command("bench")(bench_command)


def _dtype(name: str) -> Any:
    import torch

    from abmll.errors import AbmllError

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if name not in known:
        raise AbmllError(f"dtype is {name!r}; give float32 or bfloat16", field="dtype")
    return known[name]


def _split(tasks: list[Task], path: Path | None, seed: int, pins: list[str] | None, target: Path) -> Split:
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


def pretrain_command(
    books: Annotated[Path, typer.Option(help="Folder of book shards (*.txt.xz).")],
    tasks: _Tasks,
    out: Annotated[Path, typer.Option(help="Model folder to make.")],
    split: _SplitFile = None,
    seed: Annotated[int, typer.Option(help="Seed of the split and of training.")] = 0,
    pin: _Pins = None,
    minutes: Annotated[float, typer.Option(help="Wall-clock budget.")] = 60.0,
    start: Annotated[Path | None, typer.Option(help="Go on from this folder, which pretrain made.")] = None,
    config: _Settings = None,
    device: _Device = None,
) -> None:
    """Train a small Llama-architecture base model and its tokenizer from scratch."""
    from training.base.pretrain import PretrainConfig, pretrain
    from training.tasks import load_tasks

    loaded = load_tasks(tasks)
    chosen = _split(loaded, split, seed, pin, out.with_name(out.name + ".split.json"))
    settings = checked(PretrainConfig, {"minutes": minutes, "seed": seed} | read_toml(config))
    pretrain(books, loaded, chosen, out, settings, start=start, device=choose_device(device))
    typer.echo(f"wrote {out}")


def train_command(
    tasks: _Tasks,
    out: Annotated[Path, typer.Option(help="Posterior folder to make; checkpoints lie in OUT.work.")],
    model: _Model = None,
    revision: _Revision = None,
    split: _SplitFile = None,
    seed: Annotated[int, typer.Option(help="Seed of split and training.")] = 0,
    pin: _Pins = None,
    family: Annotated[str, typer.Option(help="Scale family: kronecker, lowrank or subspace.")] = "kronecker",
    targets: Annotated[str, typer.Option(help="Names of the targeted modules, joined by commas.")] = "q_proj,v_proj",
    layers: Annotated[
        str, typer.Option(help="Blocks of the model that are Gaussian: all, last, or the top share, such as top-25%.")
    ] = "all",
    rank: Annotated[int | None, typer.Option(help="Rank of the mean. Default: 7; 16 for subspace.")] = None,
    steps: Annotated[int, typer.Option(help="Meta-training steps.")] = 400,
    minutes: Annotated[float | None, typer.Option(help="Train by wall clock instead of steps.")] = None,
    beta: Annotated[
        float | None, typer.Option(help="Weight of KL. Default: 1e-4; 1e-2 for subspace.", show_default=False)
    ] = None,
    config: _Settings = None,
    books: Annotated[Path | None, typer.Option(help="Book shards to make pseudo-tasks from.")] = None,
    pseudo: Annotated[int, typer.Option("--pseudo-tasks", help="Pseudo-tasks of each kind.")] = 30,
    calibration_draws: Annotated[int, typer.Option(help="Draws in calibration.")] = 8,
    context: Annotated[int | None, typer.Option(help="Longest prompt in tokens; the model's limit by default.")] = None,
    jobs: _Jobs = 1,
    dtype: _Dtype = "float32",
    gradient_checkpointing: Annotated[bool, typer.Option(help="Recompute activations to save memory.")] = False,
    device: _Device = None,
) -> None:
    """Meta-train a global posterior on training families and calibrate it on validation families."""
    from abmll.layers import attach
    from abmll.posterior import PosteriorConfig
    from abmll.store import Record, save_posterior
    from training.adaptation import family_settings
    from training.base.corpus import unseen_items
    from training.base_model import load_base
    from training.calibrate import calibrate_all
    from training.embedded import NAME, resolve
    from training.evaluation import EvalConfig
    from training.meta import MetaConfig, meta_train
    from training.progress import track
    from training.pseudo_tasks import kind_tasks, pseudo_tasks
    from training.tasks import load_tasks

    values = read_toml(config)
    posterior_values: dict[str, Any] = {"family": family, "layers": layers} | values.pop("posterior", {})
    if rank is not None:
        posterior_values = {"rank": rank} | posterior_values
    inner = family_settings(posterior_values["family"]) | ({} if beta is None else {"beta": beta})
    inner |= values.pop("inner", {})
    settings = checked(MetaConfig, {"steps": steps, "minutes": minutes, "seed": seed, "inner": inner} | values)
    loaded = load_tasks(tasks)
    work = out.with_name(out.name + ".work")
    chosen = _split(loaded, split, seed, pin, work / "split.json")
    source = resolve(model)
    base = load_base(
        source,
        revision=revision,
        dtype=_dtype(dtype),
        device=choose_device(device),
        context=context,
        gradient_checkpointing=gradient_checkpointing,
    )
    posterior_config = checked(
        PosteriorConfig,
        {
            "base_model": model or NAME,
            "base_revision": revision,
            "targets": tuple(targets.split(",")),
        }
        | posterior_values,
    )
    attached = attach(base.model, posterior_config.targets, posterior_config.layers)
    familiar = unseen_items(Path(source), chosen.select(loaded, "train"))
    from_books = pseudo_tasks(books, pseudo, seed) if books is not None else []
    training_tasks = [*familiar, *kind_tasks(familiar, pseudo, seed), *from_books]
    theta = meta_train(base, attached, training_tasks, posterior_config, settings, work)
    theta = theta.map(lambda tensor: tensor.to(base.device))
    evaluation = EvalConfig(draws=calibration_draws, seed=seed)
    validation = chosen.select(loaded, "validation")
    calibration, results = None, {}
    if validation:
        calibration, results, tables = calibrate_all(
            base, attached, theta, validation, familiar, settings.inner, evaluation, track, jobs
        )
        typer.echo("\n\n".join(tables))
    extra = {
        "split": chosen.model_dump(),
        "pseudo_tasks": {"tasks": pseudo, "books": pseudo if books is not None else 0},
    }
    record = Record(
        seed=seed,
        training=settings.model_dump(mode="json") | extra,
        results=results,
    )
    stored = save_posterior(out, theta, record, calibration)
    typer.echo(f"wrote {out}, posterior {stored.digest}")


def adapt_command(
    posterior: Annotated[Path, typer.Argument(help="Folder of the global posterior.")],
    examples: Annotated[Path, typer.Option(help="JSON Lines file of labelled examples.")],
    task: Annotated[str, typer.Option(help="Name of the new task.")],
    out: Annotated[Path, typer.Option(help="Posterior folder to make.")],
    model: _Model = None,
    steps: Annotated[int | None, typer.Option(help="Gradient steps; as in meta-training by default.")] = None,
    seed: int = 0,
    dtype: _Dtype = "float32",
    device: _Device = None,
) -> None:
    """Adapt a global posterior to a task from labelled examples."""
    from abmll.errors import AbmllError
    from abmll.store import Record, load_posterior, save_posterior
    from training.adaptation import AdaptConfig
    from training.progress import track
    from training.task_calibration import adapt_and_calibrate
    from training.tasks import read_examples

    support = read_examples(examples)
    stored = load_posterior(posterior)
    inner = AdaptConfig.from_record(stored.record.training)
    if steps is not None:
        inner = checked(AdaptConfig, inner.with_steps(steps).model_dump())
    if task == "global":
        raise AbmllError("the task name 'global' means the global posterior; choose another", field="task")
    base, attached, theta = _open(stored.posterior, model, dtype, device)
    with track("adapt", total=1) as bar:
        phi, calibration = adapt_and_calibrate(
            base,
            attached,
            theta,
            support,
            inner,
            stored.calibration,
            seed=seed,
            on_step=lambda step, steps: bar.update(step / max(1, steps), {"step": step}),
        )
    record = Record(
        task=task, parent=stored.digest, seed=seed, shots=len(support), training={"inner": inner.model_dump()}
    )
    saved = save_posterior(out, phi, record, calibration)
    typer.echo(f"wrote {out}, posterior {saved.digest}")


def calibrate_command(
    posterior: Annotated[Path, typer.Argument(help="Folder of the global posterior; its calibration is replaced.")],
    tasks: _Tasks,
    model: _Model = None,
    split: Annotated[Path | None, typer.Option(help="Split file; default: the posterior's own.")] = None,
    shots: Annotated[str, typer.Option(help="Numbers of shots, joined by commas.")] = "0,4,16",
    draws: Annotated[int, typer.Option(help="Draws.")] = 8,
    queries: Annotated[int, typer.Option(help="Items predicted in each task, at most.")] = 100,
    supports: Annotated[int, typer.Option(help="Support sets of each task and number of shots.")] = 1,
    seed: int = 0,
    jobs: _Jobs = 1,
    dtype: _Dtype = "float32",
    device: _Device = None,
) -> None:
    """Calibrate a global posterior anew, on validation families and new tasks of the training families' kinds."""
    from abmll.store import load_posterior, save_posterior
    from training.adaptation import AdaptConfig
    from training.base.corpus import unseen_items
    from training.calibrate import calibrate_all
    from training.embedded import resolve
    from training.evaluation import EvalConfig
    from training.progress import track
    from training.tasks import load_tasks

    stored = load_posterior(posterior)
    loaded = load_tasks(tasks)
    validation = _tasks_of_part(loaded, split, "validation", stored)
    training = unseen_items(
        Path(resolve(model or stored.posterior.config.base_model)), _tasks_of_part(loaded, split, "train", stored)
    )
    config = checked(
        EvalConfig,
        {"shots": numbers(shots, "shots"), "draws": draws, "queries": queries, "supports": supports, "seed": seed},
    )
    base, attached, theta = _open(stored.posterior, model, dtype, device)
    inner = AdaptConfig.from_record(stored.record.training)
    calibration, results, tables = calibrate_all(
        base, attached, theta, validation, training, inner, config, track, jobs
    )
    typer.echo("\n\n".join(tables))
    save_posterior(posterior, stored.posterior, stored.record.model_copy(update={"results": results}), calibration)
    for entry in calibration.by_shots:
        typer.echo(
            f"{entry.shots} shots: temperatures around {entry.temperature:.2f}, log spread {entry.spread:.2f}; "
            f"ECE {entry.ece_before:.3f} before, {entry.ece_after:.3f} after"
        )
    for entry in calibration.texts:
        typer.echo(
            f"{entry.shots} shots, free text: slope {entry.slope:.2f}, offset {entry.offset:.2f}; "
            f"ECE {entry.ece_before:.3f} before, {entry.ece_after:.3f} after"
        )


def _tasks_of_part(loaded: list[Task], split: Path | None, part: str, stored: StoredPosterior) -> list[Task]:
    """Returns the tasks of a part of the split; all of them for the part ``all``."""
    from abmll.errors import AbmllError
    from training.splits import Split, read_split

    if part != "all":
        own = stored.record.training.get("split")
        if split is None and own is None:
            raise AbmllError("the posterior carries no split; give --split FILE or --part all", field="split")
        chosen = read_split(split) if split is not None else Split.model_validate(own)
        parts = _PARTS.get(part)
        if parts is None:
            raise AbmllError(f"--part {part!r} must be train, validation, test, held-out or all", field="part")
        loaded = [task for name in parts for task in chosen.select(loaded, name)]
    if not loaded:
        raise AbmllError(f"no task belongs to the part {part!r}", field="part")
    return loaded


def eval_command(
    tasks: _Tasks,
    posterior: Annotated[Path | None, typer.Argument(help="Folder of a global posterior; default: embedded.")] = None,
    model: _Model = None,
    split: Annotated[Path | None, typer.Option(help="Split file; default: the posterior's own.")] = None,
    part: Annotated[str, typer.Option(help="Families to evaluate: train, validation, test, held-out or all.")] = "test",
    shots: Annotated[str, typer.Option(help="Numbers of shots, joined by commas.")] = "0,4,16",
    draws: Annotated[int, typer.Option(help="Draws.")] = 8,
    queries: Annotated[int, typer.Option(help="Items predicted in each task, at most.")] = 100,
    supports: Annotated[int, typer.Option(help="Support sets of each task and number of shots.")] = 1,
    seed: int = 0,
    by: Annotated[
        str, typer.Option(help="Rows of the table: category, family or task; joined by commas, a table each.")
    ] = "category",
    free_text: Annotated[
        bool, typer.Option("--free-text", help="Give no options: the right option's text is the right answer.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the tables' rows here as JSON.")] = None,
    jobs: _Jobs = 1,
    dtype: _Dtype = "float32",
    device: _Device = None,
) -> None:
    """Print accuracy and calibration of a posterior on tasks, before and after adaptation."""
    from abmll.errors import AbmllError
    from abmll.store import load_posterior
    from training.adaptation import AdaptConfig
    from training.embedded import POSTERIOR
    from training.evaluation import EvalConfig, Scores, predict_tasks, score
    from training.progress import track
    from training.report import grouped, markdown
    from training.tasks import load_tasks
    from training.text_evaluation import TextScores, predict_texts, score_texts

    names: dict[str, Callable[[Task], str]] = {
        "category": lambda task: task.category,
        "family": lambda task: task.family,
        "task": lambda task: task.name,
    }
    levels = by.split(",")
    if not set(levels) <= names.keys():
        raise AbmllError(f"--by {by!r} must be category, family or task, or several joined by commas", field="by")
    stored = load_posterior(posterior or POSTERIOR)
    loaded = _tasks_of_part(load_tasks(tasks), split, part, stored)
    config = checked(
        EvalConfig,
        {"shots": numbers(shots, "shots"), "draws": draws, "queries": queries, "supports": supports, "seed": seed},
    )
    base, attached, theta = _open(stored.posterior, model, dtype, device)
    inner = AdaptConfig.from_record(stored.record.training)
    rest = [task for task in loaded if free_text or task.is_free_text]
    asked = [] if free_text else [task for task in loaded if not task.is_free_text]
    predictions = predict_tasks(base, attached, theta, asked, inner, config, track, jobs) if asked else []
    answers = predict_texts(base, attached, theta, rest, inner, config, track, jobs) if rest else []
    table: list[dict[str, Any]] = []
    for level in levels:
        rows = [
            *grouped(predictions, lambda group: score(group, stored.calibration), names[level]),
            *grouped(answers, lambda group: score_texts(group, stored.calibration), names[level]),
        ]
        for kind in (Scores, TextScores):
            of_kind: list[Any] = [row for row in rows if isinstance(row[2], kind)]
            if of_kind:
                typer.echo(markdown(of_kind, level) + "\n")
        table += [{level: name, "shots": k, **scores.model_dump()} for name, k, scores in rows]
    if json_file is not None:
        json_file.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def _open(posterior: Any, model: str | None, dtype: str, device: str | None) -> tuple[Any, Any, Any]:
    """Loads a posterior's base model, checks that it is the one, and attaches."""
    from abmll.layers import attach, check_base, fingerprint
    from training.base_model import load_base
    from training.embedded import resolve

    name = model or posterior.config.base_model
    base = load_base(
        resolve(name), revision=posterior.config.base_revision, dtype=_dtype(dtype), device=choose_device(device)
    )
    attached = attach(base.model, posterior.config.targets, posterior.config.layers)
    check_base(posterior, fingerprint(lambda key: attached.layers[key].base.weight, attached.layers), name)
    return base, attached, posterior.map(lambda tensor: tensor.to(base.device))
