from __future__ import annotations

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from abmll.predictive import mean_error, predictive


def test_parts_of_the_uncertainty_are_scipys_entropies() -> None:
    scores = torch.randn(9, 5, 4, generator=torch.Generator().manual_seed(0)) * 2
    result = predictive(scores)
    each = np.exp(scores.double().numpy())
    each /= each.sum(-1, keepdims=True)
    mean = each.mean(0)
    np.testing.assert_allclose(result.probabilities, mean, rtol=1e-6)
    np.testing.assert_allclose(result.total, scipy.stats.entropy(mean, axis=-1), rtol=1e-6)
    np.testing.assert_allclose(result.aleatoric, scipy.stats.entropy(each, axis=-1).mean(0), rtol=1e-6)
    # Mutual information is the mean divergence of the draws from their mean.
    np.testing.assert_allclose(result.epistemic, scipy.stats.entropy(each, mean[None], axis=-1).mean(0), rtol=1e-6)
    top = np.take_along_axis(each, mean.argmax(-1)[None, :, None], -1)[..., 0]
    np.testing.assert_allclose(result.standard_error, scipy.stats.sem(top, axis=0), rtol=1e-6)


def test_the_standard_error_is_that_of_repeated_experiments() -> None:
    generator = torch.Generator().manual_seed(1)
    runs = [predictive(torch.randn(50, 1, 3, generator=generator) + torch.tensor([1.0, 0, 0])) for _ in range(400)]
    spread = torch.stack([run.probabilities[0, 0] for run in runs]).std()
    told = torch.stack([run.standard_error[0] for run in runs]).mean()
    assert told.item() == pytest.approx(spread.item(), rel=0.15)


def test_the_standard_error_of_mirrored_draws_is_that_of_their_pairs() -> None:
    generator = torch.Generator().manual_seed(1)
    noise = 0.5 * torch.randn(400, 10, 1, 3, generator=generator)
    scores = torch.stack([noise, -noise], dim=2).flatten(1, 2) + torch.tensor([1.0, 0, 0])
    runs = [predictive(each, mirrored=True) for each in scores]
    spread = torch.stack([run.probabilities[0, 0] for run in runs]).std()
    told = torch.stack([run.standard_error[0] for run in runs]).mean()
    assert told.item() == pytest.approx(spread.item(), rel=0.15)
    as_independent = torch.stack([predictive(each).standard_error[0] for each in scores]).mean()
    assert told < 0.5 * as_independent
    values = torch.tensor([0.1, 0.3, 0.2, 0.4, 0.9])
    assert mean_error(values, mirrored=True) == mean_error(values[:4], mirrored=True)
    assert mean_error(values[:2], mirrored=True) == mean_error(values[:2]) > 0
    assert mean_error(values[:1], mirrored=True) == 0


def test_draws_that_agree_have_no_epistemic_uncertainty() -> None:
    result = predictive(torch.tensor([[1.0, -2.0, 0.5]]).repeat(8, 1)[:, None])
    assert result.epistemic.item() == pytest.approx(0, abs=1e-12)
    assert result.standard_error.item() == pytest.approx(0, abs=1e-12)
    assert result.aleatoric.item() == pytest.approx(result.total.item())


def test_draws_that_are_sure_of_different_answers_are_all_ignorance() -> None:
    result = predictive(torch.tensor([[[50.0, 0.0]], [[0.0, 50.0]]]))
    assert result.total.item() == pytest.approx(np.log(2))
    assert result.epistemic.item() == pytest.approx(np.log(2))


def test_a_temperature_puts_every_part_on_its_scale() -> None:
    scores = torch.randn(9, 5, 4, generator=torch.Generator().manual_seed(0)) * 2
    tempered = predictive(scores, 3.0)
    each = scipy.special.softmax(scores.double().numpy() / 3.0, axis=-1)
    np.testing.assert_allclose(tempered.probabilities, each.mean(0), rtol=1e-6)
    np.testing.assert_allclose(tempered.total, scipy.stats.entropy(each.mean(0), axis=-1), rtol=1e-6)
    np.testing.assert_allclose(tempered.aleatoric, scipy.stats.entropy(each, axis=-1).mean(0), rtol=1e-6)
    assert (tempered.total > predictive(scores).total).all()


def test_absent_options_take_no_part() -> None:
    scores = torch.tensor([[[1.0, 2.0, -torch.inf], [0.0, 1.0, 2.0]]])
    result = predictive(scores)
    assert result.probabilities[0, 2] == 0
    torch.testing.assert_close(result.probabilities[0, :2], predictive(scores[:, :1, :2]).probabilities[0])
    assert result.total.isfinite().all()


@settings(max_examples=60)
@given(st.integers(1, 6), st.integers(2, 5), st.integers(0, 10_000), st.floats(0.01, 50))
def test_what_holds_of_every_prediction(draws: int, options: int, seed: int, spread: float) -> None:
    scores = spread * torch.randn(draws, options, generator=torch.Generator().manual_seed(seed))
    result = predictive(scores)
    assert result.probabilities.sum().item() == pytest.approx(1)
    assert 0 <= result.epistemic <= result.total + 1e-9 <= np.log(options) + 2e-9
    shuffled = predictive(scores.flip(0))
    assert shuffled.total.item() == pytest.approx(result.total.item(), abs=1e-9)
    assert predictive(scores + 3.0).confidence.item() == pytest.approx(result.confidence.item(), abs=1e-5)
