from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

from abmll.calibration import Calibration, ShotCalibration, fit_temperature_prior
from abmll.errors import InvalidExamples
from abmll.layers import Attached, init_posterior
from abmll.metrics import expected_calibration_error
from abmll.posterior import PosteriorConfig
from abmll.predictive import predictive
from abmll.risk import risk_thresholds
from tests.training.conftest import TARGETS, rule_task
from training.adaptation import AdaptConfig
from training.base_model import BaseModel
from training.evaluation import (
    EvalConfig,
    TaskPredictions,
    at_risk,
    calibrate,
    family_weights,
    held_out_families,
    predict_tasks,
    score,
    support_and_query,
    task_risk,
)
from training.report import grouped, markdown

CONFIG = EvalConfig(shots=(0, 4), queries=10, draws=3, supports=2)


def mean_of(item: TaskPredictions) -> Tensor:
    return item.scores.double().softmax(-1).mean(0)


@pytest.fixture
def predictions(base: BaseModel, attached: Attached) -> list[TaskPredictions]:
    theta = init_posterior(attached, PosteriorConfig(base_model="tiny", targets=TARGETS), 0)
    tasks = [rule_task(number) for number in range(3)]
    return predict_tasks(base, attached, theta, tasks, AdaptConfig(steps=3, learning_rate=2e-2), CONFIG)


def test_every_task_shots_and_support_set_is_predicted(predictions: list[TaskPredictions]) -> None:
    assert len(predictions) == 3 * 2 * 2
    for item in predictions:
        assert item.scores.shape == (3, 10, 2)
        assert item.scores.isfinite().all()
    zero = [item for item in predictions if item.shots == 0]
    four = [item for item in predictions if item.shots == 4]
    for before, after in zip(zero, four, strict=True):
        assert torch.equal(before.answers, after.answers)  # the same questions
        assert not torch.allclose(before.scores, after.scores)


def test_no_fewer_examples_are_given_than_a_row_says(base: BaseModel, attached: Attached) -> None:
    theta = init_posterior(attached, PosteriorConfig(base_model="tiny", targets=TARGETS), 0)
    small = replace(rule_task(0), examples=rule_task(0).examples[:7])
    inner = AdaptConfig(steps=1)
    found = predict_tasks(base, attached, theta, [small, rule_task(1)], inner, CONFIG)
    assert [(item.task.name, item.shots) for item in found] == [
        ("rule_0", 0), ("rule_0", 0), ("rule_1", 0), ("rule_1", 0), ("rule_1", 4), ("rule_1", 4),
    ]  # fmt: skip
    assert [entry.shots for entry in calibrate(found, CONFIG).by_shots] == [0, 4]


def test_processes_share_the_work_and_change_nothing(
    base: BaseModel, attached: Attached, predictions: list[TaskPredictions]
) -> None:
    theta = init_posterior(attached, PosteriorConfig(base_model="tiny", targets=TARGETS), 0)
    tasks = [rule_task(number) for number in range(3)]
    inner = AdaptConfig(steps=3, learning_rate=2e-2)
    shared = predict_tasks(base, attached, theta, tasks, inner, CONFIG, jobs=2)
    for one, other in zip(shared, predictions, strict=True):
        assert (one.task, one.shots) == (other.task, other.shots)
        torch.testing.assert_close(one.scores, other.scores, atol=1e-3, rtol=1e-3)  # the number of threads rounds


def test_scores_are_the_libraries(predictions: list[TaskPredictions]) -> None:
    chosen = [item for item in predictions if item.shots == 4]
    scores = score(chosen, None)
    accuracies = [accuracy_score(item.answers, mean_of(item).argmax(-1)) for item in chosen]
    assert scores.accuracy == pytest.approx(sum(accuracies) / len(accuracies))
    losses = [float(log_loss(item.answers, mean_of(item), labels=[0, 1])) for item in chosen]
    assert scores.nll == pytest.approx(sum(losses) / len(losses))
    pooled = torch.cat([mean_of(item) for item in chosen]).float()
    answers = torch.cat([item.answers for item in chosen])
    expected = multiclass_calibration_error(pooled, answers, 2, n_bins=15)
    assert scores.ece == pytest.approx(expected.item(), abs=1e-5)
    assert scores.tasks == 3


def test_calibration_lowers_the_loss_it_is_fitted_to(predictions: list[TaskPredictions]) -> None:
    calibration = calibrate(predictions, CONFIG)
    assert [entry.shots for entry in calibration.by_shots] == [0, 4]
    assert calibration.fitted_on == ["rule_0", "rule_1", "rule_2"]
    for shots in (0, 4):
        chosen = [item for item in predictions if item.shots == shots]
        assert score(chosen, calibration).nll <= score(chosen, None).nll + 1e-9
        assert (score(chosen, calibration).coverage_90 or 0) >= 0.9


def test_the_table_has_a_row_for_each_group_and_shots(predictions: list[TaskPredictions]) -> None:
    table = markdown(grouped(predictions, lambda group: score(group, None), lambda task: task.family), "family")
    lines = table.splitlines()
    assert lines[0].startswith("| family | shots | tasks | chance | accuracy | ece |")
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        *(f"family_{n}" for n in range(3) for _ in range(2)), "all", "all",
    ]  # fmt: skip


def test_of_one_family_each_task_is_held_out(predictions: list[TaskPredictions]) -> None:
    several = [(sorted({i.task.name for i in own}), len(others)) for own, others in held_out_families(predictions)]
    assert several == [([f"rule_{number}"], 8) for number in range(3)]
    one = [replace(item, task=replace(item.task, family="rules")) for item in predictions]
    assert [({i.task.name for i in own}, len(others)) for own, others in held_out_families(one)] == [
        ({f"rule_{number}"}, 8) for number in range(3)
    ]
    alone = [item for item in one if item.task.name == "rule_0"]
    assert [(own, others) for own, others in held_out_families(alone)] == [(alone, alone)]


def test_a_question_that_was_taught_is_not_asked() -> None:
    task = rule_task(1)
    twice = replace(task, examples=task.examples * 2)
    taught, asked = support_and_query(twice, 4, EvalConfig(shots=(4,)))
    assert len(taught) == 4
    assert asked
    assert {example.prompt for example in taught}.isdisjoint(example.prompt for example in asked)
    with pytest.raises(InvalidExamples, match="the same questions again and again"):
        support_and_query(replace(task, examples=task.examples[:1] * 8), 4, EvalConfig(shots=(4,)))


def test_a_group_called_all_is_not_everything(predictions: list[TaskPredictions]) -> None:
    first = predictions[0].task.name
    rows = grouped(predictions, lambda group: score(group, None), lambda task: "all" if task.name == first else "b")
    assert [name for name, shots, _ in rows if shots == predictions[0].shots] == ["all (its own)", "b", "all"]
    tasks = [scores.tasks for _, shots, scores in rows if shots == predictions[0].shots]
    assert tasks[0] == 1
    assert tasks[0] + tasks[1] == tasks[2]


def predicted(name: str, family: str, sharpness: float) -> TaskPredictions:
    """Answers whose scores are that many times what they should be."""
    generator = torch.Generator().manual_seed(len(name) + ord(family))
    logits = 1.5 * torch.randn(200, 2, generator=generator)
    answers = logits.softmax(-1).multinomial(1, generator=generator).squeeze(-1)
    task = replace(rule_task(0), name=name, family=family)
    return TaskPredictions(task, 4, sharpness * logits.expand(2, -1, -1), answers, 0.5)


def test_the_error_after_calibration_is_of_families_that_it_was_not_fitted_to() -> None:
    sure, unsure = predicted("one", "a", 6.0), predicted("one", "b", 0.3)
    results = [
        predictive(own.scores, fit_temperature_prior([None], [(other.scores, other.answers)]).median)
        for own, other in ((sure, unsure), (unsure, sure))
    ]
    right = torch.cat([result.answer == own.answers for result, own in zip(results, (sure, unsure), strict=True)])
    expected = expected_calibration_error(torch.cat([result.confidence for result in results]), right)
    group = [sure, unsure]
    (entry,) = calibrate(group, CONFIG).by_shots
    assert entry.ece_after == pytest.approx(expected)
    fitted_to_all = Calibration(by_shots=[entry], fitted_on=["one"], draws=2)
    assert entry.ece_after > score(group, fitted_to_all).ece + 0.05


def test_a_family_counts_once_in_the_temperature_whatever_its_number_of_tasks() -> None:
    sure, unsure = predicted("one", "a", 6.0), predicted("one", "b", 0.3)
    again = [replace(sure, task=replace(sure.task, name=name)) for name in ("two", "three", "four")]
    (once,), (often,) = (calibrate(group, CONFIG).by_shots for group in ([sure, unsure], [sure, unsure, *again]))
    assert often.temperature == once.temperature


def test_parts_count_the_same_and_so_do_the_families_of_a_part() -> None:
    one, two, alone = (predicted(name, family, 1.0).task for name, family in (("p", "a"), ("q", "a"), ("r", "b")))
    assert family_weights([[one, two, alone], [alone]]) == [0.25, 0.25, 0.5, 1.0]


def test_what_is_answered_is_surer_than_the_threshold_and_the_wrong_part_of_it_counts() -> None:
    entry = ShotCalibration(
        shots=4, temperature=1, conformal={}, risk={"0.05": 0.9, "0.10": 0.7}, ece_before=0, ece_after=0, questions=1
    )
    confidence, correct = torch.tensor([0.95, 0.8, 0.75, 0.7, 0.2]), torch.tensor([True, False, True, False, False])
    assert at_risk(entry, confidence, correct) == pytest.approx({"answered_10": 0.6, "wrong_10": 0.2})
    assert at_risk(entry.model_copy(update={"risk": {"0.20": 0.7}}), confidence, correct) == {}


def test_support_sets_of_one_task_are_one_task_to_risk() -> None:
    tasks = [rule_task(0), rule_task(1), rule_task(0)]
    generator = torch.Generator().manual_seed(0)
    confidence = [torch.rand(20, generator=generator) for _ in tasks]
    correct = [torch.rand(20, generator=generator) < each for each in confidence]
    joined = [[torch.cat([of[0], of[2]]), of[1]] for of in (confidence, correct)]
    assert task_risk(tasks, confidence, correct) == risk_thresholds(*joined)
    all_right = task_risk(tasks, confidence, [torch.ones(20, dtype=torch.bool)] * 3)
    assert min(all_right) == "0.34"  # of two tasks nothing under 1 / 3 can be promised
