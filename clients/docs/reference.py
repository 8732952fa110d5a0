"""Pages that are made of the code: the command line, and tables of settings, errors and metrics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import typer
from typer.cli import get_docs_for_click

from abmll.errors import AbmllError, ClientGone, HubFailure
from clients.config import variables
from clients.docs.markdown_tables import table
from clients.settings import ClientSettings
from server.cli import create_cli
from server.errors import STATUS
from server.metrics import Metrics, Snapshot
from server.options import told
from server.settings import Settings


def commands() -> str:
    """The command line's help, as Typer writes it."""
    cli = typer.main.get_command(create_cli())
    _tell_whole(cli)
    context = typer.Context(cli, info_name="abmll")
    with context:
        text = get_docs_for_click(obj=cli, ctx=context, indent=1, name="abmll")
    return text.replace("\\[", "[")  # Rich's escape


def _tell_whole(command: Any) -> None:
    """Has lists of commands tell all of each one's first paragraph, where a terminal has room for its beginning."""
    for below in getattr(command, "commands", {}).values():
        below.short_help = " ".join((below.help or "").split("\n\n")[0].split())
        _tell_whole(below)


def settings() -> str:
    """A table for each part of the settings."""
    parts: list[str] = []
    for title, part, model in (("The server", "serve", Settings), ("The client", "client", ClientSettings)):
        names = variables(model, part)
        rows: list[Sequence[str]] = []
        for name, field in model.model_fields.items():
            text, default = told(field)
            shown = default or ("none" if field.default is None else f"`{field.default}`")
            rows.append((f"`{name}`", ", ".join(f"`{each}`" for each in names[name]), shown, text))
        parts.append(f"### {title}: `[{part}]`\n\n" + table(("key", "environment", "default", "what"), rows))
    return "\n\n".join(parts)


def errors() -> str:
    """A table of the errors that a reply can tell of."""
    rows: list[tuple[str, str, str]] = []
    for kind in _kinds(AbmllError):
        status = next(status for base, status in STATUS if issubclass(kind, base))
        if kind not in (ClientGone, HubFailure):  # nobody reads the one, and the other ends a command
            rows.append((str(status), f"`{kind.__name__}`", (kind.__doc__ or "").split("\n\n")[0]))
    return table(("status", "type", "what it means"), sorted(rows))


def metrics() -> str:
    """A table of the metrics of our own."""
    registered = Metrics()
    registered.watch(_nothing_yet, "torch")
    rows = [
        (f"`{family.name}`", family.type, family.documentation)
        for family in sorted(registered.registry.collect(), key=lambda family: family.name)
    ]
    return table(("metric", "type", "what"), rows)


def _kinds(base: type[AbmllError]) -> Iterator[type[AbmllError]]:
    """The errors of ``abmll.errors`` below this one, each once."""
    for kind in base.__subclasses__():
        if kind.__module__ == AbmllError.__module__:
            yield kind
            yield from _kinds(kind)


def _nothing_yet() -> Snapshot:
    return Snapshot(
        engine=None, waiting=0, inside=0, refused=0, disk=(0, 0), tasks=0, jobs={}, done=0, seconds=0.0,
        questions_again=0, windows=[], promised={}, engine_restarts=0, worker_restarts=0,
    )  # fmt: skip
