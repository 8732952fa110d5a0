from __future__ import annotations

import lzma
from pathlib import Path

import pytest

from abmll.errors import AbmllError
from abmll.examples import Example
from training.pseudo_tasks import kind_tasks, pseudo_tasks
from training.tasks import Task


def test_tasks_are_a_function_of_books_and_seed(books: Path) -> None:
    first = pseudo_tasks(books, 3, 0, items=20)
    assert first == pseudo_tasks(books, 3, 0, items=20)
    assert first != pseudo_tasks(books, 3, 1, items=20)
    assert [task.family for task in first] == ["cloze"] * 3 + ["passages"] * 3 + ["polarity"] * 3 + ["themes"] * 3
    for task in first:
        assert len({example.answer for example in task.examples}) > 1
        assert all(len(set(example.options)) == len(example.options) for example in task.examples)


def test_the_missing_word_is_missing(books: Path) -> None:
    for task in pseudo_tasks(books, 3, 0, items=20)[:3]:
        for example in task.examples:
            assert "..." in example.prompt
            assert example.options[example.answer] not in example.prompt.lower().split()


def test_a_theme_is_there_in_some_sentences_and_cut_out_of_others(books: Path) -> None:
    for task in pseudo_tasks(books, 3, 0, items=20)[9:]:
        assert 2 <= len(task.examples[0].options) <= 10
        seen = [example.options[example.answer] in example.prompt.lower() for example in task.examples]
        assert any(seen)
        assert not all(seen)
        assert not any("..." in example.prompt or "  " in example.prompt for example in task.examples)


def test_as_many_items_praise_as_blame(books: Path) -> None:
    for task in pseudo_tasks(books, 3, 0, items=20)[6:9]:
        answers = [example.answer for example in task.examples]
        assert answers.count(0) == answers.count(1) == 40


def test_books_that_no_task_can_be_made_from_are_told(tmp_path: Path) -> None:
    with pytest.raises(AbmllError, match=r"no \*.txt.xz shard"):
        pseudo_tasks(tmp_path, 1, 0)
    with lzma.open(tmp_path / "a.txt.xz", "wt") as stream:
        stream.write("short")
    with pytest.raises(AbmllError, match="books"):
        pseudo_tasks(tmp_path, 1, 0)
    with lzma.open(tmp_path / "a.txt.xz", "wt") as stream:
        stream.write("\n<|book|>\n".join("zzz zzz zzz zzz. " * 2_000 for _ in range(4)))
    with pytest.raises(AbmllError, match="books"):
        pseudo_tasks(tmp_path, 1, 0)


def subject(name: str, family: str, prompt: str, category: str = "qa") -> Task:
    examples = tuple(Example(prompt.format(n), ("yes", "no"), n % 2) for n in range(20))
    return Task(f"{family}_{name}", family, category, examples, fixed_labels=True)


def test_an_item_is_asked_for_the_task_of_its_family() -> None:
    family = [subject(name, "exam", f"{name} question {{}}") for name in ("old_history", "physics", "music")]
    others = [subject("alone", "exam", "other {}", category="topic"), subject("one", "pair", "a {}")]
    made = kind_tasks([*family, *others], 6, 0, items=30)
    assert made == kind_tasks([*family, *others], 6, 0, items=30)
    assert {task.family for task in made} == {"exam_kinds"}
    assert len({task.name for task in made}) == 6
    assert {len(task.examples[0].options) for task in made} == {2, 3}
    for task in made:
        assert set(task.examples[0].options) <= {"old history", "physics", "music"}
        for example in task.examples:
            assert example.prompt.replace("_", " ").startswith(example.options[example.answer])


def test_tasks_that_nothing_tells_apart_make_no_kinds() -> None:
    same = [subject(name, "exam", "which sentence is right?") for name in ("a", "b", "c")]
    assert kind_tasks(same, 3, 0) == []
    assert kind_tasks([], 3, 0) == []
