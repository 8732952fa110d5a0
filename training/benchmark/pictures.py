"""Pictures of the benchmark's results, drawn from its rows alone, as PNG and SVG."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from torch import Tensor

from abmll import metrics
from abmll.metrics import calibration_bins, expected_calibration_error
from training.benchmark.report import BOUND, Row, names, pooled_answers, select

mpl.use("Agg")
from matplotlib import pyplot as plt

mpl.rcParams["svg.hashsalt"] = "abmll"  # the same rows make the same file


def draw_all(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draws every picture; returns the PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    return [
        reliability(rows, folder),
        risk_coverage(rows, folder),
        against_shots(rows, folder),
        against_draws(rows, folder),
    ]


def _save(figure: Any, folder: Path, name: str) -> Path:
    for kind in ("png", "svg"):
        when = {"Date": None} if kind == "svg" else None
        figure.savefig(folder / f"{name}.{kind}", dpi=130, bbox_inches="tight", metadata=when)
    plt.close(figure)
    return folder / f"{name}.png"


def _colours(methods: Sequence[str]) -> dict[str, Any]:
    """A colour a method, the same in every picture of runs that compare the same methods."""
    fixed: dict[str, Any] = {
        BOUND: "black",
        "abmll subspace": "#d00000",
        "abmll kronecker": "#e08000",
        "abmll lowrank": "#0040d0",
        "abmll subspace in-context": "#00a0a0",
        "abmll subspace mixture": "#8000ff",
    }
    palette = plt.get_cmap("tab20")
    others = [name for name in methods if name not in fixed]
    return fixed | {name: palette(number % 20) for number, name in enumerate(others)}


def _line(method: str, colours: dict[str, Any]) -> dict[str, Any]:
    """How a method's line looks: ABMLL's stand out."""
    return {"label": method, "color": colours[method], "linewidth": 2.4 if method.startswith("abmll") else 1.1}


def _mean(column: str) -> Callable[[Sequence[Row]], float]:
    return lambda own: sum(row[column] for row in own) / len(own)


def _ece(own: Sequence[Row]) -> float:
    return expected_calibration_error(*pooled_answers(own))


def reliability(rows: Sequence[Row], folder: Path) -> Path:
    """Accuracy against confidence after calibration, a panel a method, all shots pooled."""
    chosen = select(rows, calibrated=True)
    return reliability_panels({name: pooled_answers(select(chosen, method=name)) for name in names(chosen)}, folder)


def reliability_panels(answers: Mapping[str, tuple[Tensor, Tensor]], folder: Path) -> Path:
    """Accuracy against confidence, a panel each.

    Args:
        answers: By name, the confidence of each answer and whether it was right, both of shape (n,).
        folder: Where the picture goes.
    """
    methods = list(answers)
    columns = min(4, len(methods))
    height = -(-len(methods) // columns)
    figure, axes = plt.subplots(
        height, columns, figsize=(3 * columns, 3 * height), squeeze=False, sharex=True, sharey=True
    )
    for axis in axes.flat[len(methods) :]:
        axis.set_axis_off()
    for axis, method in zip(axes.flat, methods, strict=False):
        confidence, correct = answers[method]
        count, mean, right = calibration_bins(confidence, correct)
        used = count > 0
        axis.plot([0, 1], [0, 1], color="0.7", linewidth=1)
        axis.bar(mean[used], count[used] / count.sum(), width=0.03, color="0.85")
        axis.plot(mean[used], right[used], marker="o", markersize=3.5, linewidth=1.2)
        axis.set_title(f"{method}\nECE {expected_calibration_error(confidence, correct):.3f}", fontsize=9)
        axis.set_xlim(0, 1)
        axis.set_ylim(0, 1)
    figure.supxlabel("confidence (bars: share of answers)", fontsize=10)
    figure.supylabel("accuracy", fontsize=10)
    figure.tight_layout()
    return _save(figure, folder, "reliability")


def risk_coverage(rows: Sequence[Row], folder: Path) -> Path:
    """Error among the surest answers against their share, at the most shots."""
    shots = max(row["shots"] for row in rows)
    chosen = select(rows, calibrated=True, shots=shots)
    methods = names(chosen)
    colours = _colours(methods)
    figure, axis = plt.subplots(figsize=(7, 4.5))
    axis.set_title(f"after {shots} examples", fontsize=10)
    for method in methods:
        confidence, correct = pooled_answers(select(chosen, method=method))
        risk = metrics.risk_coverage(confidence, correct)
        axis.plot(np.linspace(1 / len(risk), 1, len(risk)), risk, **_line(method, colours))
    axis.set_xlabel("coverage: share of answers kept, the surest first")
    axis.set_ylabel("risk: error rate among them")
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return _save(figure, folder, "risk-coverage")


def against_shots(rows: Sequence[Row], folder: Path) -> Path:
    """Accuracy, ECE, NLL and epistemic uncertainty against shots, calibrated."""
    chosen = select(rows, calibrated=True)
    methods = names(chosen)
    colours = _colours(methods)
    panels: list[tuple[str, Callable[[Sequence[Row]], float]]] = [
        ("accuracy", _mean("accuracy")),
        ("ECE", _ece),
        ("NLL (nats)", _mean("nll")),
    ]
    if any("kl_exact" in row for row in chosen):
        panels.append(("KL(exact Bayes ‖ method) (nats)", _mean("kl_exact")))
    panels.append(("epistemic uncertainty (nats)", _mean("epistemic")))
    figure, axes = plt.subplots(1, len(panels), figsize=(3.6 * len(panels), 3.4))
    shots = sorted({row["shots"] for row in chosen})
    for axis, (title, measure) in zip(axes, panels, strict=True):
        for method in methods:
            own = select(chosen, method=method)
            values = [measure(select(own, shots=k)) for k in shots]
            axis.plot(shots, values, marker="o", markersize=3, **_line(method, colours))
        axis.set_xscale("symlog", base=2)
        axis.set_xticks(shots, [str(k) for k in shots])
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("shots")
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    return _save(figure, folder, "against-shots")


def against_draws(rows: Sequence[Row], folder: Path) -> Path:
    """ECE of all answers against the number of draws, calibrated, of the methods that have draws."""
    chosen = [row for row in select(rows, calibrated=True) if row["by_draws"]]
    methods = names(chosen)
    colours = _colours(names(rows))
    figure, axis = plt.subplots(figsize=(6, 4))
    ticks: set[int] = set()
    for method in methods:
        own = select(chosen, method=method)
        draws = [int(count) for count in own[0]["by_draws"]]
        values = [expected_calibration_error(*pooled_answers([r["by_draws"][str(n)] for r in own])) for n in draws]
        axis.plot(draws, values, marker="o", markersize=3, **_line(method, colours))
        ticks |= set(draws)
    axis.set_xscale("log", base=2)
    axis.set_xticks(sorted(ticks), [str(count) for count in sorted(ticks)])
    axis.set_xlabel("draws")
    axis.set_ylabel("ECE")
    if methods:
        axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return _save(figure, folder, "ece-against-draws")


def against_beta(rows: Sequence[Row], methods: Sequence[str], folder: Path) -> Path:
    """Accuracy, ECE and NLL against the weight of KL, with KL in nats per data point; calibrated.

    Args:
        rows: The results.
        methods: Those of the ablation, whose rows' settings name their ``beta``.
        folder: Where to draw.
    """
    chosen = [row for row in select(rows, calibrated=True) if row["method"] in methods]
    betas = sorted({row["settings"]["beta"] for row in chosen})
    panels: list[tuple[str, Callable[[Sequence[Row]], float]]] = [
        ("accuracy", _mean("accuracy")),
        ("ECE", _ece),
        ("NLL (nats)", _mean("nll")),
        ("epistemic (nats)", _mean("epistemic")),
        ("KL, nats per data point", _mean("kl_nats")),
        ("β KL, nats per data point", _mean("beta_kl_nats")),
    ]
    figure, axes = plt.subplots(2, 3, figsize=(11, 6), sharex=True)
    for axis, (title, measure) in zip(axes.flat, panels, strict=True):
        for shots in sorted({row["shots"] for row in chosen}):
            own = [[r for r in select(chosen, shots=shots) if r["settings"]["beta"] == beta] for beta in betas]
            axis.plot(range(len(betas)), [measure(part) for part in own], marker="o", markersize=3, label=str(shots))
        axis.set_xticks(range(len(betas)), [f"{beta:g}" for beta in betas])
        axis.set_title(title, fontsize=10)
    figure.supxlabel("β", fontsize=10)
    figure.tight_layout()
    lines, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(lines, labels, title="shots", fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _save(figure, folder, "beta")
