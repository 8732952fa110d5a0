"""Meanings that entail each other are one."""

from __future__ import annotations

import asyncio

from abmll.entailment import entailment_prompt, merge_meanings
from abmll.meanings import group_meanings

TEXTS = ["Paris", "It is Paris.", "the city of Paris", "Rome", "paris", "a city"]
SAYS = {"Paris": {"paris", "city"}, "It is Paris.": {"paris", "city"}, "the city of Paris": {"paris", "city"},
        "Rome": {"rome", "city"}, "a city": {"city"}}  # fmt: skip


def test_answers_that_entail_each_other_both_ways_are_joined() -> None:
    asked: list[tuple[str, str]] = []

    async def entails(first: str, second: str) -> bool:
        asked.append((first, second))
        return SAYS[first] >= SAYS[second]

    groups = group_meanings(TEXTS)
    assert groups == [0, 1, 2, 3, 0, 4]
    assert asyncio.run(merge_meanings(TEXTS, groups, entails)) == [0, 0, 0, 1, 0, 2]
    assert ("Paris", "paris") not in asked  # equal already
    assert ("It is Paris.", "Rome") not in asked  # Paris speaks for it


def test_nothing_is_asked_of_one_meaning() -> None:
    async def entails(first: str, second: str) -> bool:
        raise AssertionError("asked")

    assert asyncio.run(merge_meanings(["a b", "A b!"], [0, 0], entails)) == [0, 0]


def test_the_prompt_holds_question_and_both_answers_in_their_order() -> None:
    text = entailment_prompt(" Which city? ", "Paris", "a city")
    assert text.index("Which city?") < text.index("Paris") < text.index("a city")
