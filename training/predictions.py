"""Answers to questions as a notebook shows them: a picture, a frame, or one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# More questions than these are drawn as one chart of their confidence.
_PANELS = 6


@dataclass(frozen=True)
class Prediction:
    """One answer with its confidence and what its doubt is made of.

    Attributes:
        prompt: The question.
        answer: The likeliest option, or the decoded text.
        confidence: Its probability, calibrated where ``calibrated``; of a text that is not, the geometric mean per
            token.
        calibrated: Whether the posterior's calibration was applied.
        raw_confidence: Predictive probability before calibration; of a text, of the whole text.
        options: The options; None for free text.
        probabilities: Theirs, calibrated where ``calibrated``; None for free text.
        standard_errors: Monte Carlo standard errors of these; None for free text.
        prediction_set: Options that hold the right one in at least 90 % of questions; None for free text or
            without calibration.
        total: Predictive entropy in nats; of free text, per token.
        aleatoric: Its part that more examples would not remove.
        epistemic: Its part that more examples would remove, the mutual information of answer and weights.
        standard_error: Of the confidence; of free text, of ``raw_confidence``.
        draws: Draws used; with one, standard errors and the epistemic part are not known, and told as 0.
        finish: What ended a free text, the model ("end") or ``max_tokens`` ("length"); None with options.
    """

    prompt: str
    answer: str
    confidence: float
    calibrated: bool
    raw_confidence: float
    options: tuple[str, ...] | None
    probabilities: tuple[float, ...] | None
    standard_errors: tuple[float, ...] | None
    prediction_set: tuple[str, ...] | None
    total: float
    aleatoric: float
    epistemic: float
    standard_error: float
    draws: int
    finish: Literal["end", "length"] | None


class Predictions(Sequence[Prediction]):
    """Answers to several questions, in their order.

    Args:
        items: The answers, at least one.
        task: The task that was asked.
    """

    def __init__(self, items: Sequence[Prediction], task: str) -> None:
        self.items, self.task = list(items), task

    def __getitem__(self, index: int) -> Prediction:  # pyright: ignore[reportIncompatibleMethodOverride] -- no slices
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Prediction]:
        return iter(self.items)

    def __repr__(self) -> str:
        lines = [f"{item.confidence:6.1%}  {item.answer!r}  <- {item.prompt[:60]!r}" for item in self.items[:20]]
        more = [f"... and {len(self) - 20} more"] if len(self) > 20 else []
        return "\n".join([f"{len(self)} answers of task {self.task!r}", *lines, *more])

    def frame(self) -> pd.DataFrame:
        """Returns a row for each question, with ``Prediction``'s fields as columns."""
        import pandas as pd

        return pd.DataFrame([asdict(item) for item in self.items])

    def plot(self) -> Figure:
        """Draws the answers: bars of the options with two standard errors and the doubt's parts, for a few questions.

        Of more than six questions, or of free texts, the confidence of each.
        """
        from matplotlib.figure import Figure

        few = [item for item in self.items if item.options is not None]
        if len(self) > _PANELS or len(few) < len(self):
            figure = Figure(figsize=(7, 1 + 0.3 * len(self)), layout="constrained")
            _confidences(figure.subplots(), self.items)
            return figure
        heights = [len(item.options or ()) + 2.5 for item in few]
        figure = Figure(figsize=(7, 0.32 * sum(heights) + 0.3 * len(few)), layout="constrained")
        rows = figure.subplots(len(few), 1, gridspec_kw={"height_ratios": heights}, squeeze=False)
        for axes, item in zip(rows[:, 0], few, strict=True):
            _options(axes, item)
        return figure

    def _repr_png_(self) -> bytes:
        """The picture that a notebook shows."""
        stream = BytesIO()
        self.plot().savefig(stream, format="png", dpi=110)
        return stream.getvalue()


def _options(axes: Axes, item: Prediction) -> None:
    options, probabilities = item.options or (), item.probabilities or ()
    errors = [2 * error for error in item.standard_errors or ()]
    colours = ["tab:blue" if option == item.answer else "lightsteelblue" for option in options]
    inside = item.prediction_set or ()
    names = [f"{_plain(option)} *" if option in inside else _plain(option) for option in options]
    axes.barh(range(len(options)), probabilities, color=colours, xerr=errors, error_kw={"capsize": 2, "lw": 1})
    axes.set_yticks(range(len(options)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_title(_short(item.prompt, 80), fontsize=10, loc="left")
    doubt = f"does not know {item.epistemic:.3f} + open question {item.aleatoric:.3f} nats"
    star = "; * in the 90 % set" if inside else ""
    axes.set_xlabel(f"{_sure(item)}; {doubt}{star}", fontsize=8)


def _confidences(axes: Axes, items: Sequence[Prediction]) -> None:
    errors = [0.0 if item.options is None else 2 * item.standard_error for item in items]
    axes.barh(range(len(items)), [item.confidence for item in items], color="tab:blue", xerr=errors,
              error_kw={"capsize": 2, "lw": 1})  # fmt: skip
    axes.set_yticks(range(len(items)), [f"{_short(item.prompt, 40)}: {_short(item.answer, 20)}" for item in items])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("confidence" if all(item.calibrated for item in items) else "confidence, not calibrated for all")


def _sure(item: Prediction) -> str:
    return f"{_short(item.answer, 80)}: {item.confidence:.1%} confident{'' if item.calibrated else ', not calibrated'}"


def _short(text: str, most: int) -> str:
    line = " ".join(text.split())
    return _plain(line if len(line) <= most else line[: most - 1] + "…")


def _plain(text: str) -> str:
    """A text in which matplotlib sees no formula."""
    return text.replace("$", r"\$")
