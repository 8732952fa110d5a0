from __future__ import annotations

import math

import pytest
import torch

from abmll.examples import Example
from abmll.predictive import entropy
from training.benchmark.world import OPTIONS, World

WORLD = World()


def test_the_exact_predictive_is_the_vote_of_all_rules() -> None:
    task = WORLD.tasks(1, seed=5)[0]
    support, query = task.examples[:5], task.examples[5:9]
    where = {prompt: number for number, prompt in enumerate(WORLD.prompts)}
    want: list[float] = []
    for question in query:
        joint, evidence = 0.0, 0.0
        for rule, prior in zip(WORLD.labels.tolist(), WORLD.prior.tolist(), strict=True):
            weight = prior
            for example in support:
                says_yes, is_yes = rule[where[example.prompt]] == 1, example.answer == 0
                weight *= 0.9 if says_yes == is_yes else 0.1
            evidence += weight
            joint += weight * (0.9 if rule[where[question.prompt]] == 1 else 0.1)
        want.append(joint / evidence)
    exact = WORLD.exact(support, query)
    assert exact[:, 0].tolist() == pytest.approx(want, rel=1e-9)
    assert exact.sum(-1).tolist() == pytest.approx([1.0] * 4)


def test_rules_are_distinct_and_weighted() -> None:
    assert len(WORLD.labels.unique(dim=0)) == len(WORLD.labels) == 56 + 2 * 216
    assert WORLD.prior.sum().item() == pytest.approx(1.0)
    assert len(set(WORLD.prompts)) == 256
    # None is constant: a task without a rule would teach nothing.
    assert ((WORLD.labels.mean(-1) > 0) & (WORLD.labels.mean(-1) < 1)).all()


@pytest.mark.parametrize("shots", [1, 8, 32])
def test_the_exact_predictive_keeps_its_promise_when_counted(shots: int) -> None:
    losses: list[float] = []
    promised: list[float] = []
    for task in WORLD.tasks(150, seed=11):
        query = task.examples[shots : shots + 20]
        exact = WORLD.exact(task.examples[:shots], query)
        answers = torch.tensor([example.answer for example in query])
        losses.append(-exact.log().gather(-1, answers[:, None]).mean().item())
        promised.append(entropy(exact).mean().item())
    spread = torch.tensor(losses).std().item() / math.sqrt(len(losses))
    assert sum(losses) / len(losses) == pytest.approx(sum(promised) / len(promised), abs=4 * spread)


def test_doubt_of_the_rule_falls_with_examples_to_nothing() -> None:
    means: list[float] = []
    for shots in (0, 2, 8, 32, 64):
        tasks = WORLD.tasks(40, seed=3)
        doubts = [WORLD.epistemic(WORLD.exact(t.examples[:shots], t.examples[64:])).mean().item() for t in tasks]
        means.append(sum(doubts) / len(doubts))
    assert means == sorted(means, reverse=True)
    assert means[0] > 0.25
    assert means[-1] < 0.05


def test_answers_are_wrong_as_often_as_the_noise_says() -> None:
    where = {prompt: number for number, prompt in enumerate(WORLD.prompts)}
    wrong = 0
    for task in WORLD.tasks(100, seed=8):
        says = torch.tensor([where[e.prompt] for e in task.examples])
        right = (WORLD.labels[:, says] == torch.tensor([[1.0 - e.answer for e in task.examples]])).double().mean(-1)
        wrong += round((1 - right.max().item()) * len(task.examples))
    assert wrong / (100 * 96) == pytest.approx(0.1, abs=0.015)


def test_the_same_seed_gives_the_same_tasks() -> None:
    assert WORLD.tasks(3, seed=1) == WORLD.tasks(3, seed=1) != WORLD.tasks(3, seed=2)
    example = WORLD.tasks(1, seed=1)[0].examples[0]
    assert isinstance(example, Example)
    assert example.options == OPTIONS


def test_noise_must_be_a_chance_below_a_half() -> None:
    with pytest.raises(ValueError, match=r"between 0 and 0\.5"):
        World(0.5)
