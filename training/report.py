"""Tables of evaluation results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from training.evaluation import OfTask, Scores
from training.tasks import Task
from training.text_evaluation import TextScores

_COLUMNS = {
    Scores: ("tasks", "chance", "accuracy", "ece", "nll", "auroc", "epistemic", "coverage_90", "set_size_90",
             "answered_10", "wrong_10", "draws", "ece_auto"),
    TextScores: ("tasks", "accuracy", "ece", "nll", "brier", "auroc", "prr", "answered_10", "wrong_10"),
}  # fmt: skip


ALL = "all"  # the row of everything
_Predictions = TypeVar("_Predictions", bound=OfTask)
_Measures = TypeVar("_Measures", Scores, TextScores)


def grouped(
    predictions: Sequence[_Predictions],
    measure: Callable[[Sequence[_Predictions]], _Measures],
    key: Callable[[Task], str],
) -> list[tuple[str, int, _Measures]]:
    """Measures predictions by group and number of shots; the last group, ``all``, holds everything.

    Args:
        predictions: What to measure.
        measure: Measures a group.
        key: Names a task's group, its category or family.
    """
    rows: list[tuple[str, int, _Measures]] = []
    names = sorted({key(item.task) for item in predictions})
    groups = [
        (f"{name} (its own)" if name == ALL else name, [item for item in predictions if key(item.task) == name])
        for name in names
    ]
    for name, group in [*groups, (ALL, predictions)]:
        for shots in sorted({item.shots for item in predictions}):
            inside = [item for item in group if item.shots == shots]
            if inside:
                rows.append((name, shots, measure(inside)))
    return rows


def markdown(rows: Sequence[tuple[str, int, _Measures]], first: str) -> str:
    """Returns the rows as a Markdown table.

    Args:
        rows: From ``grouped``, at least one.
        first: Heading of the first column.
    """
    columns = _COLUMNS[type(rows[0][2])]
    heads = [first, "shots", *(column.replace("_", " ") for column in columns)]
    lines: list[list[str]] = []
    for name, shots, scores in rows:
        values = [getattr(scores, column) for column in columns]
        cells = ["–" if v is None else str(v) if isinstance(v, int) else f"{v:.3f}" for v in values]
        lines.append([name, str(shots), *cells])
    return table(heads, lines)


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table of headings and cells."""
    rule = "|" + "---|" * len(heads)
    return "\n".join(["| " + " | ".join(heads) + " |", rule, *("| " + " | ".join(cells) + " |" for cells in lines)])
