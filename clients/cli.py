"""The commands ``abmll ask``, ``score``, ``tasks`` and ``teach``.

Signatures stand here; the HTTP client is imported inside, so that ``--help`` stays quick.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from clients.http import Client
    from clients.replies import Job

_Url = Annotated[
    str | None,
    typer.Option("--url", envvar="ABMLL_URL", show_default="http://127.0.0.1:8000", help="The server's address."),
]
_Json = Annotated[bool, typer.Option("--json", help="Print the server's reply as JSON.")]
_Task = Annotated[str, typer.Option("--task", "-t", help="Task to ask, as `abmll tasks` lists them.")]
_Timeout = Annotated[float, typer.Option(min=0.1, help="Longest wait for a reply, in seconds.")]


def register(app: typer.Typer) -> None:
    """Adds the client's commands to the command line."""
    app.command("ask")(ask_command)
    app.command("score")(score_command)
    app.command("tasks")(tasks_command)
    app.command("teach")(teach_command)


def ask_command(
    prompt: Annotated[str, typer.Argument(help="The question; - reads it from the standard input.")],
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", help="An answer to choose from; repeat. None: free text.")
    ] = None,
    task: _Task = "global",
    draws: Annotated[str, typer.Option(help="Draws from the posterior: a number, or auto: what settles it.")] = "auto",
    tolerance: Annotated[
        float, typer.Option(min=0, max=1, help="With auto draws: what more of them may move the confidence by.")
    ] = 0.02,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draws: same question, same answer.")] = 0,
    abstain_below: Annotated[
        float | None, typer.Option(min=0, max=1, show_default="always answer", help="Least confidence of an answer.")
    ] = None,
    target_risk: Annotated[
        float | None,
        typer.Option(min=0, max=1, show_default="always answer", help="Largest share of questions to answer wrongly."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest free-text answer, in tokens.")] = 32,
    stop: Annotated[
        list[str] | None, typer.Option(help="Where a free-text answer ends; repeat. \\n is a line's end.")
    ] = None,
    temperature: Annotated[
        float, typer.Option(min=0, max=2, help="Of a free-text answer: 0 takes the likeliest token each time.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.001, max=1, help="Free text of the likeliest tokens with this probability.")
    ] = 1.0,
    samples: Annotated[
        int, typer.Option(min=0, max=32, help="Further free-text answers: does the model agree with itself?")
    ] = 0,
    meaning: Annotated[
        Literal["normalized", "entailment"],
        typer.Option(help="Samples mean the same if equal but for case and marks, or if the model finds that they do."),
    ] = "normalized",
    normalize: Annotated[
        Literal["sum", "mean"] | None,
        typer.Option(
            show_default="as trained", help="Score options by whole log-probability (sum), or its mean per token."
        ),
    ] = None,
    url: _Url = None,
    timeout: _Timeout = 60.0,
    as_json: _Json = False,
) -> None:
    """Ask a question and see how sure the answer is."""
    from clients import render

    text = sys.stdin.read() if prompt == "-" else prompt
    with _connected(url, timeout) as client:
        reply = client.generate(
            text,
            task=task,
            options=option or None,
            draws=_draws(draws),
            tolerance=tolerance,
            seed=seed,
            abstain_below=abstain_below,
            target_risk=target_risk,
            max_tokens=max_tokens,
            stop=[text.replace("\\n", "\n") for text in stop or []],
            temperature=temperature,
            top_p=top_p,
            samples=samples,
            meaning=meaning,
            tokens=not option,
            normalize=normalize,
        )
    if as_json:
        typer.echo(reply.model_dump_json(indent=2))
    else:
        _console().print(render.answer(reply, option))


def score_command(
    prompt: Annotated[str, typer.Argument(help="The question.")],
    answer: Annotated[str, typer.Argument(help="A finished answer to it; - reads it from the standard input.")],
    task: _Task = "global",
    draws: Annotated[str, typer.Option(help="Draws from the posterior: a number, or auto.")] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draws: same texts, same scores.")] = 0,
    end: Annotated[bool, typer.Option(help="Whether the answer ends there, or may go on.")] = True,
    url: _Url = None,
    timeout: _Timeout = 60.0,
    as_json: _Json = False,
) -> None:
    """Score a finished answer, from another model or a person, and see where in it the doubt lies."""
    from clients import render

    text = sys.stdin.read() if answer == "-" else answer
    with _connected(url, timeout) as client:
        reply = client.score(prompt, text, task=task, draws=_draws(draws), seed=seed, end=end)
    if as_json:
        typer.echo(reply.model_dump_json(indent=2))
    else:
        _console().print(render.answer(reply, None))


def tasks_command(url: _Url = None, timeout: _Timeout = 60.0, as_json: _Json = False) -> None:
    """List the tasks that the server knows."""
    from clients import render

    with _connected(url, timeout) as client:
        rows = client.tasks()
    if as_json:
        typer.echo(json.dumps([row.model_dump(exclude_unset=True) for row in rows], indent=2, ensure_ascii=False))
    else:
        _console().print(render.tasks(rows))


def teach_command(
    task: Annotated[str, typer.Argument(help="Name of the task to make, or to make anew.")],
    file: Annotated[
        Path,
        typer.Argument(
            help='JSON Lines, 1 to 64 examples: {"prompt": ..., "options": [...], "answer": ...}; free text: no options'
        ),
    ],
    steps: Annotated[int | None, typer.Option(min=1, help="Gradient steps; as in meta-training by default.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed: same examples, same posterior.")] = 0,
    url: _Url = None,
    timeout: _Timeout = 60.0,
    as_json: _Json = False,
) -> None:
    """Teach a task from labelled examples and follow the job."""
    from clients import render
    from clients.calls import require_done
    from clients.examples import read_examples

    with _connected(url, timeout) as client:
        examples = read_examples(file)
        job = client.adapt(task, examples, steps=steps, seed=seed)
        try:
            job = _follow(client, job)
        except KeyboardInterrupt:
            address = f"{(url or _default_url()).rstrip('/')}/adapt/{job.job}"
            _console(stderr=True).print(
                f"not watching any more; job {job.job} runs on at the server\n"
                f"  look:   curl {address}\n  cancel: curl -X DELETE {address}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
            raise typer.Exit(130) from None
        require_done(job)
    if as_json:
        typer.echo(job.model_dump_json(indent=2))
    else:
        version = "" if job.posterior is None else f" (version {job.posterior.version})"
        typer.echo(f"{task}{version} is taught from {len(examples)} examples. Ask it:")
        typer.echo(f"  {render.how_to_ask(task, examples[0])}")


def _follow(client: Client, job: Job) -> Job:
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=_console(stderr=True)) as progress:
        shown = progress.add_task(job.status, total=1.0)
        for seen in client.follow(job, poll=0.25):
            progress.update(shown, completed=seen.progress, description=seen.status)
            job = seen
    return job


def _draws(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise typer.BadParameter(f"{text!r} is neither auto nor a number above 0", param_hint="--draws")


def _default_url() -> str:
    from clients.connection import DEFAULT_URL

    return DEFAULT_URL


def _console(stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


@contextmanager
def _connected(url: str | None, timeout: float) -> Generator[Client]:
    """Gives a client; its errors become one line and exit status 2 (the input is wrong) or 1 (all else)."""
    from clients.errors import AccessDenied, ClientError, InvalidFile, NotFound, RequestRejected, ServerUnreachable
    from clients.http import Client

    try:
        with Client(url, timeout=timeout) as client:
            yield client
    except ClientError as error:
        hint = ""
        if isinstance(error, ServerUnreachable):
            hint = "; start it with `make serve`, or name another with --url"
        elif isinstance(error, AccessDenied):
            hint = "; put the key into ABMLL_KEY"
        elif isinstance(error, NotFound) and error.type == "TaskNotFound":
            hint = "; `abmll tasks` lists what there is"
        typer.echo(f"abmll: {error}{hint}", err=True)
        wrong_input = isinstance(error, InvalidFile | NotFound | RequestRejected)
        raise typer.Exit(2 if wrong_input else 1) from None
