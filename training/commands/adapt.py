"""The command ``abmll adapt``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from training.commands.document import print_json
from training.commands.opening import join_ranks, open_base
from training.commands.options import Device, Dtype, Json, OwnModel, Seed, ShardBase
from training.settings import MAX_STEPS, checked


def adapt_command(
    posterior: Annotated[Path, typer.Argument(help="Folder of the global posterior.")],
    examples: Annotated[Path, typer.Option(help="JSON Lines file of labelled examples.")],
    task: Annotated[str, typer.Option(help="Name of the new task.")],
    out: Annotated[Path, typer.Option(help="Posterior folder to make.")],
    model: OwnModel = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1, max=MAX_STEPS, help="Gradient steps; default: as in meta-training, more for many examples."
        ),
    ] = None,
    seed: Seed = 0,
    dtype: Dtype = "float32",
    device: Device = None,
    shard_base: ShardBase = False,
    as_json: Json = False,
) -> None:
    """Adapt a global posterior to a task from labelled examples."""
    from abmll.names import check_name
    from abmll.store import Record, check_replaceable, load_global, save_posterior
    from training.adaptation import AdaptConfig
    from training.progress import silent, track
    from training.task_calibration import adapt_and_calibrate
    from training.tasks import read_examples

    check_name(task)
    check_replaceable(out, task)
    support = read_examples(examples)
    stored = load_global(posterior)
    inner = AdaptConfig.from_record(stored.record.training)
    if steps is not None:
        inner = checked(AdaptConfig, inner.with_steps(steps).model_dump())
    ranks = join_ranks(device, shard_base)
    base, attached, theta = open_base(stored.posterior, model, dtype, device, ranks)
    with (track if ranks.main else silent)("adapt", total=1) as bar:
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
    ranks.leave()
    if not ranks.main:
        return
    record = Record(
        task=task, parent=stored.digest, seed=seed, shots=len(support), training={"inner": inner.model_dump()}
    )
    saved = save_posterior(out, phi, record, calibration)
    if as_json:
        written = {"folder": out, "task": task, "posterior": saved.digest, "parent": stored.digest}
        print_json(written | {"shots": len(support)})
    else:
        typer.echo(f"wrote {out}, posterior {saved.digest}")
