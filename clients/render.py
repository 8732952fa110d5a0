"""Answers, tasks and jobs as text for a terminal."""

from __future__ import annotations

import math
import shlex
import unicodedata
from collections.abc import Sequence

from rich.bar import Bar
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from clients.examples import LabelledExample
from clients.replies import Answer, Semantics, TaskInfo, Token

_BAR_WIDTH = 32
_OPTION_WIDTH = 40
# From which probability on a token has which colour.
_COLOURS = ((0.8, "green"), (0.4, "yellow"), (0.0, "red"))
_DOUBTFUL = 5
_LIKELIER = 3
_MEANINGS = 5


def answer(reply: Answer, options: Sequence[str] | None, *, told: bool = True, legend: bool = False) -> RenderableType:
    """Shows an answer: confidence, a bar for each option, and what the doubt is made of.

    Args:
        reply: The answer.
        options: What it was chosen from; None for free text.
        told: Whether to show the text itself, which may stand there already.
        legend: Whether to say what the tokens' colours mean.
    """
    of_text = reply.probabilities is None
    raw = ", a mean per token, not calibrated" if of_text else ", not calibrated"
    note = raw if reply.calibrated is False else ""
    text = Text(printable(reply.answer or ""), "bold green") if reply.tokens is None else _coloured(reply.tokens)
    sure = f"{_percent(reply.confidence)} confident{note}"
    headline = Text.assemble(text, f"   {sure}") if told else Text(sure)
    if reply.abstained is not None:
        headline = Text.assemble(("no answer", "bold yellow"), f": {printable(reply.abstained.reason)}")
        if not reply.probabilities:
            likeliest = text if reply.tokens else Text(printable(reply.abstained.candidates[0].answer))
            headline = Text.assemble(headline, "\n\nit would have been: ", likeliest)
    parts: list[RenderableType] = [headline, Text()]
    if reply.finish == "length":
        cut = "cut at the longest length, --max-tokens: the text may go on, and the confidence is of what stands here"
        parts += [Text(cut, "yellow"), Text()]
    if reply.tokens is not None:
        parts += [_legend(), Text()] if legend else []
        parts += [_doubtful(reply.tokens), Text()]
    if reply.semantics is not None:
        parts += [_meanings(reply.semantics), Text()]
    if options and reply.probabilities is not None:
        parts += [_bars(options, reply.probabilities, reply.answer), Text()]
    if reply.prediction_set is not None:
        parts += [Text("prediction set: " + printable(", ".join(reply.prediction_set))), Text()]
    most = math.log(len(options)) if options and reply.probabilities is not None else None
    parts += [_doubt(reply, most), Text(), Text(printable(_footer(reply)), style="dim")]
    return Group(*parts)


def token(text: str, probability: float | None) -> Text:
    """A token in the colour of its probability; plain where there is none."""
    text = printable(text)
    if probability is None:
        return Text(text)
    return Text(text, f"bold {next(style for least, style in _COLOURS if probability >= least)}")


def tasks(rows: Sequence[TaskInfo]) -> RenderableType:
    """Shows a table of tasks."""
    table = Table(box=None, pad_edge=False)
    for name in ("task", "status", "version", "shots", "calibrated", "made"):
        table.add_column(name, justify="right" if name in ("version", "shots") else "left")
    for row in rows:
        status = row.status if row.error is None else f"{row.status}: {row.error}"
        calibrated = "" if row.calibrated is None else ("yes" if row.calibrated else "no")
        cells = (row.task, status, _plain(row.version), _plain(row.shots), calibrated, (row.created or "")[:16])
        table.add_row(*(Text(printable(cell)) for cell in cells))
    return table


def how_to_ask(task: str, example: LabelledExample) -> str:
    """Returns the command that asks a question of a task that was just taught."""
    options = "".join(f" -o {shlex.quote(option)}" for option in example.options or ())
    return f'abmll ask "..." --task {shlex.quote(task)}{options}'


def printable(text: str) -> str:
    """Returns a text without the characters that steer a terminal: a model or a server may say anything."""
    return "".join(char if _is_printable(char) else "\ufffd" for char in text)


def _is_printable(char: str) -> bool:
    # Python finds spaces other than its own unprintable: the one that does not break, that of Chinese and Japanese.
    return char.isprintable() or char in "\n\t" or unicodedata.category(char) == "Zs"


def _coloured(tokens: Sequence[Token]) -> Text:
    """A text, each token in the colour of its probability."""
    return _stripped(Text.assemble(*(token(item.text, item.probability) for item in tokens)))


def _legend() -> Text:
    """What the colours mean."""
    parts = [(f"{_bounds(at)}  ", f"bold {style}") for at, (_, style) in enumerate(_COLOURS)]
    return Text.assemble(("a token's probability: ", "dim"), *parts)


def _bounds(at: int) -> str:
    least, most = _COLOURS[at][0], _COLOURS[at - 1][0]
    return f"below {100 * most:.0f} %" if at == len(_COLOURS) - 1 else f"from {100 * least:.0f} %"


def _stripped(text: Text) -> Text:
    plain = text.plain
    start, stop = len(plain) - len(plain.lstrip()), len(plain.rstrip())
    return text[start : max(start, stop)]


def _doubtful(tokens: Sequence[Token]) -> Table:
    """The least probable tokens in their order, with what is likelier in their place."""
    grid = Table.grid(padding=(0, 2))
    for justify in ("left", "right", "left", "left"):
        grid.add_column(justify=justify)
    grid.add_row(*(Text(head, "dim") for head in ("least sure of", "", "epistemic", "likelier there")))
    least = sorted(range(len(tokens)), key=lambda at: tokens[at].probability)[:_DOUBTFUL]
    for at in sorted(least):
        token = tokens[at]
        # The token itself is among them, at a probability that rounding may part from its own.
        least_more = token.probability * (1 + 1e-4)
        likelier = [other for other in token.likeliest if other.probability > least_more][:_LIKELIER]
        grid.add_row(
            Text(repr(token.text) if token.text else "(end)" if at == len(tokens) - 1 else "(part)"),
            _percent(token.probability),
            f"{token.uncertainty.epistemic:.3f} nats",
            Text(", ".join(f"{other.text!r} {_percent(other.probability)}" for other in likelier)),
        )
    return grid


def _meanings(found: Semantics) -> Table:
    """What else the model would have said, and how likely it finds that."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(overflow="ellipsis", no_wrap=True, max_width=_OPTION_WIDTH)
    for _ in range(2):
        grid.add_column(justify="right")
    grid.add_row(*(Text(head, "dim") for head in ("it might have said", "", "samples")))
    for meaning in found.meanings[:_MEANINGS]:
        grid.add_row(
            Text(printable(meaning.answer) or "(nothing)"), _percent(meaning.probability), str(meaning.samples)
        )
    more = found.meanings[_MEANINGS:]
    if more:
        told = _percent(sum(meaning.probability for meaning in more))
        grid.add_row(Text(f"{len(more)} more", "dim"), told, str(sum(meaning.samples for meaning in more)))
    grid.add_row(Text("anything else", "dim"), _percent(found.unseen))
    return grid


def _bars(options: Sequence[str], probabilities: Sequence[float], chosen: str | None) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(overflow="ellipsis", no_wrap=True, max_width=_OPTION_WIDTH)
    grid.add_column(width=_BAR_WIDTH)
    grid.add_column(justify="right")
    for option, probability in zip(options, probabilities, strict=True):
        style = "green" if chosen is not None and option.strip() == chosen.strip() else "cyan"
        bar = Bar(size=1.0, begin=0.0, end=probability, width=_BAR_WIDTH, color=style)
        grid.add_row(Text(printable(option)), bar, _percent(probability))
    return grid


def _doubt(reply: Answer, most: float | None) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column()
    grid.add_column(justify="right")
    grid.add_column(style="dim")
    split = reply.uncertainty
    bound = "" if most is None else f"of {most:.3f} at most"
    known = f"{split.epistemic:.3f} nats" if reply.draws > 1 else "one draw does not tell"
    grid.add_row("the model does not know", known, "epistemic")
    grid.add_row("the question is open", f"{split.aleatoric:.3f} nats", "aleatoric")
    grid.add_row("together", f"{split.total:.3f} nats", bound)
    return grid


def _footer(reply: Answer) -> str:
    told = f"{reply.draws} draw" + ("" if reply.draws == 1 else "s")
    if reply.probabilities is not None:  # of a free text the error is that of another number, the whole's probability
        error = f"± {100 * reply.standard_error:.1f} points" if reply.draws > 1 else "an unknown amount"
        told += f", {error} of Monte Carlo error"
    return f"{told} · {reply.task} version {reply.posterior.version} · {reply.timing.total_ms:.0f} ms"


def _percent(probability: float) -> str:
    """In percent; what is not all is never shown as all, and what is not nothing never as nothing."""
    if 0 < probability < 0.001:
        return "<0.1 %"
    return ">99.9 %" if 0.999 < probability < 1 else f"{100 * probability:.1f} %"


def _plain(value: int | None) -> str:
    return "" if value is None else str(value)
