"""What the benchmark measures of a method's predictions on one task."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from abmll import metrics
from abmll.calibration import prediction_set
from abmll.predictive import predictive

# Measures of quality that are means over tasks, and whether less is better.
LESS_IS_BETTER = {
    "accuracy": False,
    "nll": True,
    "brier": True,
    "auroc": False,
    "aurc": True,
    "kl_exact": True,
}
# Measures of whether doubt tells questions out of distribution: AUROCs by kind of question and of doubt.
OOD = tuple(f"ood_{kind}_{doubt}" for kind in ("nonsense", "foreign") for doubt in ("epistemic", "total"))


def of_task(
    scores: Tensor, answers: Tensor, temperature: float, threshold: float, exact: Tensor | None = None
) -> dict[str, float]:
    """Measures of one task's queries.

    Args:
        scores: Option scores under each draw in nats, shape (draws, n, options).
        answers: The right options, shape (n,).
        temperature: Divides the scores.
        threshold: Of the 90 % conformal sets.
        exact: The exact Bayes predictive, shape (n, options), where it is known.
    """
    result = predictive(scores, temperature)
    probabilities, correct = result.probabilities, result.answer == answers
    values = {
        "accuracy": metrics.accuracy(probabilities, answers),
        "nll": metrics.negative_log_likelihood(probabilities, answers),
        "brier": metrics.brier(probabilities, answers),
        "auroc": metrics.confidence_auroc(result.confidence, correct),
        "aurc": metrics.area_under_risk_coverage(result.confidence, correct),
        "epistemic": result.epistemic.mean().item(),
    }
    sets = prediction_set(probabilities, threshold) & scores[0].isfinite()  # an option that pads a row is none
    values["coverage_90"] = sets.gather(-1, answers[:, None]).double().mean().item()
    values["set_size_90"] = sets.sum(-1).double().mean().item()
    if exact is not None:
        values["kl_exact"] = kl_to_exact(exact, probabilities)
    return values


def kl_to_exact(exact: Tensor, probabilities: Tensor) -> float:
    """Mean KL(exact Bayes || method) over questions, in nats; shapes (n, options)."""
    ratio = exact.log() - probabilities.clamp_min(1e-12).log()
    return (exact * ratio).sum(-1).mean().item()


def ood_auroc(inside: Tensor, outside: Tensor) -> float:
    """AUROC of a doubt for telling questions out of distribution, shape (m,), from a task's own, shape (n,)."""
    from sklearn.metrics import roc_auc_score

    truth = [0] * len(inside) + [1] * len(outside)
    # Rounded: methods with one set of weights have epistemic parts of nothing but rounding errors.
    return float(roc_auc_score(truth, torch.cat([inside, outside]).double().round(decimals=9).numpy()))


def bootstrap(values: Sequence[float], seed: int = 0, samples: int = 2000) -> tuple[float, float, float]:
    """Mean over tasks with a 95 % percentile bootstrap interval over tasks; NaNs are left out.

    Args:
        values: One value a task.
        seed: Seed of the resampling.
        samples: Resamples.
    """
    kept = np.array([value for value in values if not math.isnan(value)])
    if len(kept) == 0:
        return math.nan, math.nan, math.nan
    rng = np.random.default_rng(seed)
    means = kept[rng.integers(0, len(kept), (samples, len(kept)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(kept.mean()), float(low), float(high)


def pooled_interval(
    tasks: Sequence[tuple[Tensor, Tensor]],
    measure: Callable[[Tensor, Tensor], float] = metrics.expected_calibration_error,
    seed: int = 0,
    samples: int = 300,
) -> tuple[float, float, float]:
    """A measure over pooled answers, such as ECE, with a 95 % bootstrap interval over tasks.

    Args:
        tasks: Confidence and correctness of each task's answers, shape (n,) each.
        measure: Of confidences and correctness.
        seed: Seed of the resampling.
        samples: Resamples.
    """

    def pooled(chosen: Sequence[int]) -> float:
        return measure(torch.cat([tasks[i][0] for i in chosen]), torch.cat([tasks[i][1] for i in chosen]))

    rng = np.random.default_rng(seed)
    drawn = [pooled(rng.integers(0, len(tasks), len(tasks)).tolist()) for _ in range(samples)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return pooled(range(len(tasks))), float(low), float(high)
