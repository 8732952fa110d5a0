"""What commands share: options of the client's, the connection, and where they print."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from clients.http import Client
    from clients.settings import ClientSettings

Url = Annotated[
    str | None,
    typer.Option("--url", envvar="ABMLL_URL", show_default="http://127.0.0.1:8000", help="The server's address."),
]
Timeout = Annotated[
    float | None,
    typer.Option(
        min=0.1, envvar="ABMLL_CLIENT_TIMEOUT", show_default="70", help="Longest wait for a reply, in seconds."
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help=r"TOML file; its table \[client] may say url, timeout and key."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the server's reply as JSON.")]


def is_typed(context: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def settings_of(url: str | None, timeout: float | None, config: Path | None) -> ClientSettings:
    """Reads the client's settings: options, the environment, a file, else the defaults.

    Raises:
        InvalidSettings: A key is unknown, or a value of the wrong type or out of range.
    """
    from clients.config import load
    from clients.settings import ClientSettings

    return load(ClientSettings, "client", {"url": url, "timeout": timeout}, config).settings


def complete_task(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of a running server's tasks that begin so; none where no server answers at once."""
    params: dict[str, Any] = ctx.params
    try:
        settings = settings_of(params.get("url"), 2.0, params.get("config"))
        with client_of(settings) as client:
            return [row.task for row in client.tasks() if row.task.startswith(incomplete)]
    except Exception:  # whatever it is, a shell in the middle of a line must not see it
        return []


Task = Annotated[
    str,
    typer.Option("--task", "-t", help="Task to ask, as `abmll tasks` lists them.", autocompletion=complete_task),
]


def console(stderr: bool = False) -> Console:
    """Where to print; colours on a terminal alone, and not with NO_COLOR."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


def coloured(screen: Console) -> bool:
    """Says whether colours are seen there."""
    return screen.is_terminal and not screen.no_color


def client_of(settings: ClientSettings) -> Client:
    """Returns a client of the server that the settings name."""
    from clients.http import Client

    key = None if settings.key is None else settings.key.get_secret_value()
    return Client(settings.url, timeout=settings.timeout, key=key)


@contextmanager
def connected(url: str | None, timeout: float | None, config: Path | None) -> Generator[Client]:
    """Gives a client; its errors become one line and exit status 2 (the input is wrong) or 1 (all else)."""
    from clients.errors import (
        AccessDenied,
        ClientError,
        InvalidArgument,
        InvalidFile,
        NotFound,
        RequestRejected,
        ServerUnreachable,
    )

    begun = False
    try:
        with client_of(settings_of(url, timeout, config)) as client:
            begun = True
            yield client
    except ClientError as error:
        hint = ""
        if isinstance(error, ServerUnreachable) and begun:  # else the address is none, and the message says so
            hint = "; start it with `make serve`, or name another with --url"
        elif isinstance(error, AccessDenied):
            hint = "; put the key into ABMLL_KEY"
        elif isinstance(error, NotFound) and error.type == "TaskNotFound":
            hint = "; `abmll tasks` lists what there is"
        from clients.render import printable

        typer.echo(f"abmll: {printable(str(error))}{hint}", err=True)
        wrong_input = not begun or isinstance(error, InvalidArgument | InvalidFile | NotFound | RequestRejected)
        raise typer.Exit(2 if wrong_input else 1) from None
