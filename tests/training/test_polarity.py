from __future__ import annotations

import random
from collections import Counter

import pytest

from abmll.errors import AbmllError
from tests.training.conftest import book
from training.polarity import Polarity, polarity_task


@pytest.fixture(scope="module")
def polarity() -> Polarity:
    return Polarity([book(number) for number in range(3)])


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("a splendid, delightful day", 1),
        ("a dull and tedious book, if clever: awful", 0),
        ("not good at all", 0),
        ("good but bad", 0),  # what follows a "but" weighs more
        ("it is good and it is bad", None),
        ("the house stood by the river", None),
    ],
)
def test_balance(polarity: Polarity, text: str, label: int | None) -> None:
    assert polarity.balance(text) == label


@pytest.mark.parametrize("label", [0, 1])
def test_drawn_passages_have_the_label_that_was_asked_for(polarity: Polarity, label: int) -> None:
    rng = random.Random(0)
    passages = [polarity.draw(rng, label) for _ in range(300)]
    found = Counter(polarity.balance(passage) for passage in passages)
    assert found[label] > 200
    assert found[1 - label] < 15  # negations before a swapped word, and words whose valences differ
    masked = [passage for passage in passages if "..." in passage]
    assert 10 < len(masked) < 60
    assert all(polarity.balance(passage) is None for passage in masked)


def test_books_without_opinions_are_told() -> None:
    dry = Polarity(["The stone lay on the table near the window. " * 1_000])
    with pytest.raises(AbmllError, match="praise or blame"):
        polarity_task(0, dry, random.Random(0), 20)
