"""The command ``abmll train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from training.commands.document import print_json
from training.commands.opening import dtype_of, join_ranks
from training.commands.options import (
    Components,
    ConfigFile,
    Device,
    Dtype,
    FactorRate,
    Jobs,
    Json,
    Members,
    Model,
    Pins,
    Revision,
    ShardBase,
    SplitFile,
    Tasks,
    typed,
)
from training.commands.parts import (
    chosen_split,
    tell_of_components,
    tell_of_factors,
    tell_of_small,
    tell_of_unfamiliar,
    within_context,
)
from training.settings import SEED_LIMIT, checked, choose_device, pop_table, read_toml


def train_command(
    ctx: typer.Context,
    tasks: Tasks,
    out: Annotated[Path, typer.Option(help="Posterior folder to make; checkpoints lie in OUT.work.")],
    model: Model = None,
    revision: Revision = None,
    split: SplitFile = None,
    seed: Annotated[int, typer.Option(min=0, max=SEED_LIMIT - 1, help="Seed of split and training.")] = 0,
    pin: Pins = None,
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
    members: Members = None,
    factor_rate: FactorRate = None,
    components: Components = None,
    config: ConfigFile = None,
    books: Annotated[Path | None, typer.Option(help="Book shards to make pseudo-tasks from.")] = None,
    pseudo: Annotated[int, typer.Option("--pseudo-tasks", help="Pseudo-tasks of each kind.")] = 30,
    calibration_draws: Annotated[int, typer.Option(help="Draws in calibration.")] = 8,
    context: Annotated[
        int | None, typer.Option(min=16, help="Longest prompt in tokens; the model's limit by default.")
    ] = None,
    jobs: Jobs = 1,
    dtype: Dtype = "float32",
    gradient_checkpointing: Annotated[bool, typer.Option(help="Recompute activations to save memory.")] = False,
    device: Device = None,
    shard_base: ShardBase = False,
    as_json: Json = False,
) -> None:
    """Meta-train a global posterior on training families and calibrate it on validation families."""
    from abmll.errors import AbmllError
    from abmll.layers import attach
    from abmll.names import GLOBAL
    from abmll.posterior import PosteriorConfig
    from abmll.store import Record, check_replaceable, save_posterior
    from training.adaptation import check_family, family_settings
    from training.base.corpus import unseen_items
    from training.base_model import load_base
    from training.calibrate import calibrate_all
    from training.components import check_components, choose_tasks, with_task_components
    from training.embedded import NAME, resolve
    from training.evaluation import EvalConfig
    from training.meta import MetaConfig, meta_train
    from training.progress import silent, track
    from training.pseudo_tasks import kind_tasks, pseudo_tasks
    from training.tasks import load_tasks

    values, names = read_toml(config), tuple(name.strip() for name in targets.split(","))
    posterior_values: dict[str, Any] = {"family": family, "layers": layers, "targets": names}
    told = pop_table(values, "posterior")
    if of_base := sorted(name for name in told if name.startswith("base_")):
        raise AbmllError(
            f"setting posterior.{of_base[0]}: the base model is named by --model and --revision", of_base[0]
        )
    if "members" in told:
        raise AbmllError(
            "setting posterior.members: a task's posterior may be a mixture, not the global one; give inner.members or "
            "--members",
            "members",
        )
    posterior_values |= told | typed(ctx, family=family, layers=layers, targets=names, rank=rank)
    inner = (
        family_settings(posterior_values["family"])
        | pop_table(values, "inner")
        | typed(ctx, beta=beta, members=members, factor_rate=factor_rate)
    )
    values = {"steps": steps, "minutes": minutes, "seed": seed} | values
    settings = checked(MetaConfig, values | typed(ctx, steps=steps, minutes=minutes, seed=seed) | {"inner": inner})
    seed = settings.seed
    posterior_config = checked(PosteriorConfig, {"base_model": model or NAME} | posterior_values)
    evaluation = checked(EvalConfig, {"draws": calibration_draws, "seed": seed})
    check_family(settings.inner, posterior_config.family, evaluation.draws)
    check_components(components or 0, posterior_config.family)
    check_replaceable(out, GLOBAL)
    loaded = load_tasks(tasks)
    work = out.with_name(out.name + ".work")
    ranks = join_ranks(device, shard_base, jobs, share_tasks=True)
    # One process makes the split's file.
    chosen = ranks.of_main(chosen_split(loaded, split, seed, pin, work / "split.json") if ranks.main else None)
    assert chosen is not None
    validation = chosen.select(loaded, "validation")
    if ranks.main and not validation:
        typer.echo(
            "abmll: no family is left for validation, so the posterior will not be calibrated; "
            "give more families, or --pin FAMILY=validation",
            err=True,
        )
    source = resolve(model)
    base = load_base(
        source,
        revision=revision,
        dtype=dtype_of(dtype),
        device=choose_device(ranks.device(device)),
        context=context,
        gradient_checkpointing=gradient_checkpointing,
        shards=ranks.shards,
    )
    posterior_config = posterior_config.model_copy(update={"base_revision": base.revision})
    attached = attach(base.model, posterior_config.targets, posterior_config.layers, ranks.together, base.weights)
    familiar = within_context(
        base, posterior_config.template, unseen_items(Path(source), chosen.select(loaded, "train")), ranks.main
    )
    banked = choose_tasks(familiar, components or 0, seed)
    tell_of_components(banked, components or 0, ranks.main)
    from_books = pseudo_tasks(books, pseudo, seed) if books is not None else []
    made = [*kind_tasks(familiar, pseudo, seed), *from_books]
    training_tasks = [*familiar, *within_context(base, posterior_config.template, made, ranks.main)]
    if validation:
        validation = within_context(base, posterior_config.template, validation, ranks.main)
        tell_of_small(validation, evaluation.shots, ranks.main)
        tell_of_unfamiliar(familiar, evaluation, ranks.main)
        tell_of_factors(settings.inner, evaluation, ranks.main)
    theta = meta_train(base, attached, training_tasks, posterior_config, settings, work, ranks=ranks)
    if not ranks.sharded:
        ranks.leave()
        if not ranks.main:
            return
    theta = theta.map(lambda tensor: tensor.to(base.device))
    calibration, results = None, {}
    progress = track if ranks.main else silent
    if banked:
        theta = with_task_components(base, attached, theta, banked, settings.inner, seed, progress)
    if validation:
        calibration, results, tables = calibrate_all(
            base, attached, theta, validation, familiar, settings.inner, evaluation, progress, jobs
        )
        if ranks.main and not as_json:
            typer.echo("\n\n".join(tables))
    if ranks.sharded:
        ranks.leave()
        if not ranks.main:
            return
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
    if as_json:
        print_json({"folder": out, "posterior": stored.digest, "split": chosen, "results": results})
    else:
        typer.echo(f"wrote {out}, posterior {stored.digest}")
