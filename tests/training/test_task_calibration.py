from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from abmll.calibration import Calibration, ShotCalibration
from abmll.errors import InvalidExamples
from abmll.layers import Attached, init_posterior
from abmll.posterior import Posterior, PosteriorConfig
from tests.training.conftest import TARGETS, rule_task
from training.adaptation import AdaptConfig, adapt
from training.base_model import BaseModel
from training.episodes import label
from training.folds import folds_of
from training.task_calibration import adapt_and_calibrate, held_out_scores

CONFIG = AdaptConfig(steps=4, learning_rate=2e-2)
EXAMPLES = rule_task(0).examples[:10]
CALIBRATION = Calibration(
    by_shots=[
        ShotCalibration(
            shots=shots, temperature=2.0, spread=spread, conformal={"0.9": 0.8}, ece_before=0, ece_after=0, questions=1
        )
        for shots, spread in ((0, 0.0), (16, 1.0))
    ],
    fitted_on=["films"],
    draws=2,
)


@pytest.fixture
def theta(attached: Attached) -> Posterior:
    return init_posterior(attached, PosteriorConfig(base_model="tiny", targets=TARGETS), 0)


def test_no_example_is_scored_by_a_posterior_that_has_seen_it(
    base: BaseModel, attached: Attached, theta: Posterior
) -> None:
    support = label(base, theta.config.template, EXAMPLES)
    before = held_out_scores(attached, theta, support, CONFIG, draws=2, seed=0)
    support[3] = replace(support[3], answer=1 - support[3].answer)
    after = held_out_scores(attached, theta, support, CONFIG, draws=2, seed=0)
    assert before is not None
    assert after is not None
    same = [torch.equal(before[0][:, i], after[0][:, i]) for i in range(10)]
    assert same[3]
    assert same.count(False) >= 6  # those of the other folds have met the changed label
    assert before[0].shape == (2, 10, 2)
    assert before[0].isfinite().all()
    assert before[1].tolist() == [example.answer for example in EXAMPLES]


def test_a_repeated_example_is_not_scored_by_a_posterior_that_has_seen_its_twin(
    base: BaseModel, attached: Attached, theta: Posterior
) -> None:
    support = label(base, theta.config.template, [*EXAMPLES, *EXAMPLES[:6]])
    before = held_out_scores(attached, theta, support, CONFIG, draws=2, seed=0)
    for place in (3, 13):
        support[place] = replace(support[place], answer=1 - support[place].answer)
    after = held_out_scores(attached, theta, support, CONFIG, draws=2, seed=0)
    assert before is not None
    assert after is not None
    assert all(torch.equal(before[0][:, place], after[0][:, place]) for place in (3, 13))
    assert not torch.equal(before[0], after[0])
    alike = label(base, theta.config.template, EXAMPLES[:1]) * 16
    assert held_out_scores(attached, theta, alike, CONFIG, draws=2, seed=0) is None


def test_one_example_leaves_nothing_to_hold_out(base: BaseModel, attached: Attached, theta: Posterior) -> None:
    support = label(base, theta.config.template, EXAMPLES[:1])
    assert held_out_scores(attached, theta, support, CONFIG, draws=2, seed=0) is None
    assert [folds_of(n) for n in (0, 1, 2, 3, 4, 64)] == [0, 0, 2, 3, 4, 4]


def test_divergence_is_told(base: BaseModel, attached: Attached, theta: Posterior) -> None:
    support = label(base, theta.config.template, EXAMPLES)
    wild = CONFIG.model_copy(update={"learning_rate": 1e30})
    with pytest.raises(InvalidExamples, match="diverged on a part"):
        held_out_scores(attached, theta, support, wild, draws=2, seed=0)


def test_a_task_gets_its_own_temperature_and_the_posterior_of_adaptation(
    base: BaseModel, attached: Attached, theta: Posterior
) -> None:
    steps: list[tuple[int, int]] = []
    phi, calibration = adapt_and_calibrate(
        base, attached, theta, EXAMPLES, CONFIG, CALIBRATION, seed=1, on_step=lambda *at: steps.append(at)
    )
    assert phi.digest() == adapt(base, attached, theta, EXAMPLES, CONFIG, seed=1).digest()
    assert calibration is not None
    (entry,) = calibration.by_shots
    assert (entry.shots, entry.support, entry.spread) == (10, 10, 0.0)
    assert entry.temperature != 2.0
    assert entry.conformal == {"0.9": 0.8}
    assert steps == [(n, 20) for n in range(20)]


def test_where_tasks_share_a_temperature_nothing_is_held_out(
    base: BaseModel, attached: Attached, theta: Posterior
) -> None:
    steps: list[tuple[int, int]] = []
    few = EXAMPLES[:2]
    _, calibration = adapt_and_calibrate(
        base, attached, theta, few, CONFIG, CALIBRATION, on_step=lambda *at: steps.append(at)
    )
    assert calibration is not None
    assert (calibration.by_shots[0].temperature, calibration.by_shots[0].support) == (2.0, 0)
    assert steps == [(n, 4) for n in range(4)]
    assert adapt_and_calibrate(base, attached, theta, few, CONFIG, None)[1] is None


def test_a_tasks_own_temperature_is_of_as_many_draws_as_the_calibration(base: BaseModel, attached: Attached) -> None:
    wide = init_posterior(attached, PosteriorConfig(base_model="tiny", targets=TARGETS, scale_init=0.2), 0)
    many = CALIBRATION.model_copy(update={"draws": 6})
    support = label(base, wide.config.template, EXAMPLES)
    expected, of_one = (
        many.for_task(10, held_out_scores(attached, wide, support, CONFIG, draws=draws, seed=1)) for draws in (6, 1)
    )
    assert expected != of_one
    assert adapt_and_calibrate(base, attached, wide, EXAMPLES, CONFIG, many, seed=1)[1] == expected


def test_labels_that_are_listed_in_turn_are_mixed_before_some_are_left_out(
    base: BaseModel, attached: Attached, theta: Posterior
) -> None:
    support = label(base, theta.config.template, EXAMPLES[:8])
    assert [item.answer for item in support] == [0, 1] * 4
    flipped = [replace(support[0], answer=1), *support[1:]]
    few = CONFIG.with_steps(1)
    left_out: list[list[int]] = []
    for seed in range(3):
        before, after = (held_out_scores(attached, theta, of, few, draws=2, seed=seed) for of in (support, flipped))
        assert before is not None
        assert after is not None
        left_out.append([place for place in range(8) if torch.equal(before[0][:, place], after[0][:, place])])
    assert all(len(places) == 2 and places[0] == 0 for places in left_out)
    assert {support[places[1]].answer for places in left_out} == {0, 1}


def test_what_is_held_out_is_answered_with_as_much_freedom_as_the_task_has(base: BaseModel, attached: Attached) -> None:
    cores = init_posterior(attached, PosteriorConfig(base_model="tiny", targets=TARGETS, family="subspace"), 0)
    support = label(base, cores.config.template, EXAMPLES)
    scores: list[torch.Tensor] = []
    for examples in (1, 10, 11):  # each fold's posterior is adapted to seven or eight of the ten
        config = AdaptConfig(steps=4, learning_rate=5e-2, factor_rate=4e-3, factor_examples=examples)
        found = held_out_scores(attached, cores, support, config, draws=2, seed=0)
        assert found is not None
        scores.append(found[0])
    assert torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[1], scores[2])
