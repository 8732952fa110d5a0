"""Options that several training commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from clients.command_line import is_typed
from training.settings import SEED_LIMIT

Tasks = Annotated[Path, typer.Option(help="Folder of tasks: JSON Lines files, with a manifest.json if you have one.")]
Model = Annotated[str | None, typer.Option(help="Base model: hub name or folder. Default: the embedded small model.")]
OwnModel = Annotated[
    str | None, typer.Option("--model", help="Base model: hub name or folder. Default: as the posterior names it.")
]
Seed = Annotated[int, typer.Option(min=0, max=SEED_LIMIT - 1)]
Revision = Annotated[str | None, typer.Option(help="Commit or tag of the base model on the hub.")]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="TOML file with further settings; options given here count before it."),
]
SplitFile = Annotated[Path | None, typer.Option(help="Split file to read. Default: one is made from --seed and --pin.")]
Pins = Annotated[list[str] | None, typer.Option("--pin", help="FAMILY=train|validation|test; may be repeated.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: a GPU if there is one.")]
Jobs = Annotated[int, typer.Option(min=1, help="Processes that share the predictions, each with its own model.")]
Dtype = Annotated[str, typer.Option(help="Frozen base weights: float32, bfloat16, or nf4 (4 bits, bitsandbytes).")]
ShardBase = Annotated[
    bool,
    typer.Option(
        "--shard-base",
        help="For a base model too large for one GPU: torchrun's processes hold it together (FSDP).",
    ),
]
Members = Annotated[
    int | None,
    typer.Option(
        help="Gaussians that task posteriors are mixtures of, each so much work more; subspace alone.",
        show_default="as the posterior says, 1",
    ),
]
FactorRate = Annotated[
    float | None,
    typer.Option(
        help="Rate of the factors, which task posteriors then have of their own; 0: they are the global one's. "
        "subspace alone.",
        show_default="as the posterior says, 0",
    ),
]
Components = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Training tasks whose posteriors a new task's prior is a mixture of; 0: it is one Gaussian. subspace "
        "alone.",
        show_default="as the posterior says, 0",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the results as one JSON document.")]


def typed(context: typer.Context, **options: Any) -> dict[str, Any]:
    """Returns those of a command's options that stand on its command line: they count before ``--config``."""
    return {name: value for name, value in options.items() if is_typed(context, name)}
