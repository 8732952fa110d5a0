"""Measures of accuracy and calibration of labelled predictions."""

from __future__ import annotations

import torch
from torch import Tensor


def accuracy(probabilities: Tensor, answers: Tensor) -> float:
    """Share of right answers. Shapes (n, options) and (n,)."""
    return (probabilities.argmax(-1) == answers).double().mean().item()


def negative_log_likelihood(probabilities: Tensor, answers: Tensor, floor: float = 1e-12) -> float:
    """Mean -log p(right answer) in nats; probabilities under ``floor`` count as it."""
    right = probabilities.double().gather(-1, answers[:, None]).clamp_min(floor)
    return -right.log().mean().item()


def brier(probabilities: Tensor, answers: Tensor) -> float:
    """Mean squared distance to the one-hot answer, summed over options (Brier 1950): 0 to 2."""
    truth = torch.nn.functional.one_hot(answers, probabilities.shape[-1])
    return ((probabilities.double() - truth) ** 2).sum(-1).mean().item()


def bin_of(confidence: Tensor, bins: int = 15) -> Tensor:
    """Number of each answer's bin, of ``bins`` of equal width over [0, 1]; an edge belongs to the bin below it."""
    return (confidence.double() * bins).ceil().long().clamp(1, bins) - 1


def calibration_bins(confidence: Tensor, correct: Tensor, bins: int = 15) -> tuple[Tensor, Tensor, Tensor]:
    """Groups answers by confidence into bins of equal width.

    Args:
        confidence: Confidence of each answer, shape (n,).
        correct: Whether it was right, shape (n,).
        bins: Number of bins over [0, 1].

    Returns:
        Count, mean confidence and accuracy of each bin, shape (bins,) each; 0 in empty bins.
    """
    index = bin_of(confidence, bins)
    count = torch.zeros(bins, dtype=torch.float64).index_add(0, index, torch.ones_like(confidence, dtype=torch.float64))
    sums = torch.zeros(bins, dtype=torch.float64)
    safe = count.clamp_min(1)
    mean = sums.index_add(0, index, confidence.double()) / safe
    return count, mean, sums.index_add(0, index, correct.double()) / safe


def expected_calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15) -> float:
    """Mean |accuracy - confidence| over equal-width bins, weighted by count (Naeini et al. 2015)."""
    count, mean, right = calibration_bins(confidence, correct, bins)
    return ((count / count.sum()) * (mean - right).abs()).sum().item()


def confidence_auroc(confidence: Tensor, correct: Tensor) -> float:
    """AUROC of confidence for telling right from wrong answers; NaN where all are right or all wrong."""
    from sklearn.metrics import roc_auc_score

    if correct.all() or not correct.any():
        return float("nan")
    return float(roc_auc_score(correct.numpy(), confidence.double().numpy()))


def prediction_rejection_ratio(confidence: Tensor, correct: Tensor) -> float:
    """How much of what an oracle gains by rejecting answers is gained by rejecting those of least confidence.

    (Error of random rejection - area under risk-coverage) / (the same of an oracle) (Malinin & Gales 2021, arXiv
    2002.07650, appendix B): 1 is perfect, 0 is chance; NaN where all are right or all wrong.
    """
    if correct.all() or not correct.any():
        return float("nan")
    random = 1 - correct.double().mean().item()
    oracle = area_under_risk_coverage(correct.double(), correct)
    return (random - area_under_risk_coverage(confidence, correct)) / (random - oracle)


def adaptive_calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15) -> float:
    """Mean |accuracy - confidence| over bins of equal count (Nixon et al. 2019, arXiv 1904.01685).

    Answers of equal confidence count as their mean, in whatever order they come.
    """
    order = confidence.double().argsort(stable=True)
    sure = confidence.double()[order]
    right = _mean_of_equals(sure, correct[order].double())
    parts = min(bins, len(order))
    errors = [
        len(part) * abs((accuracy.mean() - part.mean()).item())
        for part, accuracy in zip(sure.tensor_split(parts), right.tensor_split(parts), strict=True)
    ]
    return sum(errors) / len(order)


def _mean_of_equals(ordered: Tensor, values: Tensor) -> Tensor:
    """Each value's mean over those that stand at equal places of an order."""
    _, group = ordered.unique_consecutive(return_inverse=True)
    count = torch.zeros(int(group.max()) + 1, dtype=torch.float64).index_add(0, group, torch.ones_like(values))
    return (torch.zeros_like(count).index_add(0, group, values) / count)[group]


def risk_coverage(confidence: Tensor, correct: Tensor) -> Tensor:
    """Error rate among the n surest answers (Geifman & El-Yaniv 2017), shape (answers,), for n from 1 to all.

    Answers of equal confidence count as their mean, in whatever order they come.
    """
    order = confidence.double().argsort(descending=True, stable=True)
    errors = _mean_of_equals(confidence.double()[order], 1 - correct[order].double())
    return errors.cumsum(0) / torch.arange(1, len(errors) + 1, dtype=torch.float64)


def area_under_risk_coverage(confidence: Tensor, correct: Tensor) -> float:
    """Mean of ``risk_coverage`` over n: 0 is perfect."""
    return risk_coverage(confidence, correct).mean().item()
