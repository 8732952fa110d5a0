"""The commands ``abmll ask``, ``score``, ``tasks`` and ``teach``.

Signatures stand here and beside; the HTTP client is imported inside, so that ``--help`` stays quick.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clients.ask_commands import ask_command, score_command
from clients.command_line import ConfigFile, Json, Timeout, Url, connected, console, settings_of

if TYPE_CHECKING:
    from clients.http import Client
    from clients.replies import Job


def register(app: typer.Typer) -> None:
    """Adds the client's commands to the command line."""
    app.command("ask")(ask_command)
    app.command("score")(score_command)
    app.command("tasks")(tasks_command)
    app.command("teach")(teach_command)


def tasks_command(url: Url = None, timeout: Timeout = None, config: ConfigFile = None, as_json: Json = False) -> None:
    """List the tasks that the server knows."""
    from clients import render

    with connected(url, timeout, config) as client:
        rows = client.tasks()
    if as_json:
        typer.echo(json.dumps([row.model_dump(exclude_unset=True) for row in rows], indent=2, ensure_ascii=False))
    else:
        console().print(render.tasks(rows))


def teach_command(
    task: Annotated[str, typer.Argument(help="Name of the task to make, or to make anew.")],
    file: Annotated[
        Path,
        typer.Argument(
            help='JSON Lines, 1 to 64 examples: {"prompt": ..., "options": [...], "answer": ...}; free text: no options'
        ),
    ],
    steps: Annotated[
        int | None, typer.Option(min=1, help="Gradient steps; default: as in meta-training, more for many examples.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed: same examples, same posterior.")] = 0,
    url: Url = None,
    timeout: Timeout = None,
    config: ConfigFile = None,
    as_json: Json = False,
) -> None:
    """Teach a task from labelled examples and follow the job."""
    from clients import render
    from clients.calls import require_done
    from clients.errors import ClientError, NotFound
    from clients.examples import read_examples

    with connected(url, timeout, config) as client:
        examples = read_examples(file)
        job = client.adapt(task, examples, steps=steps, seed=seed)
        try:
            job = _follow(client, job)
        except NotFound:  # there is none to look at
            raise
        except (KeyboardInterrupt, ClientError) as error:
            goes_on = "may run on" if isinstance(error, ClientError) else "runs on"
            settings = settings_of(url, timeout, config)
            key = "" if settings.key is None else '-H "Authorization: Bearer $ABMLL_KEY" '
            address = f"{key}{settings.url.rstrip('/')}/adapt/{job.job}"
            console(stderr=True).print(
                f"not watching any more; job {job.job} {goes_on} at the server\n"
                f"  look:   curl {address}\n  cancel: curl -X DELETE {address}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
            if isinstance(error, ClientError):
                raise
            raise typer.Exit(130) from None
        require_done(job)
    if as_json:
        typer.echo(job.model_dump_json(indent=2))
    else:
        version = "" if job.posterior is None else f" (version {job.posterior.version})"
        typer.echo(f"{task}{version} is taught from {len(examples)} examples. Ask it:")
        typer.echo(f"  {render.how_to_ask(task, examples[0])}")


def _follow(client: Client, job: Job) -> Job:
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console(stderr=True)) as progress:
        shown = progress.add_task(job.status, total=1.0)
        for seen in client.follow(job, poll=0.25):
            progress.update(shown, completed=seen.progress, description=seen.status)
            job = seen
    return job
