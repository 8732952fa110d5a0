from __future__ import annotations

import random
from dataclasses import replace

import pytest

from abmll.errors import InvalidExamples
from abmll.examples import Example
from tests.training.conftest import rule_task
from training.episodes import EpisodeConfig, draw_support, keep_items, relabelled, sample_episode
from training.tasks import Task

FIVE = Task(
    "five", "five", "c",
    tuple(Example(f"text {n}", ("a", "b", "c", "d", "e"), n % 5) for n in range(60)), fixed_labels=True,
)  # fmt: skip
TRUTH = {example.prompt: example.options[example.answer] for example in FIVE.examples}


def episodes(count: int, **settings: float) -> list[tuple[tuple[Example, ...], tuple[Example, ...]]]:
    config = EpisodeConfig().model_copy(update=settings)
    drawn = [sample_episode([FIVE], config, random.Random(seed)) for seed in range(count)]
    return [(episode.support, episode.query) for episode in drawn]


def test_support_and_query_share_no_item() -> None:
    for support, query in episodes(100):
        assert not {e.prompt for e in support} & {e.prompt for e in query}
        assert query
        assert len(support) <= 16


def test_without_variation_labels_are_the_true_ones() -> None:
    for support, query in episodes(30, subset=0.0, permute=0.0):
        for example in (*support, *query):
            assert example.options[example.answer] == TRUTH[example.prompt]


def test_a_permutation_is_one_to_one_and_holds_in_support_and_query() -> None:
    changed = 0
    for support, query in episodes(100, subset=0.5, permute=1.0):
        mapping: dict[str, set[str]] = {}
        for example in (*support, *query):
            mapping.setdefault(TRUTH[example.prompt], set()).add(example.options[example.answer])
        assert all(len(texts) == 1 for texts in mapping.values())
        assert len(set().union(*mapping.values())) == len(mapping)
        changed += any(texts != {label} for label, texts in mapping.items())
    assert changed > 60


def test_a_subset_keeps_the_items_of_its_labels_alone() -> None:
    sizes: set[int] = set()
    for support, query in episodes(100, subset=1.0, permute=0.0):
        items = (*support, *query)
        options = set(items[0].options)
        sizes.add(len(options))
        assert all(set(e.options) == options and TRUTH[e.prompt] in options for e in items)
    assert sizes == {2, 3, 4, 5}


def test_items_with_options_of_their_own_are_left_as_they_are() -> None:
    own = replace(FIVE, fixed_labels=False)
    episode = sample_episode([own], EpisodeConfig(permute=1.0, subset=1.0), random.Random(0))
    assert all(e in FIVE.examples for e in (*episode.support, *episode.query))


def test_families_weigh_by_the_root_of_their_tasks() -> None:
    big = [replace(rule_task(0), name=f"big{n}", family="big") for n in range(16)]
    config = EpisodeConfig(shots=(1,))
    names = [sample_episode([*big, FIVE], config, random.Random(seed)).task for seed in range(500)]
    assert 0.12 < names.count("five") / 500 < 0.28  # 1 / (1 + 4)


def test_what_cannot_be_drawn() -> None:
    with pytest.raises(InvalidExamples, match="too few for 60 shots"):
        draw_support(FIVE, 60, random.Random(0))
    assert keep_items([FIVE], lambda _, example: example.answer == 0)[0].examples[1].prompt == "text 5"
    assert keep_items([FIVE], lambda _, example: example.prompt == "text 5") == []


def test_relabelled_tasks_are_new_tasks_of_each_family() -> None:
    tasks = [replace(FIVE, name=f"five_{n}") for n in range(4)] + [rule_task(0), rule_task(1, items=20)]
    made = relabelled(tasks, per_family=2, items=40, max_chars=100, seed=0)
    assert [task.family for task in made] == ["family_0", "five", "five"]  # rule_1 has too few items
    for task in made:
        original = next(t for t in tasks if t.name == task.name)
        true = {example.prompt: example.options[example.answer] for example in original.examples}
        pairs = {(true[example.prompt], example.options[example.answer]) for example in task.examples}
        assert len(pairs) == len({one for one, _ in pairs}) == len({other for _, other in pairs})
    assert any(
        example.options[example.answer] != TRUTH[example.prompt] for task in made[1:] for example in task.examples
    )
    assert relabelled(tasks, 2, 40, 100, seed=0) == made
    assert relabelled(tasks, 2, 40, 3, seed=0) == []
