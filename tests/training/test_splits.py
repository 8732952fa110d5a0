from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from abmll.errors import AbmllError
from tests.training.conftest import rule_task
from training.splits import Split, read_split, split_families, write_split
from training.tasks import Task

TASKS: list[Task] = [
    replace(rule_task(0), name=f"t{family}{k}", family=f"f{family:02d}", category=f"c{family % 3}")
    for family in range(30)
    for k in range(3)
]


def test_a_family_is_never_divided_and_every_task_has_a_part() -> None:
    split = split_families(TASKS, 0)
    parts = {part: split.select(TASKS, part) for part in ("train", "validation", "test")}
    assert sorted(task.name for tasks in parts.values() for task in tasks) == sorted(task.name for task in TASKS)
    families = [{task.family for task in tasks} for tasks in parts.values()]
    assert [len(found) for found in families] == [18, 6, 6]
    assert not families[0] & families[1] | families[0] & families[2] | families[1] & families[2]


@pytest.mark.parametrize("seed", range(20))
def test_each_categorys_families_are_spread_over_the_parts(seed: int) -> None:
    split = split_families(TASKS, seed)
    for part in ("train", "validation", "test"):
        assert {task.category for task in split.select(TASKS, part)} == {"c0", "c1", "c2"}


def test_of_few_families_one_is_left_to_calibrate_on() -> None:
    for seed in range(60):
        parts = split_families(TASKS[:9], seed).families.values()
        assert "train" in parts
        assert "validation" in parts or list(parts).count("train") == 1
    assert "validation" not in split_families(TASKS[:9], 0, validation=0.0).families.values()


def test_the_seed_decides_not_the_order() -> None:
    assert split_families(TASKS, 3) == split_families(TASKS[::-1], 3)
    assert split_families(TASKS, 3).families != split_families(TASKS, 4).families


def test_pins_hold_and_count() -> None:
    split = split_families(TASKS, 0, pinned={f"f{n:02d}": "test" for n in range(6)})
    assert [name for name, part in split.families.items() if part == "test"] == [f"f{n:02d}" for n in range(6)]
    with pytest.raises(AbmllError, match="pinned family 'nobody'"):
        split_families(TASKS, 0, pinned={"nobody": "test"})


def test_the_last_family_that_is_free_is_trained_on() -> None:
    tasks = TASKS[:9]
    for seed in range(20):
        split = split_families(tasks, seed, pinned={"f00": "test", "f01": "test"})
        assert split.families["f02"] == "train"
        pinned = split_families(tasks, seed, pinned=dict.fromkeys(("f00", "f01", "f02"), "train"))
        assert set(pinned.families.values()) == {"train"}


def test_a_split_is_written_and_read(tmp_path: Path) -> None:
    split = split_families(TASKS, 0)
    write_split(split, tmp_path / "split.json")
    assert read_split(tmp_path / "split.json") == split
    for text in ("", "{}", '{"seed": 0, "families": {"a": "exam"}}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(AbmllError, match="not a split file"):
            read_split(tmp_path / "bad.json")


def test_a_family_that_the_split_does_not_know_is_refused() -> None:
    with pytest.raises(AbmllError, match="does not know the family 'family_0'"):
        Split(seed=0, families={}).select([rule_task(0)], "train")
