"""Whether two answers to a question say the same, asked of the served model itself (bidirectional entailment)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

ENTAILS = ("yes", "no")


def entailment_prompt(question: str, first: str, second: str) -> str:
    """The question whether an answer says all that another says; its options are ``ENTAILS``."""
    return (
        f"Question: {question.strip()}\nOne answer: {first}\nAnother answer: {second}\n"
        "Does the one answer say all that the other says?"
    )


async def merge_meanings(
    texts: Sequence[str], meanings: Sequence[int], entails: Callable[[str, str], Awaitable[bool]]
) -> list[int]:
    """Joins meanings whose texts entail each other, both ways.

    Each meaning is compared with those before it, by the first text of each (Kuhn et al. 2023, arXiv 2302.09664,
    algorithm 1): at most as many questions as there are pairs of meanings, twice.

    Args:
        texts: Answers to one question.
        meanings: A number for each, as ``group_meanings`` gives them.
        entails: Whether the first text says all that the second says.

    Returns:
        For each text the number of its meaning, from 0, in the order of their first appearance.
    """
    first: dict[int, str] = {}
    for text, meaning in zip(texts, meanings, strict=True):
        first.setdefault(meaning, text)
    joined: dict[int, int] = {}
    kept: list[int] = []
    for meaning, text in first.items():
        for number, other in enumerate(kept):
            if await entails(first[other], text) and await entails(text, first[other]):
                joined[meaning] = number
                break
        else:
            joined[meaning] = len(kept)
            kept.append(meaning)
    return [joined[meaning] for meaning in meanings]
