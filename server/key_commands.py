"""The commands ``abmll keys``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.options import load_settings

if TYPE_CHECKING:
    from server.keys import Keys

_DEFAULT = "abmll-keys.sqlite3"
_File = Annotated[
    Path | None,
    typer.Option(
        "--keys",
        envvar="ABMLL_KEY_FILE",
        show_default=f"as in abmll.toml, else {_DEFAULT}",
        help="File of the keys.",
    ),
]
_Json = Annotated[bool, typer.Option("--json", help="Print as JSON.")]


def register(app: typer.Typer) -> None:
    """Adds ``abmll keys`` to the command line."""
    keys = typer.Typer(help="Make, list and revoke API keys for `abmll serve --keys`.", no_args_is_help=True)
    keys.command("add")(add_command)
    keys.command("list")(list_command)
    keys.command("revoke")(revoke_command)
    app.add_typer(keys, name="keys")


def add_command(
    name: Annotated[str, typer.Argument(help="Whose key it is; stands in the log.")],
    rights: Annotated[
        str, typer.Option(help="Joined by commas: query (ask), adapt (make tasks), admin (delete tasks).")
    ] = "query",
    rate: Annotated[
        str | None, typer.Option(show_default="any number", help="Most requests in a time, such as 600/minute.")
    ] = None,
    file: _File = None,
    as_json: _Json = False,
) -> None:
    """Make a key, and show it this once."""
    wanted = [right.strip() for right in rights.split(",")]
    secret = _keys(file).add(name, wanted, rate)
    if as_json:
        _print({"name": name, "rights": sorted(set(wanted)), "rate": rate, "key": secret})
    else:
        typer.echo(secret)


def list_command(file: _File = None, as_json: _Json = False) -> None:
    """List the keys, without their secrets."""
    found = _keys(file).all()
    if as_json:
        _print([key.model_dump(mode="json") | {"rights": sorted(key.rights)} for key in found])
        return
    for key in found:
        rights = ",".join(sorted(key.rights))
        typer.echo(f"{key.name}\t{rights}\t{key.rate or 'any number'}\t{key.created}")


def revoke_command(
    name: Annotated[str, typer.Argument(help="The key's name.")],
    file: _File = None,
    as_json: _Json = False,
) -> None:
    """End a key at once, in a running server too."""
    _keys(file).revoke(name)
    if as_json:
        _print({"revoked": name})


def _keys(file: Path | None) -> Keys:
    from server.keys import Keys

    return Keys(file or load_settings({}, None).settings.keys or Path(_DEFAULT))


def _print(document: Any) -> None:
    typer.echo(json.dumps(document, indent=2, ensure_ascii=False))
