"""Tables of evaluation results."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from abmll.calibration import Calibration
from training.evaluation import Scores, TaskPredictions, score

_COLUMNS = ("tasks", "chance", "accuracy", "ece", "nll", "auroc", "epistemic", "coverage_90", "set_size_90",
            "answered_10", "wrong_10", "draws", "ece_auto")  # fmt: skip


def grouped(
    predictions: Sequence[TaskPredictions],
    calibration: Calibration | None,
    key: Callable[[TaskPredictions], str],
) -> list[tuple[str, int, Scores]]:
    """Measures predictions by group and number of shots; the last group, ``all``, holds everything.

    Args:
        predictions: What to measure.
        calibration: Tempers them, where given.
        key: Names a prediction's group, its category or family.
    """
    rows: list[tuple[str, int, Scores]] = []
    names = [*sorted({key(item) for item in predictions}), "all"]
    for name in names:
        for shots in sorted({item.shots for item in predictions}):
            inside = [i for i in predictions if i.shots == shots and name in (key(i), "all")]
            if inside:
                rows.append((name, shots, score(inside, calibration)))
    return rows


def markdown(rows: Sequence[tuple[str, int, Scores]], first: str) -> str:
    """Returns the rows as a Markdown table.

    Args:
        rows: From ``grouped``.
        first: Heading of the first column.
    """
    heads = [first, "shots", *(column.replace("_", " ") for column in _COLUMNS)]
    lines: list[list[str]] = []
    for name, shots, scores in rows:
        values = [getattr(scores, column) for column in _COLUMNS]
        cells = ["–" if v is None else str(v) if isinstance(v, int) else f"{v:.3f}" for v in values]
        lines.append([name, str(shots), *cells])
    return table(heads, lines)


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table of headings and cells."""
    rule = "|" + "---|" * len(heads)
    return "\n".join(["| " + " | ".join(heads) + " |", rule, *("| " + " | ".join(cells) + " |" for cells in lines)])
