from __future__ import annotations

import pytest
import torch

from abmll.curves import BINS, curves
from abmll.metrics import expected_calibration_error


def test_the_bins_give_back_the_ece_and_the_curve_ends_at_the_error_rate() -> None:
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(500, generator=generator)
    correct = torch.rand(500, generator=generator) < confidence**2
    found = curves(confidence, correct)
    assert sum(part.count for part in found.bins) == found.answers == 500
    ece = sum(part.count / 500 * abs(part.accuracy - part.confidence) for part in found.bins)
    assert ece == pytest.approx(expected_calibration_error(confidence, correct, BINS), abs=1e-9)
    assert all(part.low < part.confidence <= part.high for part in found.bins)
    assert found.risk_coverage[-1].coverage == 1
    assert found.risk_coverage[-1].risk == pytest.approx(1 - correct.double().mean().item())


def test_the_surest_answers_come_first() -> None:
    confidence = torch.tensor([0.6, 0.9, 0.8, 0.7])
    found = curves(confidence, torch.tensor([False, True, True, False]))
    assert [(point.coverage, point.risk) for point in found.risk_coverage] == [
        (0.25, 0.0), (0.5, 0.0), (0.75, pytest.approx(1 / 3)), (1.0, 0.5),
    ]  # fmt: skip


def test_of_one_answer_there_is_one_point() -> None:
    found = curves(torch.tensor([0.4]), torch.tensor([True]))
    assert [(part.count, part.accuracy) for part in found.bins] == [(1, 1.0)]
    assert [(point.coverage, point.risk) for point in found.risk_coverage] == [(1.0, 0.0)]
