"""The command ``abmll calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from training.commands.document import print_json
from training.commands.opening import join_ranks, open_base
from training.commands.options import (
    Components,
    Device,
    Dtype,
    FactorRate,
    Jobs,
    Json,
    Members,
    OwnModel,
    Seed,
    ShardBase,
    Tasks,
)
from training.commands.parts import (
    tasks_of_part,
    tell_of_components,
    tell_of_factors,
    tell_of_small,
    tell_of_unfamiliar,
    within_context,
)
from training.settings import checked, numbers


def calibrate_command(
    posterior: Annotated[
        Path,
        typer.Argument(
            help="Folder of the global posterior; its calibration is replaced, and with --components its prior."
        ),
    ],
    tasks: Tasks,
    model: OwnModel = None,
    split: Annotated[Path | None, typer.Option(help="Split file; default: the posterior's own.")] = None,
    shots: Annotated[str, typer.Option(help="Numbers of shots, joined by commas.")] = "0,4,16",
    draws: Annotated[int, typer.Option(help="Draws.")] = 8,
    queries: Annotated[int, typer.Option(help="Items predicted in each task, at most.")] = 100,
    supports: Annotated[int, typer.Option(help="Support sets of each task and number of shots.")] = 1,
    members: Members = None,
    factor_rate: FactorRate = None,
    components: Components = None,
    seed: Seed = 0,
    jobs: Jobs = 1,
    dtype: Dtype = "float32",
    device: Device = None,
    shard_base: ShardBase = False,
    as_json: Json = False,
) -> None:
    """Calibrate a global posterior anew, on validation families and tasks of the training families."""
    from abmll.names import GLOBAL
    from abmll.store import check_replaceable, load_global, save_posterior
    from training.adaptation import AdaptConfig, check_family
    from training.base.corpus import unseen_items
    from training.calibrate import calibrate_all
    from training.components import check_components, choose_tasks, with_task_components
    from training.embedded import resolve
    from training.evaluation import EvalConfig
    from training.progress import silent, track
    from training.splits import read_split
    from training.tasks import load_tasks

    stored = load_global(posterior)
    inner = AdaptConfig.from_record(stored.record.training)
    asked = {"members": members, "factor_rate": factor_rate}
    other = {name: value for name, value in asked.items() if value is not None}
    if members is not None and members > 1:
        other = {"factor_rate": 0.0} | other  # members share their factors
    inner = checked(AdaptConfig, inner.model_dump() | other)
    check_family(inner, stored.posterior.config.family, draws)
    check_components(components or 0, stored.posterior.config.family)
    check_replaceable(posterior, GLOBAL)
    loaded = load_tasks(tasks)
    own: dict[str, Any] = {} if split is None else {"split": read_split(split).model_dump()}
    validation = tasks_of_part(loaded, split, "validation", stored)
    training = unseen_items(
        Path(resolve(model or stored.posterior.config.base_model)), tasks_of_part(loaded, split, "train", stored)
    )
    config = checked(
        EvalConfig,
        {"shots": numbers(shots, "shots"), "draws": draws, "queries": queries, "supports": supports, "seed": seed},
    )
    ranks = join_ranks(device, shard_base, jobs)
    base, attached, theta = open_base(stored.posterior, model, dtype, device, ranks)
    progress = track if ranks.main else silent
    validation = within_context(base, theta.config.template, validation, ranks.main)
    training = within_context(base, theta.config.template, training, ranks.main)
    tell_of_small(validation, config.shots, ranks.main)
    tell_of_unfamiliar(training, config, ranks.main)
    tell_of_factors(inner, config, ranks.main)
    if components is not None:
        banked = choose_tasks(training, components, seed)
        tell_of_components(banked, components, ranks.main)
        theta = with_task_components(base, attached, theta, banked, inner, seed, progress)
    calibration, results, tables = calibrate_all(
        base, attached, theta, validation, training, inner, config, progress, jobs
    )
    ranks.leave()
    if not ranks.main:
        return
    # What is adapted from now on is what was calibrated.
    own |= {"inner": inner.model_dump()} if other else {}
    record = stored.record.model_copy(update={"results": results, "training": stored.record.training | own})
    saved = save_posterior(posterior, theta, record, calibration)
    if as_json:
        written = {"folder": posterior, "posterior": saved.digest, "results": results}
        print_json(written | {"calibration": calibration})
        return
    typer.echo("\n\n".join(tables))
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
