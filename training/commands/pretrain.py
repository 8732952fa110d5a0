"""The command ``abmll pretrain``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from training.commands.document import print_json
from training.commands.options import ConfigFile, Device, Json, Pins, SplitFile, Tasks, typed
from training.commands.parts import chosen_split
from training.settings import SEED_LIMIT, checked, choose_device, read_toml


def pretrain_command(
    ctx: typer.Context,
    books: Annotated[Path, typer.Option(help="Folder of book shards (*.txt.xz).")],
    tasks: Tasks,
    out: Annotated[Path, typer.Option(help="Model folder to make.")],
    split: SplitFile = None,
    seed: Annotated[int, typer.Option(min=0, max=SEED_LIMIT - 1, help="Seed of the split and of training.")] = 0,
    pin: Pins = None,
    minutes: Annotated[float, typer.Option(help="Wall-clock budget.")] = 60.0,
    start: Annotated[Path | None, typer.Option(help="Go on from this folder, which pretrain made.")] = None,
    config: ConfigFile = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Train a small Llama-architecture base model and its tokenizer from scratch."""
    from training.base.pretrain import PretrainConfig, pretrain
    from training.tasks import load_tasks

    values = {"minutes": minutes, "seed": seed} | read_toml(config) | typed(ctx, minutes=minutes, seed=seed)
    settings = checked(PretrainConfig, values)
    loaded = load_tasks(tasks)
    chosen = chosen_split(loaded, split, settings.seed, pin, out.with_name(out.name + ".split.json"))
    pretrain(books, loaded, chosen, out, settings, start=start, device=choose_device(device))
    if as_json:
        print_json({"folder": out})
    else:
        typer.echo(f"wrote {out}")
