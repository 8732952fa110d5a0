from __future__ import annotations

import math

import pytest
import torch

from abmll.meanings import group_meanings, meaning_predictive, normalized


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("  The Eiffel  Tower. ", "eiffel tower"),
        ("It's A.", "its"),
        ("an", "an"),
        ("A.", "a"),
        ("“Paris”", "paris"),
        ("-5", "-5"),
        ("5.", "5"),
        ("about 3.5 %", "about 3.5"),
        ("...", "..."),
        ("", ""),
        ("STRASSE", "strasse"),
        ("Straße", "strasse"),
        ("C++", "c++"),
        ("C#", "c"),
        ("x < y.", "x < y"),
        ("cafe\u0301", "café"),
        ("की", "की"),
        ("दिन।", "दिन"),
        ("क\u094d\u200dष", "क\u094d\u200dष"),
    ],
)
def test_texts_without_what_does_not_change_their_meaning(text: str, plain: str) -> None:
    assert normalized(text) == plain


def test_meanings_are_numbered_as_they_appear() -> None:
    assert group_meanings(["Paris", "the paris!", "Rome", "paris", ""]) == [0, 0, 1, 0, 2]


def test_the_predictive_over_meanings_is_that_of_their_summed_wordings_and_the_rest() -> None:
    p = torch.tensor([[0.2, 0.1, 0.1], [0.05, 0.05, 0.3]])  # draws, wordings; the first two mean the same
    result = meaning_predictive(p.log(), [0, 0, 1])
    torch.testing.assert_close(result.probabilities, torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64))

    def entropy(*q: float) -> float:
        return -sum(x * math.log(x) for x in q)

    within = (entropy(0.3, 0.1, 0.6) + entropy(0.1, 0.3, 0.6)) / 2
    assert result.total.item() == pytest.approx(entropy(0.2, 0.2, 0.6))
    assert result.aleatoric.item() == pytest.approx(within)
    assert result.epistemic.item() == pytest.approx(entropy(0.2, 0.2, 0.6) - within)


def test_texts_that_are_all_there_is_leave_no_rest() -> None:
    p = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1000001]])  # rounding may pass 1
    assert meaning_predictive(p.log(), [0, 1, 0]).probabilities.tolist() == pytest.approx([0.75, 0.25, 0.0], abs=1e-6)
    assert meaning_predictive(p.log(), [0, 0, 0]).total.item() == pytest.approx(0.0, abs=1e-5)
