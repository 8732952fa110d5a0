"""The commands ``abmll config``: what settings count, and where they come from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel, SecretStr

from server.options import ConfigFile, load_settings, told, with_settings
from server.settings import Settings

_SECRET = re.compile(r"(token|key|secret|password)$", re.IGNORECASE)
_USER = re.compile(r"//[^/@\s]*@")
_HIDDEN = "********"


def register(app: typer.Typer) -> None:
    """Adds ``abmll config`` to the command line."""
    config = typer.Typer(help="Show settings and where they come from, or begin a file of them.", no_args_is_help=True)
    config.command("show")(with_settings(show_command))
    config.command("path")(path_command)
    config.command("init")(init_command)
    app.add_typer(config, name="config")


def show_command(
    options: dict[str, Any],
    *,
    config: ConfigFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Show every setting, its value, and where that comes from.

    Takes the options of `abmll serve` too, and shows what they would do.
    """
    rows = list(_rows(options, config))
    if as_json:
        told_rows = [{key: value for key, value in row.items() if key != "shown"} for row in rows]
        typer.echo(json.dumps(told_rows, indent=2, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for head in ("setting", "value", "from"):
        table.add_column(head, overflow="fold")
    for row in rows:
        shown = row["shown"] if isinstance(row["shown"], str) else json.dumps(row["shown"], ensure_ascii=False)
        style = "dim" if row["from"] == "default" else ""
        table.add_row(Text(f"{row['table']}.{row['name']}", style), Text(shown, style), Text(row["from"], style))
    Console(highlight=False).print(table)


def path_command(config: ConfigFile = None) -> None:
    """Print the path of the file of settings that counts."""
    from clients.config import FILE, FILE_VARIABLE, InvalidSettings, find_file

    found = find_file(config)
    if found is None:
        raise InvalidSettings(
            f"there is no {FILE} here, and {FILE_VARIABLE} names no file; `abmll config init` makes one"
        )
    typer.echo(found.absolute())


def init_command(
    file: Annotated[Path, typer.Argument(help="The file to make.")] = Path("abmll.toml"),
) -> None:
    """Write a file with every setting, its default commented out."""
    from abmll.errors import AbmllError
    from clients.settings import ClientSettings

    lines = ["# Settings of abmll; `abmll config show` tells which count. Options and ABMLL_* variables come first."]
    for table, model in (("serve", Settings), ("client", ClientSettings)):
        lines += ["", f"[{table}]", *_commented(model)]
    try:
        with file.open("x", encoding="utf-8") as stream:
            stream.write("\n".join(lines) + "\n")
    except FileExistsError:
        raise AbmllError(f"{file} is there already; change it, or name another file", field="file") from None
    except (FileNotFoundError, NotADirectoryError):
        raise AbmllError(f"there is no folder {file.parent}; make it, or name another file", field="file") from None
    typer.echo(f"wrote {file}")


def _rows(options: dict[str, Any], config: Path | None) -> Iterator[dict[str, Any]]:
    from clients.config import load
    from clients.settings import ClientSettings

    for table, loaded in (
        ("serve", load_settings(options, config)),
        ("client", load(ClientSettings, "client", {}, config)),
    ):
        for name, field in type(loaded.settings).model_fields.items():
            value = _shown(getattr(loaded.settings, name))
            default = told(field)[1] or "none"
            yield {
                "table": table, "name": name, "value": value, "from": loaded.origins[name],
                "shown": f"({default})" if value in (None, {}) else value,
            }  # fmt: skip


def _shown(value: Any) -> Any:
    """A value as JSON has it, without what must not be seen."""
    if isinstance(value, SecretStr):
        return _HIDDEN
    if isinstance(value, Mapping):
        return {key: _HIDDEN if _SECRET.search(str(key)) else _shown(item) for key, item in value.items()}
    if isinstance(value, Path):
        return str(value)
    return _USER.sub(f"//{_HIDDEN}@", value) if isinstance(value, str) else value


def _commented(model: type[BaseModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        text, default = told(field)
        yield f"# {text[:1].upper()}{text[1:]}{f' (default: {default})' if default else ''}."
        value = _shown(field.default)
        yield f"# {name} = {'...' if default or value in (None, {}) else json.dumps(value)}"
