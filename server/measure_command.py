"""The command ``abmll measure``: a served task, counted on labelled questions that it was not taught."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from clients.command_line import ConfigFile, Timeout, Url, complete_task, connected, console
from training.settings import SEED_LIMIT

if TYPE_CHECKING:
    from abmll.examples import Example
    from clients.errors import ClientError
    from clients.replies import Answer
    from server.held_out import Counted, HeldOutMeasures, Share

T = TypeVar("T")


def register(app: typer.Typer) -> None:
    """Adds ``abmll measure`` to the command line."""
    app.command("measure")(measure_command)


def measure_command(
    task: Annotated[str, typer.Argument(help="Task to ask.", autocompletion=complete_task)],
    file: Annotated[
        Path, typer.Argument(help="JSON Lines as for `abmll teach`, any number of lines, none of them taught.")
    ],
    version: Annotated[
        int | None, typer.Option(min=1, show_default="the one that is served", help="Version of the task.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=SEED_LIMIT - 1, help="Seed of the draws.")] = 0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest free-text answer, in tokens.")] = 32,
    at_once: Annotated[int, typer.Option(min=1, max=256, help="Questions under way at the same time.")] = 8,
    feedback: Annotated[
        bool,
        typer.Option("--feedback", help="Tell the server what was right, too: for reliability and recalibration."),
    ] = False,
    url: Url = None,
    timeout: Timeout = None,
    config: ConfigFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the measures as JSON.")] = False,
) -> None:
    """Ask a task labelled questions, and count whether its confidence holds.

    Where the server stops answering, what it has answered until then is counted.
    """
    from clients.render import printable
    from server.held_out import is_right, measure
    from training.tasks import read_examples

    rows = read_examples(file)
    stopped = Event()
    with connected(url, timeout, config) as client:

        def ask(row: Example) -> Answer:
            options = None if row.is_free_text else row.options
            reply = _patiently(
                lambda: client.generate(
                    row.prompt, task=task, version=version, options=options, seed=seed, max_tokens=max_tokens
                ),
                stopped,
            )
            if feedback:
                said: dict[str, Any] = {"answer": row.answer}
                if row.is_free_text:
                    said = {"correct": is_right(row, reply)}
                _patiently(lambda: client.feedback(reply, **said), stopped)
            return reply

        client.task(task)  # a server that is not there is told at once
        counted, error = _ask_all(rows, ask, file, at_once, stopped)
        if error is not None and not counted:
            raise error
    found = measure([row for row, _ in counted], [answer for _, answer in counted])
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
    else:
        console().print(as_text(found), markup=False, soft_wrap=True)
    if error is not None:
        asked = f"asked {len(counted)} of {len(rows)} questions, which are counted above, then stopped"
        typer.echo(f"abmll: {asked}: {printable(str(error))}", err=True)
        raise typer.Exit(1)


def _ask_all(
    rows: Sequence[Example], ask: Callable[[Example], Answer], file: Path, at_once: int, stopped: Event
) -> tuple[list[tuple[Example, Answer]], ClientError | None]:
    """Asks all questions, in their order, until one is not answered.

    Returns:
        Those that were answered, and why the others were not.

    Raises:
        InvalidFile: A question is one that cannot be asked.
    """
    from rich.progress import track

    from clients.errors import ClientError, InvalidArgument, InvalidFile, RequestRejected

    def numbered(number: int, row: Example) -> Answer:
        try:
            return ask(row)
        except (InvalidArgument, RequestRejected) as error:
            raise InvalidFile(f"{file}, question {number}: {error}") from error

    screen = console(stderr=True)
    with ThreadPoolExecutor(at_once) as threads:
        under_way = [threads.submit(numbered, number, row) for number, row in enumerate(rows, start=1)]
        try:
            shown = track(under_way, "asking", console=screen, disable=not screen.is_terminal)
            return list(zip(rows, [each.result() for each in shown], strict=True)), None
        except InvalidFile:
            raise
        except ClientError as error:
            why = error
        finally:
            stopped.set()
            threads.shutdown(cancel_futures=True)
    answered = [each.done() and not each.cancelled() and each.exception() is None for each in under_way]
    return [(row, each.result()) for row, each, told in zip(rows, under_way, answered, strict=True) if told], why


def _patiently(call: Callable[[], T], stopped: Event) -> T:
    """Calls again while the server is overloaded, starts anew, or has had too many requests of this key."""
    from clients.connection import Patience
    from clients.errors import ServerUnavailable, ServerUnreachable

    patience = Patience(1.0)
    while True:
        try:
            return call()
        except (ServerUnavailable, ServerUnreachable) as error:
            if stopped.wait(patience.pause(error)):
                raise


def as_text(found: HeldOutMeasures) -> str:
    """The measures as a person reads them."""
    answered = ", ".join(map(str, found.versions))
    kind = " in free text" if found.free_text else ""
    lines = [f"{found.task} version {answered}: {found.questions} questions{kind}", ""]
    lines.append(f"right             {_percent(found.accuracy)}   {_interval(found)}")
    lines.append(f"mean confidence   {_percent(found.confidence)}")
    lines.append(f"ECE               {100 * found.ece:5.1f} points   {_verdict(found)}")
    lines.append(f"NLL               {found.nll:7.3f} nats")
    lines.append(f"Brier             {found.brier:7.3f}")
    if found.auroc is not None:
        lines.append(f"AUROC             {found.auroc:7.3f}   of confidence, for telling right from wrong answers")
    if found.set_coverage is not None:
        held, size = _percent(found.set_coverage), f"{found.set_size:.2f} options each"
        lines.append(f"prediction sets   {held}   hold the right option; {size}")
    lines.append(f"draws             {found.draws:7.1f}")
    if found.uncalibrated:
        lines.append(f"not calibrated    {found.uncalibrated} answers: their confidence promises nothing")
    lines += ["", *_table("confidence", [(_bounds(share), share) for share in found.bins], found.questions)]
    lines += ["", *_table("if answered", [(_from(share), share) for share in found.at_least], found.questions)]
    return "\n".join(lines)


def _verdict(found: HeldOutMeasures) -> str:
    bound = f"{100 * found.ece_by_chance:.1f}"
    if found.ece <= found.ece_by_chance:
        return f"no sign that confidence is off: up to {bound} would be chance, with so many answers"
    how = "too sure" if found.confidence > found.accuracy else "too doubtful"
    if found.accuracy_low <= found.confidence <= found.accuracy_high:
        how = "off, though not on average (see the table)"
    return f"{how}: were confidence true, it would be above {bound} in 5 % of cases only"


def _table(head: str, rows: Sequence[tuple[str, Share]], questions: int) -> list[str]:
    lines = [f"{head:<16}  answers       of all      said     right   95 % interval"]
    for name, share in rows:
        of_all = _percent(share.answers / questions)
        lines.append(
            f"{name:<16}  {share.answers:7}  {of_all:>11}  {_percent(share.confidence):>8}  "
            f"{_percent(share.accuracy):>8}   {_interval(share)}"
        )
    return lines


def _bounds(share: Share) -> str:
    return f"{100 * share.low:3.0f} to {100 * share.high:3.0f} %"


def _from(share: Share) -> str:
    return f"from {100 * share.low:.0f} % on" if share.low else "always"


def _interval(counted: Counted) -> str:
    return f"{100 * counted.accuracy_low:.1f} to {100 * counted.accuracy_high:.1f} %"


def _percent(value: float) -> str:
    return f"{100 * value:5.1f} %"
