"""The commands ``abmll ask`` and ``abmll score``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from clients.command_line import ConfigFile, Json, Task, Timeout, Url, coloured, connected, console, is_typed

if TYPE_CHECKING:
    from clients.replies import Answer


def ask_command(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="The question; - reads it from the standard input.")],
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", help="An answer to choose from; repeat. None: free text.")
    ] = None,
    task: Task = "global",
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
    stream: Annotated[bool, typer.Option("--stream", help="Show a free-text answer's tokens as they come.")] = False,
    url: Url = None,
    timeout: Timeout = None,
    config: ConfigFile = None,
    as_json: Json = False,
) -> None:
    """Ask a question and see how sure the answer is."""
    given = {name for name in context.params if is_typed(context, name)}
    sampled = temperature > 0 or samples > 0
    _check(given, stream=stream, of_text=not option, settles=draws == "auto", sampled=sampled)
    text = sys.stdin.read() if prompt == "-" else prompt
    settings: dict[str, Any] = {
        "task": task,
        "draws": _draws(draws),
        "seed": seed,
        "max_tokens": max_tokens,
        "stop": [end.replace("\\n", "\n") for end in stop or []],
        "temperature": temperature,
        "top_p": top_p,
        "samples": samples,
        "meaning": meaning,
        "tokens": not option,
    }
    if stream:
        _stream(text, settings, url, timeout, config)
        return
    with connected(url, timeout, config) as client:
        reply = client.generate(
            text,
            options=option or None,
            tolerance=tolerance,
            abstain_below=abstain_below,
            target_risk=target_risk,
            normalize=normalize,
            **settings,
        )
    _show(reply, option, as_json)


def score_command(
    prompt: Annotated[str, typer.Argument(help="The question.")],
    answer: Annotated[str, typer.Argument(help="A finished answer to it; - reads it from the standard input.")],
    task: Task = "global",
    draws: Annotated[str, typer.Option(help="Draws from the posterior: a number, or auto.")] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draws: same texts, same scores.")] = 0,
    end: Annotated[bool, typer.Option(help="Whether the answer ends there, or may go on.")] = True,
    url: Url = None,
    timeout: Timeout = None,
    config: ConfigFile = None,
    as_json: Json = False,
) -> None:
    """Score a finished answer, from another model or a person, and see where in it the doubt lies."""
    if prompt == "-":
        raise typer.BadParameter("- reads the answer; give the question itself", param_hint="PROMPT")
    text = sys.stdin.read() if answer == "-" else answer
    with connected(url, timeout, config) as client:
        reply = client.score(prompt, text, task=task, draws=_draws(draws), seed=seed, end=end)
    _show(reply, None, as_json)


def _check(given: set[str], *, stream: bool, of_text: bool, settles: bool, sampled: bool) -> None:
    """Refuses what cannot be done, or would do nothing, beside the other options that were given."""
    whole = ("option", "abstain_below", "target_risk", "normalize", "as_json")
    for name in [name for name in whole if stream and name in given]:
        raise typer.BadParameter(
            f"{_flag(name)} needs the whole answer; leave out one of the two", param_hint="--stream"
        )
    reason = "is for questions with options: give some with --option" if of_text else "is for free text"
    for name in [name for name in (("normalize", "tolerance") if of_text else ("stop", "max_tokens")) if name in given]:
        raise typer.BadParameter(f"{reason}, or leave it out", param_hint=_flag(name))
    if "top_p" in given and of_text and not sampled:
        raise typer.BadParameter("is for --temperature above 0, or --samples", param_hint="--top-p")
    if "tolerance" in given and not settles:
        raise typer.BadParameter("is for --draws auto: leave out one of the two", param_hint="--tolerance")


def _flag(name: str) -> str:
    return "--json" if name == "as_json" else f"--{name.replace('_', '-')}"


def _show(reply: Answer, options: list[str] | None, as_json: bool) -> None:
    from clients import render

    if as_json:
        typer.echo(reply.model_dump_json(indent=2))
    else:
        screen = console()
        screen.print(render.answer(reply, options, legend=coloured(screen)))


def _stream(text: str, settings: dict[str, Any], url: str | None, timeout: float | None, config: Path | None) -> None:
    """Prints tokens as they come, then what is known of the whole."""
    from clients import render
    from clients.replies import Answer

    screen = console()
    begun = False
    with connected(url, timeout, config) as client:
        for item in client.stream(text, **settings):
            if isinstance(item, Answer):
                if begun:
                    screen.print()
                screen.print(render.answer(item, None, told=not begun, legend=coloured(screen)))
                continue
            piece = item.text if begun else item.text.lstrip()
            begun = begun or bool(piece)
            screen.print(render.token(piece, item.probability), end="", soft_wrap=True)


def _draws(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise typer.BadParameter(f"{text!r} is neither auto nor a number above 0", param_hint="--draws")
