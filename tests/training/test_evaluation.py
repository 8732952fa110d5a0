from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

from abmll.errors import InvalidExamples
from abmll.layers import Attached, init_posterior
from abmll.posterior import PosteriorConfig
from tests.training.conftest import TARGETS, rule_task
from training.adaptation import AdaptConfig
from training.base_model import BaseModel
from training.evaluation import (
    EvalConfig,
    TaskPredictions,
    calibrate,
    held_out_families,
    predict_tasks,
    score,
    support_and_query,
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
