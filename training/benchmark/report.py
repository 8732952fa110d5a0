"""Tables of the benchmark's results, drawn from its rows alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from abmll.metrics import adaptive_calibration_error, expected_calibration_error
from training.benchmark.exact import ExactBayes
from training.benchmark.measures import LESS_IS_BETTER, OOD, bootstrap, pooled_interval
from training.report import table

Row = dict[str, Any]
POOLED = {"ece": expected_calibration_error, "adaptive ece": adaptive_calibration_error}
BOUND = ExactBayes.name


def select(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    """Returns the rows whose columns have the wanted values."""
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def answers(rows: Sequence[Row]) -> list[tuple[Tensor, Tensor]]:
    """Confidence and correctness of each row's answers, shape (n,) each."""
    return [(torch.tensor(row["confidence"], dtype=torch.float64), torch.tensor(row["correct"])) for row in rows]


def pooled_answers(rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Confidence and correctness of all rows' answers, shape (n,) each."""
    pairs = answers(rows)
    return torch.cat([confidence for confidence, _ in pairs]), torch.cat([correct for _, correct in pairs])


def names(rows: Sequence[Row]) -> list[str]:
    """Methods in the order of their first row."""
    return list(dict.fromkeys(row["method"] for row in rows))


def baselines_of(rows: Sequence[Row]) -> list[str]:
    """Methods that ABMLL is compared with: neither variants of it, nor the exact predictive."""
    return [name for name in names(rows) if not name.startswith("abmll") and name != BOUND]


def _task_names(rows: Sequence[Row]) -> list[str]:
    """The task of each row, which may be in several seeds."""
    return [row["task"] for row in rows]


def _mean(rows: Sequence[Row], measure: str) -> tuple[float, float, float]:
    return bootstrap([row.get(measure, math.nan) for row in rows], _task_names(rows))


def interval_text(value: tuple[float, float, float]) -> str:
    """A value with the interval around it, as tables have it."""
    mean, low, high = value
    return "–" if math.isnan(mean) else f"{mean:.3f} ({low:.3f} to {high:.3f})"


def quality_table(rows: Sequence[Row], shots: int, calibrated: bool) -> str:
    """Measures of each method at a number of shots: mean over tasks and seeds, 95 % bootstrap interval over tasks.

    ECE and adaptive ECE are of the pooled answers.
    """
    chosen = select(rows, shots=shots, calibrated=calibrated)
    means = [name for name in (*LESS_IS_BETTER, "coverage_90", "set_size_90") if any(name in row for row in chosen)]
    heads = ["method", *POOLED, *(name.replace("_", " ") for name in means)]
    lines: list[list[str]] = []
    for method in names(chosen):
        own = select(chosen, method=method)
        cells = [interval_text(pooled_interval(answers(own), measure, _task_names(own))) for measure in POOLED.values()]
        cells += [interval_text(_mean(own, name)) for name in means]
        lines.append([method, *cells])
    return table(heads, lines)


def paired_table(rows: Sequence[Row], shots: int, calibrated: bool, ours: Sequence[str]) -> str:
    """Paired differences of our methods to the best baseline of each measure, task by task; below 0 we are better.

    For measures of which more is better, the difference's sign is turned.
    """
    chosen = select(rows, shots=shots, calibrated=calibrated)
    means = [name for name in LESS_IS_BETTER if any(name in row for row in chosen)]
    baselines = baselines_of(chosen)
    lines: list[list[str]] = []
    for measure in means:
        sign = 1 if LESS_IS_BETTER[measure] else -1

        def values(method: str, measure: str = measure, sign: int = sign) -> dict[tuple[int, str], float]:
            own = select(chosen, method=method)
            return {(row["seed"], row["task"]): sign * row.get(measure, math.nan) for row in own}

        best = min(baselines, key=lambda name: _last_if_nan(bootstrap(list(values(name).values()))[0]))
        theirs = values(best)
        cells = [interval_text(_difference(values(name), theirs)) for name in ours]
        lines.append([measure.replace("_", " "), best, *cells])
    return table(["measure", "best baseline", *ours], lines)


def _last_if_nan(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _difference(own: dict[tuple[int, str], float], other: dict[tuple[int, str], float]) -> tuple[float, float, float]:
    """The mean difference over what both have, by seed and task: one may have been run with more seeds."""
    both = [key for key in own if key in other]
    return bootstrap([own[key] - other[key] for key in both], [task for _, task in both])


def ood_table(rows: Sequence[Row]) -> str:
    """How well doubt tells questions out of distribution from a task's own: AUROC, over tasks and seeds.

    Epistemic uncertainty beside the total. 0.5: not at all; a method with one set of weights has no epistemic part.
    """
    chosen = select(rows, calibrated=True)
    present = [name for name in OOD if any(name in row for row in chosen)]
    heads = ["method", *(name.removeprefix("ood_").replace("_", ": ") for name in present)]
    lines: list[list[str]] = []
    for method in names(chosen):
        own = select(chosen, method=method)
        cells = [interval_text(_mean(own, name)) for name in present]
        lines.append([method, *cells])
    return table(heads, lines)


def cost_table(rows: Sequence[Row]) -> str:
    """What each method costs: parameters, seconds of learning and of one task, passes of an answer, peak memory."""
    heads = [
        "method",
        "trained parameters",
        "learning s",
        "a task's adaptation and questions s",
        "passes an answer",
        "peak memory MiB",
    ]
    lines: list[list[str]] = []
    for method in names(rows):
        own = select(rows, method=method, calibrated=False)
        learn = sum(row["learn_s"] for row in own) / len(own)
        predict = sum(row["predict_s"] for row in own) / len(own)
        memory = max(row["memory_mib"] for row in own)
        cells = [f"{own[0]['parameters']:,}", f"{learn:.1f}", f"{predict:.2f}", f"{own[0]['passes']}", f"{memory:,}"]
        lines.append([method, *cells])
    return table(heads, lines)
