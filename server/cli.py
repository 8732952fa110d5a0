"""The command ``abmll``: where the packages' commands come together.

Signatures stand here and in the modules of the commands; whatever needs torch or vLLM is imported inside, so that
``--help`` stays quick.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer

import clients.cli
import server.config_commands
import server.doctor
import server.draws_command
import server.key_commands
import server.measure_command
import training.cli
from abmll.errors import AbmllError, DeadlineExceeded, EngineFailure, HubFailure, StoreFailure
from clients.errors import ClientError
from server.options import ConfigFile, load_settings, with_settings
from server.plan_command import plan_command

_EPILOG = "Exit status: 0 done, 1 failed, 2 wrong input, 130 interrupted."
_SETTINGS = (
    "Each option may also stand in the environment, --max-draws as ABMLL_MAX_DRAWS (--keys also as ABMLL_KEY_FILE), "
    r"or as max_draws in the table \[serve] of a TOML file; `abmll config show` tells what counts."
)
# Ours, but not the input's fault.
_FAILURES = (EngineFailure, HubFailure, StoreFailure, DeadlineExceeded)


def serve_command(options: dict[str, Any], *, config: ConfigFile = None) -> None:
    """Serve the model over HTTP."""
    settings = load_settings(options, config).settings
    from server.run import run

    raise typer.Exit(run(settings))


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"abmll {version('abmll')}")
        raise typer.Exit


def main_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Language-model answers with a calibrated confidence."""


def create_cli() -> typer.Typer:
    """Returns the command line with all commands."""
    app = typer.Typer(name="abmll", no_args_is_help=True, pretty_exceptions_enable=False, epilog=_EPILOG)
    app.callback()(main_command)
    app.command("serve", epilog=_SETTINGS)(with_settings(serve_command))
    clients.cli.register(app)
    training.cli.register(app)
    server.measure_command.register(app)
    server.draws_command.register(app)
    app.command("plan")(plan_command)
    server.key_commands.register(app)
    server.config_commands.register(app)
    server.doctor.register(app)
    return app


def main() -> None:
    """Runs the command line; what went wrong is one line, with status 2 where the input is at fault, else 1."""
    try:
        create_cli()()
    except BrokenPipeError:  # `abmll ... | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except AbmllError as error:
        _end(error.message, 1 if isinstance(error, _FAILURES) else 2)
    except ClientError as error:
        _end(str(error), 2)
    except OSError as error:
        _end(f"{error}; free space, or check the path and its permissions", 1)


def _end(message: str, status: int) -> None:
    print(f"abmll: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
