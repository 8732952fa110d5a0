"""The command ``abmll draws``: draws of a posterior as ordinary LoRA adapters, for any other server of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from abmll.errors import AbmllError, InvalidPosterior
from server.options import ConfigFile, load_settings

if TYPE_CHECKING:
    from abmll.store import StoredPosterior

INDEX = "draws.json"


def register(app: typer.Typer) -> None:
    """Adds ``abmll draws`` to the command line."""
    app.command("draws")(draws_command)


def draws_command(
    source: Annotated[str, typer.Argument(metavar="TASK|FOLDER", help="A task of the store, or a posterior's folder.")],
    out: Annotated[Path, typer.Option(help="Folder to make, with an adapter's folder for each draw.")],
    draws: Annotated[int, typer.Option(min=1, help="How many draws.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Seed: draw s of a posterior and a seed is always the same.")] = 0,
    store: Annotated[
        Path | None, typer.Option(show_default="as for abmll serve", help="Folder of task posteriors.")
    ] = None,
    version: Annotated[
        int | None, typer.Option(min=1, show_default="the one that is served", help="Version of the task.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it is there.")] = False,
    config: ConfigFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Write draws of a posterior as LoRA adapters, which PEFT reads, and any server of LoRA adapters serves."""
    if out.exists() and not force:
        raise AbmllError(f"{out} is there already; name another folder, or give --force to replace it", field="out")
    if out.exists() and not (out / INDEX).is_file():
        raise AbmllError(f"{out} holds no draws ({INDEX} is missing); --force replaces draws alone", field="out")
    stored = _open(source, version, store, config)
    document = export(stored, out, draws, seed)
    if as_json:
        typer.echo(json.dumps(document | {"folder": str(out)}, indent=2))
    else:
        for adapter in document["adapters"]:
            typer.echo(out / adapter)


def export(stored: StoredPosterior, out: Path, draws: int, seed: int) -> dict[str, Any]:
    """Writes draws into a folder that appears whole; one that is there is replaced.

    Args:
        stored: The posterior.
        out: The folder.
        draws: How many draws.
        seed: Their seed.

    Returns:
        What the folder's ``draws.json`` says.

    Raises:
        InvalidPosterior: A draw is not finite.
        StoreFailure: The disk is full or not writable; nothing is left behind.
    """
    import torch

    from abmll.draws import draw, save_adapter
    from abmll.store import replaced

    posterior = stored.posterior
    names = [f"draw-{index}" for index in range(draws)]
    document = {
        "task": stored.record.task,
        "version": stored.record.version,
        "posterior": stored.digest,
        "base_model": posterior.config.base_model,
        "base_revision": posterior.config.base_revision,
        "family": posterior.config.family,
        "rank": posterior.config.draw_rank,
        "seed": seed,
        "adapters": names,
    }
    with replaced(out) as made:
        for index, name in enumerate(names):
            factors = draw(posterior, seed, index)
            if not all(bool(torch.isfinite(t).all()) for pair in factors.values() for t in pair):
                raise InvalidPosterior(f"draw {index} of {stored.record.task} is not finite; adapt the task again")
            save_adapter(factors, posterior, made / name)
            for file in (made / name).iterdir():
                file.chmod(0o644)  # safetensors writes for the owner alone; another user's server may read it
        (made / INDEX).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return document


def _open(source: str, version: int | None, store: Path | None, config: Path | None) -> StoredPosterior:
    from abmll.store import load_posterior

    if store is None and (Path(source) / "posterior.json").is_file():
        if version is not None:
            raise AbmllError(
                f"{source} is a folder of a posterior, which takes no --version; leave it out, or name with --store "
                "where the task is",
                field="version",
            )
        return load_posterior(Path(source))
    from server.store import TaskStore

    settings = load_settings({"store": store}, config).settings
    if not (settings.store / "tasks").is_dir() and source != "global":
        raise AbmllError(
            f"{source} is no folder of a posterior, and there is no store {settings.store}; name one with --store",
            field="store",
        )
    prior = load_posterior(settings.global_posterior)
    if source == "global":
        if version not in (None, prior.record.version):
            raise AbmllError(f"the global posterior has version {prior.record.version} alone", field="version")
        return prior
    return TaskStore(settings.store, prior).choose(source, version, 0.0)
