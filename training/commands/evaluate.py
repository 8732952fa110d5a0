"""The command ``abmll eval``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from training.commands.document import print_json
from training.commands.opening import join_ranks, open_base
from training.commands.options import Device, Dtype, Jobs, Json, OwnModel, Seed, ShardBase, Tasks
from training.commands.parts import tasks_of_part, tell_of_small, within_context
from training.settings import checked, numbers

if TYPE_CHECKING:
    from collections.abc import Callable

    from training.tasks import Task


def eval_command(
    tasks: Tasks,
    posterior: Annotated[Path | None, typer.Argument(help="Folder of a global posterior; default: embedded.")] = None,
    model: OwnModel = None,
    split: Annotated[Path | None, typer.Option(help="Split file; default: the posterior's own.")] = None,
    part: Annotated[str, typer.Option(help="Families to evaluate: train, validation, test, held-out or all.")] = "test",
    shots: Annotated[str, typer.Option(help="Numbers of shots, joined by commas.")] = "0,4,16",
    draws: Annotated[int, typer.Option(help="Draws.")] = 8,
    queries: Annotated[int, typer.Option(help="Items predicted in each task, at most.")] = 100,
    supports: Annotated[int, typer.Option(help="Support sets of each task and number of shots.")] = 1,
    seed: Seed = 0,
    by: Annotated[
        str, typer.Option(help="Rows of the table: category, family or task; joined by commas, a table each.")
    ] = "category",
    free_text: Annotated[
        bool, typer.Option("--free-text", help="Give no options: the right option's text is the right answer.")
    ] = False,
    jobs: Jobs = 1,
    dtype: Dtype = "float32",
    device: Device = None,
    shard_base: ShardBase = False,
    as_json: Json = False,
) -> None:
    """Print accuracy and calibration of a posterior on tasks, before and after adaptation."""
    from abmll.errors import AbmllError
    from abmll.store import load_global
    from training.adaptation import AdaptConfig, check_family
    from training.embedded import POSTERIOR
    from training.evaluation import EvalConfig, Scores, predict_tasks, score
    from training.progress import silent, track
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
    stored = load_global(posterior or POSTERIOR)
    loaded = tasks_of_part(load_tasks(tasks), split, part, stored)
    config = checked(
        EvalConfig,
        {"shots": numbers(shots, "shots"), "draws": draws, "queries": queries, "supports": supports, "seed": seed},
    )
    ranks = join_ranks(device, shard_base, jobs)
    base, attached, theta = open_base(stored.posterior, model, dtype, device, ranks)
    progress = track if ranks.main else silent
    inner = AdaptConfig.from_record(stored.record.training)
    check_family(inner, stored.posterior.config.family, draws)
    loaded = within_context(base, theta.config.template, loaded, ranks.main)
    tell_of_small(loaded, config.shots, ranks.main)
    rest = [task for task in loaded if free_text or task.is_free_text]
    asked = [] if free_text else [task for task in loaded if not task.is_free_text]
    predictions = predict_tasks(base, attached, theta, asked, inner, config, progress, jobs) if asked else []
    answers = predict_texts(base, attached, theta, rest, inner, config, progress, jobs) if rest else []
    ranks.leave()
    if not ranks.main:
        return
    table: list[dict[str, Any]] = []
    for level in levels:
        rows = [
            *grouped(predictions, lambda group: score(group, stored.calibration), names[level]),
            *grouped(answers, lambda group: score_texts(group, stored.calibration), names[level]),
        ]
        for kind in (Scores, TextScores):
            of_kind: list[Any] = [row for row in rows if isinstance(row[2], kind)]
            if of_kind and not as_json:
                typer.echo(markdown(of_kind, level) + "\n")
        table += [
            {level: name, "shots": k, "free_text": isinstance(scores, TextScores), **scores.model_dump()}
            for name, k, scores in rows
        ]
    if as_json:
        print_json(table)
