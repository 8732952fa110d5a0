from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import abmll.components
from abmll.components import Known, beginning, log_likelihood
from abmll.errors import AbmllError, InvalidPosterior
from abmll.examples import Example
from abmll.layers import Attached, init_posterior
from abmll.objective import data_loss
from abmll.posterior import Components, Posterior, PosteriorConfig, members_of, mixture
from abmll.scoring import Question
from abmll.store import Record, load_posterior, save_posterior
from tests.training.conftest import TARGETS, rule_task
from tests.training.test_task_calibration import CALIBRATION
from training.adaptation import AdaptConfig, adapt, task_posterior
from training.base_model import BaseModel
from training.components import MOST_EXAMPLES, check_components, choose_tasks, with_task_components
from training.episodes import label
from training.evaluation import EvalConfig, predict_task, support_and_query
from training.progress import silent
from training.task_calibration import adapt_and_calibrate

CONFIG = AdaptConfig(steps=4, learning_rate=5e-2, scale_rate=5e-2, beta=1e-2)
EXAMPLES = rule_task(0).examples


@pytest.fixture
def theta(attached: Attached) -> Posterior:
    return init_posterior(attached, PosteriorConfig(base_model="tiny", targets=TARGETS, family="subspace"), 0)


@pytest.fixture
def components(theta: Posterior) -> Components:
    generator = torch.Generator().manual_seed(0)
    cores = {name: 6 * torch.randn(9, *layer.noise_shape, generator=generator) for name, layer in theta.layers.items()}
    tasks, families = (tuple(f"{kind} {number}" for number in range(9)) for kind in ("task", "family"))
    return Components(tasks, families, cores)


def at(theta: Posterior, components: Components, number: int) -> Posterior:
    means = {f"{name}.mean.core": cores[number] for name, cores in components.cores.items()}
    return theta.with_tensors(theta.tensors() | means)


def by_one(
    base: BaseModel, attached: Attached, theta: Posterior, components: Components, examples: tuple[Example, ...]
) -> torch.Tensor:
    support = label(base, theta.config.template, examples)
    with torch.no_grad():
        nats = [data_loss(attached, at(theta, components, number), support, None) for number in range(9)]
    return -torch.stack(nats).double()


def test_components_are_as_likely_as_posteriors_at_their_means(
    base: BaseModel, attached: Attached, theta: Posterior, components: Components
) -> None:
    support = label(base, theta.config.template, EXAMPLES[:5])
    found = log_likelihood(attached, theta, components, support)
    expected = by_one(base, attached, theta, components, EXAMPLES[:5])
    assert found.shape == (9,)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert expected.std() > 0.1  # they differ, so that no other order of them would do
    torch.testing.assert_close(log_likelihood(attached, theta, components.only([7]), support), found[7:8])


def test_components_whose_weight_is_negligible_are_left_out(
    base: BaseModel, attached: Attached, theta: Posterior, components: Components
) -> None:
    found = log_likelihood(attached, theta, components, label(base, theta.config.template, EXAMPLES))
    shuffled = tuple(random.Random(0).sample(EXAMPLES, len(EXAMPLES)))
    first, every = (by_one(base, attached, theta, components, examples) for examples in (shuffled[:16], EXAMPLES))
    kept = found.isfinite()
    assert 0 < kept.sum() < 9
    torch.testing.assert_close(found[kept], every[kept], atol=1e-3, rtol=1e-4)
    assert 0.5 * (first[kept] - first.max()).min() >= -6
    assert (0.5 * every).softmax(dim=0)[~kept].sum() < 0.01


def test_a_task_begins_at_a_mean_of_the_components_that_its_examples_leave_likely(
    theta: Posterior, components: Components
) -> None:
    generator = torch.Generator().manual_seed(0)
    sure = torch.full((9,), -torch.inf, dtype=torch.float64)
    sure[3] = -5.0
    only = beginning(theta, components, sure, generator)
    torch.testing.assert_close(only.tensors(), at(theta, components, 3).tensors())
    two = torch.where(torch.arange(9) < 2, 0.0, -torch.inf).double()
    begun = [beginning(theta, components, two, generator) for _ in range(300)]
    assert len({posterior.digest() for posterior in begun}) > 5
    for name, layer in theta.layers.items():
        cores = torch.stack([posterior.tensors()[f"{name}.mean.core"] for posterior in begun])
        expected, apart = components.cores[name][:2].mean(dim=0), components.cores[name][0] - components.cores[name][1]
        torch.testing.assert_close(cores.mean(dim=0), expected, atol=0.4, rtol=0)
        # Of 16 of two cores, each as likely as the other, the mean has a standard deviation of their distance / 8.
        torch.testing.assert_close(cores.std(dim=0), apart.abs() / 8, atol=0.2, rtol=0.2)
        assert torch.equal(begun[0].layers[name].scale["log_s"], layer.scale["log_s"])


def test_adaptation_starts_there_and_is_held_there(
    base: BaseModel, attached: Attached, theta: Posterior, components: Components
) -> None:
    support = label(base, theta.config.template, EXAMPLES[:16])
    likeliest = int(log_likelihood(attached, theta, components, support).argmax())
    alone = components.only([likeliest])

    def distance(config: AdaptConfig, given: Components | None) -> float:
        generator = torch.Generator().manual_seed(0)
        phi = task_posterior(attached, theta.with_components(given), support, config, generator)
        assert phi.components is None
        assert phi.config.members == config.members
        return max(
            (layer.core - alone.cores[name][0]).abs().max().item()
            for member in members_of(phi)
            for name, layer in member.layers.items()
            if layer.core is not None
        )

    free, held = (CONFIG.model_copy(update={"steps": 40, "beta": beta}) for beta in (0.0, 10.0))
    assert distance(held, alone) < distance(free, alone) < distance(free, None)
    still = CONFIG.model_copy(update={"learning_rate": 1e-9, "members": 2})
    assert distance(still, alone) < 1e-4


def test_without_options_or_examples_there_is_nothing_to_weigh_them_by(
    base: BaseModel, attached: Attached, theta: Posterior, components: Components
) -> None:
    texts = [Example(example.prompt, (example.options[example.answer],), 0) for example in EXAMPLES[:4]]
    support = label(base, theta.config.template, texts)
    with_them, without = (
        task_posterior(attached, theta.with_components(given), support, CONFIG, torch.Generator().manual_seed(0))
        for given in (components, None)
    )
    assert with_them.digest() == without.digest() != theta.digest()
    generator = torch.Generator().manual_seed(0)
    untaught = task_posterior(attached, theta.with_components(components), [], CONFIG, generator)
    assert untaught.digest() == theta.digest()


def test_components_are_posteriors_of_the_tasks(base: BaseModel, attached: Attached, theta: Posterior) -> None:
    tasks = [rule_task(0), rule_task(1, MOST_EXAMPLES + 4)]
    config = CONFIG.model_copy(update={"growth": 0.0, "members": 4})
    found = with_task_components(base, attached, theta, tasks, config, 1, silent).components
    assert found is not None
    assert (found.tasks, found.families) == (("rule_0", "rule_1"), ("family_0", "family_1"))
    for number, (task, count) in enumerate(zip(tasks, (40, MOST_EXAMPLES), strict=True)):
        some = random.Random(f"1:{task.name}").sample(task.examples, count)
        alone = CONFIG.model_copy(update={"growth": 0.5})
        generator = torch.Generator().manual_seed(1)
        phi = task_posterior(attached, theta, label(base, theta.config.template, some), alone, generator)
        assert all(torch.equal(own[number], phi.tensors()[f"{name}.mean.core"]) for name, own in found.cores.items())


def test_tasks_to_be_components_have_options_and_are_of_all_families() -> None:
    texts = [Example(example.prompt, (example.text,), 0) for example in EXAMPLES]
    tasks = [rule_task(number) for number in range(3)]
    more = [replace(tasks[0], name=f"again_{number}") for number in range(5)]
    few = replace(rule_task(7), examples=EXAMPLES[:15])
    free = replace(rule_task(8), examples=tuple(texts))
    chosen = choose_tasks([*tasks, *more, few, free], 4, seed=0)
    assert len(chosen) == 4
    assert {task.family for task in chosen[:3]} == {"family_0", "family_1", "family_2"}
    assert choose_tasks([few, free], 0, seed=0) == []
    with pytest.raises(AbmllError, match="no training task has 16 examples with options"):
        choose_tasks([few, free], 2, seed=0)


def test_only_one_gaussian_over_cores_has_components(
    attached: Attached, theta: Posterior, components: Components
) -> None:
    other = init_posterior(attached, PosteriorConfig(base_model="tiny", targets=TARGETS), 0)
    for posterior in (other, mixture([theta, theta])):
        with pytest.raises(ValueError, match="only a subspace posterior that is no mixture"):
            posterior.with_components(components)
    with pytest.raises(AbmllError, match="not a kronecker one; give 0"):
        check_components(3, "kronecker")
    check_components(0, "kronecker")


def test_a_stored_posterior_keeps_its_components(theta: Posterior, components: Components, tmp_path: Path) -> None:
    whole = theta.with_components(components)
    stored = save_posterior(tmp_path / "posterior", whole, Record())
    read = load_posterior(tmp_path / "posterior").posterior
    assert read.components is not None
    assert read.components.tasks == components.tasks
    torch.testing.assert_close(dict(read.components.cores), dict(components.cores), rtol=0, atol=0)
    assert read.digest() == stored.digest == whole.digest() != theta.digest()
    assert "9 components" in (tmp_path / "posterior" / "CARD.md").read_text()
    fewer = read.unfamiliar_with("family 4").components
    assert fewer is not None
    assert fewer.tasks == tuple(f"task {number}" for number in range(9) if number != 4)
    assert all(torch.equal(own, components.cores[name][[0, 1, 2, 3, 5, 6, 7, 8]]) for name, own in fewer.cores.items())
    assert theta.with_components(components.only([4])).unfamiliar_with("family 4").components is None
    assert whole.digest() != theta.with_components(replace(components, tasks=tuple("abcdefghi"))).digest()
    path = tmp_path / "posterior" / "posterior.json"
    file = json.loads(path.read_text())
    more = file["components"] + [{"task": "task 9", "family": "family 9"}]
    path.write_text(json.dumps(file | {"components": more}))
    with pytest.raises(InvalidPosterior, match=r"components is \(9, 16, 16\).*not \(10, 16, 16\)"):
        load_posterior(tmp_path / "posterior")
    for change in ({"config": file["config"] | {"members": 2}}, {"record": file["record"] | {"task": "films"}}):
        path.write_text(json.dumps(file | change))
        with pytest.raises(InvalidPosterior, match="lists components, which a global subspace posterior alone has"):
            load_posterior(tmp_path / "posterior")


def test_an_evaluated_task_is_met_without_the_components_of_its_family(
    base: BaseModel, attached: Attached, theta: Posterior, components: Components
) -> None:
    config = EvalConfig(shots=(4,), draws=2, queries=8)
    support, _ = support_and_query(rule_task(0), 4, config, 0)
    likelihood = log_likelihood(attached, theta, components, label(base, theta.config.template, support))
    number = int(likelihood.argmax())
    others = components.only([other for other in range(9) if other != number])

    def scores(family: str, given: Components) -> torch.Tensor:
        task = replace(rule_task(0), family=family)
        return predict_task(base, attached, theta.with_components(given), task, 4, CONFIG, config).scores

    assert torch.equal(scores(f"family {number}", components), scores("another", others))
    assert not torch.equal(scores("another", components), scores("another", others))


def test_in_what_order_examples_come_does_not_say_which_components_are_left_out(
    base: BaseModel, attached: Attached, theta: Posterior, components: Components
) -> None:
    by_label = sorted(EXAMPLES, key=lambda example: example.answer)
    found, of_first = (
        log_likelihood(attached, theta, components, label(base, theta.config.template, examples))
        for examples in (by_label, by_label[:16])
    )
    every = by_one(base, attached, theta, components, tuple(by_label))
    assert (0.5 * every).softmax(dim=0)[~found.isfinite()].sum() < 0.01
    assert int(found.argmax()) == int(every.argmax()) != int(of_first.argmax())


def test_no_component_is_asked_the_same_question_twice(
    base: BaseModel, attached: Attached, theta: Posterior, components: Components, monkeypatch: pytest.MonkeyPatch
) -> None:
    support = label(base, theta.config.template, EXAMPLES)
    parts = (support[:20], support, support[10:])
    afresh = [log_likelihood(attached, theta, components, part) for part in parts]
    asked: Counter[tuple[Question, int]] = Counter()
    score = abmll.components.score_draws

    def counted(
        attached: Attached, posterior: Posterior, questions: list[Question], draws: range, *rest: int, **more: int
    ) -> torch.Tensor:
        name = next(iter(theta.layers))
        cores = [member.tensors()[f"{name}.mean.core"] for member in members_of(posterior)]
        numbers = [n for core in cores for n in range(9) if torch.equal(core, components.cores[name][n])]
        asked.update((question, number) for question in questions for number in numbers)
        return score(attached, posterior, questions, draws, *rest, **more)

    monkeypatch.setattr(abmll.components, "score_draws", counted)
    known: Known = {}
    again = [log_likelihood(attached, theta, components, part, known=known) for part in parts]
    for one, other in zip(afresh, again, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-4)
    assert len({question for question, _ in asked}) == len({item.question for item in support})
    assert set(asked.values()) == {1}

    # Nor in the folds of a task's temperature.
    taught, whole = EXAMPLES[:12], theta.with_components(components)
    for measured in (
        lambda: adapt_and_calibrate(base, attached, whole, taught, CONFIG, CALIBRATION),
        lambda: predict_task(base, attached, whole, rule_task(0), 12, CONFIG, EvalConfig(draws=2, queries=4)),
    ):
        asked.clear()
        measured()
        assert len({question for question, _ in asked}) == 12
        assert set(asked.values()) == {1}


def test_who_waits_is_asked_while_components_are_weighed(
    base: BaseModel, attached: Attached, theta: Posterior, components: Components
) -> None:
    told: list[tuple[int, int]] = []

    def stop(step: int, steps: int) -> None:
        told.append((step, steps))
        if len(told) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adapt(base, attached, theta.with_components(components), EXAMPLES[:16], CONFIG, on_step=stop)
    assert told == [(0, 4), (0, 4)]


def test_a_task_that_diverges_is_no_component(base: BaseModel, attached: Attached, theta: Posterior) -> None:
    wild = CONFIG.model_copy(update={"learning_rate": 1e30})
    with pytest.raises(AbmllError, match="adaptation to task rule_0 diverged"):
        with_task_components(base, attached, theta, [rule_task(0)], wild, 1, silent)
