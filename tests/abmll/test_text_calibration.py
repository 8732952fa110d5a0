"""The confidence of free texts holds when counted."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from abmll.metrics import expected_calibration_error
from abmll.text_calibration import JudgedTexts, TextConfidence, fit_texts, text_logits

TRUE = TextConfidence(slope=0.5, offset=-1.0)


def texts(count: int, seed: int) -> JudgedTexts:
    """Texts that are right as ``TRUE`` says."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(count, generator=generator).double()
    return JudgedTexts(logits, torch.rand(count, generator=generator) < TRUE.confidence(logits))


def test_log_odds_are_those_of_the_mean_over_draws() -> None:
    log_probs = torch.tensor([[0.9, 0.1, 0.5], [0.7, 0.3, 0.5]]).log()
    mean = torch.tensor([0.8, 0.2, 0.5]).double()
    assert torch.allclose(text_logits(log_probs), (mean / (1 - mean)).log(), atol=1e-6)
    extreme = text_logits(torch.tensor([[0.0, -1e4, -1e-12]]))
    assert extreme.isfinite().all()
    assert extreme[0] == extreme.max() > extreme[2] > 27  # 1 - p is told from 0 where p is nearly 1


def test_a_fit_is_scikit_learns() -> None:
    task = texts(4000, 0)
    fit = fit_texts([task])
    theirs = LogisticRegression(C=1e6).fit(task.logits[:, None].numpy(), task.correct.numpy())
    assert fit.slope == pytest.approx(float(theirs.coef_[0, 0]), abs=0.01)
    assert fit.offset == pytest.approx(float(theirs.intercept_[0]), abs=0.01)
    assert fit.slope == pytest.approx(TRUE.slope, abs=0.05)


def test_confidence_holds_when_counted_on_new_texts_and_the_probability_does_not() -> None:
    fit, new = fit_texts([texts(500, seed) for seed in range(4)]), texts(4000, 9)
    assert expected_calibration_error(fit.confidence(new.logits), new.correct) < 0.03
    assert expected_calibration_error(new.logits.sigmoid(), new.correct) > 0.1


def test_a_task_counts_by_its_weight_whatever_its_size() -> None:
    small, large = (JudgedTexts(torch.zeros(n).double(), torch.full((n,), n == 10)) for n in (10, 1000))
    half, heavy = fit_texts([small, large]), fit_texts([small, large], weights=[9.0, 1.0])
    zero = torch.zeros(()).double()
    assert half.confidence(zero).item() == pytest.approx(0.5, abs=0.05)
    assert heavy.confidence(zero).item() == pytest.approx(0.9 * 11 / 12, abs=0.02)


@pytest.mark.parametrize("right", [True, False])
def test_nothing_is_certain_even_if_all_were_right_or_wrong(right: bool) -> None:
    task = JudgedTexts(torch.linspace(-5, 5, 20).double(), torch.full((20,), right))
    confidence = fit_texts([task]).confidence(task.logits)
    assert ((confidence - float(right)).abs() < 0.2).all()
    assert ((confidence > 0) & (confidence < 1)).all()
    assert math.isfinite(fit_texts([task]).slope)


def test_a_fit_without_answers_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one task"):
        fit_texts([])
