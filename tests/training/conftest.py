"""Small tasks that can be learned, and books that they can be made from."""

from __future__ import annotations

import json
import lzma
import random
from pathlib import Path

import pytest

from abmll.examples import Example
from abmll.layers import Attached, attach
from training.base_model import BaseModel, load_base
from training.tasks import Task

TARGETS = ("q_proj", "v_proj")
_RULES = [("film", "music"), ("alarm", "weather"), ("city", "band"), ("seven", "radio"), ("delight", "hours")]
_FILLERS = "the was a and i would see it again two that will not get back please set for tomorrow some by from".split()


def rule_task(number: int, items: int = 40) -> Task:
    """Which of two words stands in the text decides the label."""
    rng = random.Random(number)
    words = _RULES[number % len(_RULES)]
    examples: list[Example] = []
    for item in range(items):
        answer = item % 2
        text: list[str] = rng.sample(_FILLERS, 4)
        text.insert(rng.randrange(5), words[answer])
        examples.append(Example(" ".join(text), ("yes", "no"), answer))
    return Task(f"rule_{number}", f"family_{number}", "rule", tuple(examples), fixed_labels=True)


def write_tasks(folder: Path, tasks: list[Task]) -> Path:
    (folder / "tasks").mkdir(parents=True)
    entries: list[dict[str, str]] = []
    for task in tasks:
        lines = [json.dumps({"input": e.prompt, "options": e.options, "answer": e.answer}) for e in task.examples]
        (folder / "tasks" / f"{task.name}.jsonl").write_text("\n".join(lines) + "\n")
        entries.append(
            {
                "name": task.name,
                "family": task.family,
                "category": task.category,
                "file": f"tasks/{task.name}.jsonl",
                "source_repo": "someone/rules",
                "licence": "CC0",
            }
        )
    (folder / "manifest.json").write_text(json.dumps({"tasks": entries}))
    return folder


@pytest.fixture
def base(tiny_model_folder: Path) -> BaseModel:
    return load_base(str(tiny_model_folder))


@pytest.fixture
def attached(base: BaseModel) -> Attached:
    return attach(base.model, TARGETS)


# Made-up words, for a cloze leaves out the 150 most common.
_SYLLABLES = "bar den fol gim hap jor kel lum nod pir".split()
_NOUNS = [one + two + "er" for one in _SYLLABLES for two in _SYLLABLES]
_VERBS = [one + two + "ed" for one in _SYLLABLES for two in _SYLLABLES]
_MOODS = ["It was a delightful and splendid sight.", "It was a dreadful and miserable sight.", "Nobody spoke of it."]


def book(number: int, characters: int = 50_000) -> str:
    rng = random.Random(number)
    text = f"Title: Book {number}\n\n"
    while len(text) < characters:
        one, two = rng.sample(_NOUNS, 2)
        text += f"The {one} near the old {two} {rng.choice(_VERBS)} the stranger at noon. {rng.choice(_MOODS)} "
    return text


@pytest.fixture(scope="session")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("books")
    with lzma.open(folder / "one.txt.xz", "wt", encoding="utf-8") as stream:
        stream.write("\n<|book|>\n".join(book(number) for number in range(5)))
    return folder
