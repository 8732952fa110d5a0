"""Against torchmetrics and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss, roc_auc_score
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

from abmll import metrics


@pytest.fixture(params=[2, 5])
def predictions(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(request.param)
    probabilities = (1.5 * torch.randn(700, request.param, generator=generator)).softmax(-1)
    return probabilities, torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def test_ece_is_torchmetrics(predictions: tuple[Tensor, Tensor]) -> None:
    probabilities, answers = predictions
    confidence, best = probabilities.max(-1)
    expected = multiclass_calibration_error(probabilities, answers, probabilities.shape[1], n_bins=15)
    assert metrics.expected_calibration_error(confidence, best == answers) == pytest.approx(expected.item(), abs=1e-6)


def test_the_others_are_scikit_learns(predictions: tuple[Tensor, Tensor]) -> None:
    probabilities, answers = predictions
    p, y = probabilities.double().numpy(), answers.numpy()
    p /= p.sum(-1, keepdims=True)
    correct = p.argmax(-1) == y
    assert metrics.accuracy(probabilities, answers) == pytest.approx(accuracy_score(y, p.argmax(-1)))
    assert metrics.negative_log_likelihood(probabilities, answers) == pytest.approx(float(log_loss(y, p)), rel=1e-5)
    parts = [brier_score_loss(y == k, p[:, k]) for k in range(p.shape[1])]
    assert metrics.brier(probabilities, answers) == pytest.approx(sum(parts), rel=1e-5)
    coarse = np.round(p.max(-1), 1)  # many ties
    found = metrics.confidence_auroc(torch.tensor(coarse), torch.tensor(correct))
    assert found == pytest.approx(float(roc_auc_score(correct, coarse)))


def test_ece_of_a_known_case() -> None:
    confidence = torch.tensor([0.9, 0.9, 0.9, 0.9, 0.6, 0.6])
    correct = torch.tensor([True, True, True, False, False, True])
    expected = (4 * abs(0.75 - 0.9) + 2 * abs(0.5 - 0.6)) / 6
    assert metrics.expected_calibration_error(confidence, correct) == pytest.approx(expected)


def test_edges_of_bins_and_of_certainty() -> None:
    count, mean, right = metrics.calibration_bins(torch.tensor([0.0, 1.0, 0.5]), torch.tensor([True, True, False]), 2)
    assert count.tolist() == [2, 1]
    assert mean.tolist() == [0.25, 1.0]
    assert right.tolist() == [0.5, 1.0]
    sure = torch.tensor([[1.0, 0.0]])
    assert metrics.negative_log_likelihood(sure, torch.tensor([1])) == pytest.approx(-math.log(1e-12))
    assert metrics.brier(sure, torch.tensor([1])) == 2.0
    for correct in ([True, True], [False, False]):
        assert math.isnan(metrics.confidence_auroc(torch.tensor([0.3, 0.9]), torch.tensor(correct)))


def test_adaptive_ece_is_the_gap_in_bins_of_equal_count() -> None:
    generator = torch.Generator().manual_seed(3)
    confidence = torch.rand(60, generator=generator, dtype=torch.double)
    correct = torch.rand(60, generator=generator) < confidence
    pairs = sorted(zip(confidence.tolist(), correct.tolist(), strict=True))
    gaps = [abs(sum(c for c, _ in pairs[i : i + 4]) - sum(r for _, r in pairs[i : i + 4])) for i in range(0, 60, 4)]
    assert metrics.adaptive_calibration_error(confidence, correct) == pytest.approx(sum(gaps) / 60)


def test_adaptive_ece_does_not_depend_on_the_order_of_equal_confidences() -> None:
    """Half of a hundred answers at 50 % are right: no bin may be told that all of its are, or none."""
    confidence, correct = torch.full((100,), 0.5), torch.arange(100) < 50
    assert metrics.adaptive_calibration_error(confidence, correct) == pytest.approx(0)
    confidence[:7] = 0.9  # all right
    shuffled = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    first = metrics.adaptive_calibration_error(confidence, correct)
    assert first == pytest.approx(metrics.adaptive_calibration_error(confidence[shuffled], correct[shuffled]))
    assert first > 0


def test_area_under_risk_coverage_is_the_mean_risk_of_the_surest() -> None:
    confidence = torch.tensor([0.9, 0.3, 0.8, 0.6])
    correct = torch.tensor([True, False, False, True])
    assert metrics.area_under_risk_coverage(confidence, correct) == pytest.approx((0 + 1 / 2 + 1 / 3 + 2 / 4) / 4)
    equal = torch.full((4,), 0.5)
    assert metrics.area_under_risk_coverage(equal, correct) == pytest.approx(0.5)
    assert metrics.area_under_risk_coverage(equal, correct.flip(0)) == pytest.approx(0.5)


def test_rejection_gains_all_of_an_oracles_gain_none_or_less() -> None:
    correct = torch.tensor([True, False, True, True, False, True])
    perfect = torch.tensor([0.9, 0.1, 0.8, 0.7, 0.2, 0.6])
    assert metrics.prediction_rejection_ratio(perfect, correct) == pytest.approx(1.0)
    assert metrics.prediction_rejection_ratio(torch.full((6,), 0.5), correct) == pytest.approx(0.0)
    assert metrics.prediction_rejection_ratio(1 - perfect, correct) < -0.5
    # By hand: of the n surest 0, 1/2, 1/3, ... are wrong; the oracle's are 0 up to the fourth, then 1/5 and 2/6.
    some = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.1, 0.5])
    area, oracle, chance = (1 / 2 + 1 / 3 + 1 / 4 + 1 / 5 + 2 / 6) / 6, (1 / 5 + 2 / 6) / 6, 2 / 6
    assert metrics.prediction_rejection_ratio(some, correct) == pytest.approx((chance - area) / (chance - oracle))
    assert math.isnan(metrics.prediction_rejection_ratio(perfect, torch.ones(6, dtype=torch.bool)))
