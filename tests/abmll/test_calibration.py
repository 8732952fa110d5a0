from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.stats import norm
from sklearn.metrics import log_loss
from torch import Tensor

from abmll.calibration import (
    Calibration,
    ShotCalibration,
    TemperaturePrior,
    conformal_scores,
    conformal_threshold,
    fit_temperature_prior,
    prediction_set,
    task_temperature,
)
from abmll.predictive import predictive
from abmll.risk import risk_thresholds
from abmll.text_calibration import TextCalibration


def labelled(count: int, options: int, temperature: float, seed: int) -> tuple[Tensor, Tensor]:
    """Scores under four draws, and truth drawn from their predictive distribution at a temperature."""
    generator = torch.Generator().manual_seed(seed)
    scores = 2.0 * torch.randn(4, count, options, generator=generator)
    truth = predictive(scores, temperature).probabilities
    return scores, torch.multinomial(truth, 1, generator=generator)[:, 0]


def shared_temperature(groups: list[tuple[Tensor, Tensor]], weights: list[float] | None = None) -> float:
    prior = fit_temperature_prior([None] * len(groups), groups, weights)
    assert prior.spread == 0
    return prior.median


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_true_temperature_is_found(temperature: float) -> None:
    assert shared_temperature([labelled(20_000, 4, temperature, 0)]) == pytest.approx(temperature, rel=0.06)


def test_it_is_the_minimizer_of_the_mean_of_the_tasks_losses() -> None:
    groups = [labelled(300, 3, 2.0, 1), labelled(30, 5, 0.8, 2)]

    def loss(temperature: float) -> float:
        tempered = [
            (predictive(each, temperature).probabilities.numpy(), y.numpy(), each.shape[-1]) for each, y in groups
        ]
        return sum(float(log_loss(y, p, labels=list(range(k)))) for p, y, k in tempered) / 2

    best: Any = minimize_scalar(loss, bounds=(0.1, 10), method="bounded", options={"xatol": 1e-6})
    fitted = shared_temperature(groups)
    assert fitted == pytest.approx(float(best.x), rel=0.03)  # the grid's step is 5 %
    assert loss(fitted) == pytest.approx(float(best.fun), abs=1e-4)


def test_a_weight_counts_like_so_many_copies() -> None:
    one, other = labelled(300, 3, 2.0, 1), labelled(300, 3, 0.8, 2)
    assert shared_temperature([one, other], [1, 2]) == shared_temperature([one, other, other])


def test_fitting_needs_data() -> None:
    with pytest.raises(ValueError, match="at least one task"):
        fit_temperature_prior([], [])
    with pytest.raises(ValueError, match="queries of each"):
        fit_temperature_prior([None], [(torch.zeros(1, 0, 2), torch.zeros(0, dtype=torch.long))])


def test_a_task_temperature_is_the_mode_of_prior_and_likelihood() -> None:
    scores, answers = labelled(16, 3, 4.0, 3)
    prior = TemperaturePrior(median=1.0, spread=0.7)

    def negative_log_posterior(log_temperature: float) -> float:
        p = predictive(scores, float(np.exp(log_temperature))).probabilities.numpy()
        likelihood = float(log_loss(answers.numpy(), p, labels=[0, 1, 2], normalize=False))
        return likelihood - float(norm.logpdf(log_temperature, 0.0, 0.7))

    best: Any = minimize_scalar(negative_log_posterior, bounds=(-3, 3), method="bounded")
    assert task_temperature(prior, (scores, answers)) == pytest.approx(float(np.exp(best.x)), rel=0.03)


def test_a_task_of_which_nothing_is_known_has_the_median_temperature() -> None:
    scores, answers = labelled(16, 3, 4.0, 3)
    assert task_temperature(TemperaturePrior(median=2.0, spread=0.7), None) == 2.0
    assert task_temperature(TemperaturePrior(median=2.0), (scores, answers)) == 2.0


def test_temperatures_of_tasks_are_found_to_differ_where_they_do() -> None:
    true = [0.3, 0.5, 1.0, 2.0, 4.0, 8.0]
    support = [labelled(40, 4, t, 10 + i) for i, t in enumerate(true)]
    query = [labelled(400, 4, t, 50 + i) for i, t in enumerate(true)]
    prior = fit_temperature_prior(support, query)
    assert prior.spread >= 0.75
    for temperature, (scores, answers) in zip(true, support, strict=True):
        assert task_temperature(prior, (scores, answers)) == pytest.approx(temperature, rel=0.6)


def test_temperatures_of_tasks_are_shared_where_they_are_the_same() -> None:
    support = [labelled(8, 4, 2.0, 10 + i) for i in range(8)]
    query = [labelled(400, 4, 2.0, 50 + i) for i in range(8)]
    prior = fit_temperature_prior(support, query)
    assert prior.spread <= 0.2
    assert prior.median == pytest.approx(2.0, rel=0.12)


@pytest.mark.parametrize("coverage", [0.8, 0.9])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_conformal_sets_cover_even_where_the_model_is_wrong(coverage: float, temperature: float) -> None:
    covered: list[float] = []
    within: list[float] = []
    for seed in range(200):
        scores, answers = labelled(200, 4, temperature, seed)
        probabilities = predictive(scores).probabilities
        threshold = conformal_threshold(conformal_scores(probabilities[:100], answers[:100], seed), coverage)
        sets = prediction_set(probabilities[100:], threshold)
        covered.append(sets.gather(1, answers[100:, None]).double().mean().item())
        own = conformal_scores(probabilities[100:], answers[100:], seed + 1000)
        within.append((own <= threshold).double().mean().item())
    # Exact in expectation up to 1 / (n + 1); the sets hold whatever passes with some random part.
    assert sum(within) / len(within) == pytest.approx(coverage, abs=0.015)
    assert coverage <= sum(within) / len(within) + 0.01 <= sum(covered) / len(covered) + 0.01


def test_nonconformity_is_uniform_for_every_number_of_options_where_probabilities_are_right() -> None:
    for options in (2, 3, 4, 12):
        scores, answers = labelled(20_000, options, 1.0, options)
        found = conformal_scores(predictive(scores).probabilities, answers).sort().values
        expected = torch.linspace(0, 1, len(found), dtype=found.dtype)
        assert (found - expected).abs().max() < 0.02  # Kolmogorov and Smirnov: 0.014 in one of a thousand


def test_equal_options_are_all_as_nonconforming() -> None:
    answers = torch.arange(4).repeat(5000)
    found = conformal_scores(torch.full((20_000, 4), 0.25), answers)
    for answer in range(4):
        assert found[answers == answer].mean() == pytest.approx(0.5, abs=0.02)


def test_sets_hold_for_every_number_of_options_though_the_threshold_is_of_all() -> None:
    """Of options that are nearly alike: a set that leaves one of four out is right in three of four questions."""
    generator = torch.Generator().manual_seed(2)
    asked: list[tuple[int, torch.Tensor, torch.Tensor]] = []
    for options in (2, 3, 4, 6):
        probabilities = (0.05 * torch.randn(4000, options, generator=generator)).softmax(-1).double()
        asked.append((options, probabilities, torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)))
    nonconformity = torch.cat([conformal_scores(p, answers, options) for options, p, answers in asked])
    threshold = conformal_threshold(nonconformity, 0.9)
    assert threshold == pytest.approx(0.9, abs=0.01)
    for _, probabilities, answers in asked:
        inside = prediction_set(probabilities, threshold).gather(1, answers[:, None])
        assert inside.double().mean() >= 0.9


def test_a_set_is_as_small_as_its_probability_allows() -> None:
    sure, open_, three = torch.tensor([[0.95, 0.03, 0.02], [0.5, 0.3, 0.2], [0.6, 0.35, 0.05]])
    assert prediction_set(sure, 0.9).tolist() == [True, False, False]
    assert prediction_set(open_, 0.9).tolist() == [True, True, True]
    assert prediction_set(three, 0.9).tolist() == [True, True, False]
    assert prediction_set(torch.full((4,), 0.25), 0.9).tolist() == [True] * 4


def test_a_threshold_from_few_options_covers_many() -> None:
    few, many = labelled(20_000, 3, 1.0, 3), labelled(20_000, 12, 1.0, 4)
    threshold = conformal_threshold(conformal_scores(predictive(few[0]).probabilities, few[1]), 0.9)
    sets = prediction_set(predictive(many[0]).probabilities, threshold)
    held = sets.gather(1, many[1][:, None]).double().mean().item()
    assert 0.9 <= held < 0.96
    assert sets.double().sum(-1).mean() < 12


def test_the_threshold_is_the_finite_sample_quantile() -> None:
    scores = torch.tensor([0.1, 0.5, 0.3, 0.2, 0.4, 0.9, 0.7, 0.6, 0.8])
    assert conformal_threshold(scores, 0.5) == pytest.approx(0.5)
    assert conformal_threshold(scores, 0.9) == pytest.approx(0.9)
    assert conformal_threshold(scores, 0.95) == 1.0
    with pytest.raises(ValueError, match="between 0 and 1"):
        conformal_threshold(scores, 1.0)


def test_no_set_is_empty() -> None:
    assert prediction_set(torch.tensor([0.4, 0.35, 0.25]), 0.1).tolist() == [True, False, False]


def test_the_entry_nearest_in_shots_is_used() -> None:
    entries = [
        ShotCalibration(shots=n, temperature=1, conformal={}, ece_before=0, ece_after=0, questions=1)
        for n in (0, 4, 16)
    ]
    calibration = Calibration(by_shots=entries, fitted_on=[], draws=8)
    found = [calibration.nearest(n) for n in (0, 1, 2, 8, 9, 64)]
    assert [entry and entry.shots for entry in found] == [0, 0, 4, 4, 16, 16]
    texts = [
        TextCalibration(shots=n, slope=1, offset=0, accuracy=0, ece_before=0, ece_after=0, questions=1)
        for n in (0, 4, 16)
    ]
    calibration = Calibration(by_shots=[], texts=texts, fitted_on=[], draws=8)
    assert calibration.nearest(4) is None
    likely = [calibration.nearest_text(n) for n in (0, 1, 2, 9, 64)]  # one example is not none
    assert [entry and entry.shots for entry in likely] == [0, 4, 4, 16, 16]
    with pytest.raises(ValueError, match="at least one entry"):
        Calibration(by_shots=[], fitted_on=[], draws=8)


def answered_tasks(count: int, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Confidences and correctness of tasks of 30 questions, of which the model is too sure to a different degree."""
    generator = torch.Generator().manual_seed(seed)
    confidence = torch.rand(count, 30, generator=generator)
    honest = torch.rand(count, 1, generator=generator)
    correct = torch.rand(count, 30, generator=generator) < confidence * honest
    return list(confidence), list(correct)


@pytest.mark.parametrize("tasks", [12, 60])
def test_a_new_task_gets_no_more_wrong_answers_than_promised(tasks: int) -> None:
    """Over many draws of validation tasks: the promise is of a mean, and not kept by answering hardly anything."""
    confidence, correct = (torch.stack(part) for part in answered_tasks(4000, seed=1))
    achieved: dict[str, list[float]] = {"0.10": [], "0.20": []}
    for seed in range(2, 102):
        found = risk_thresholds(*answered_tasks(tasks, seed))
        for level, shares in achieved.items():
            shares.append(((confidence > found[level]) & ~correct).double().mean().item())
    for level, shares in achieved.items():
        mean = sum(shares) / len(shares)
        assert mean <= float(level) + 0.005
        assert mean >= float(level) - 1.5 / (tasks + 1)


def test_few_tasks_promise_no_small_risk_and_right_answers_need_no_confidence() -> None:
    right = [torch.ones(5, dtype=torch.bool)] * 9
    found = risk_thresholds([torch.rand(5)] * 9, right)
    assert min(found) == "0.10"
    assert set(found.values()) == {0.0}
    entry = ShotCalibration(shots=0, temperature=1, conformal={}, risk=found, ece_before=0, ece_after=0, questions=1)
    assert entry.risk_threshold(0.105) == 0.0
    assert entry.risk_threshold(0.09) is None


def test_a_threshold_is_the_least_that_keeps_the_promise() -> None:
    confidence = [torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.tensor([0.5, 0.4, 0.3, 0.2])]
    correct = [torch.tensor([True, False, True, False]), torch.tensor([False, True, False, True])]
    found = risk_thresholds(confidence, correct)
    assert "0.33" not in found  # two tasks promise a third at best
    assert found["0.34"] == pytest.approx(0.8)  # (0 + 1) / 3
    assert found["0.42"] == pytest.approx(0.6)  # (1/4 + 1) / 3
    assert found["0.50"] == pytest.approx(0.5)  # (2/4 + 1) / 3
