"""What counts as a beginning that was asked before."""

from __future__ import annotations

from server.shared_beginnings import SharedBeginnings

PROMPT = tuple(range(200))


def test_whole_steps_of_an_earlier_prompt_are_shared_within_a_scope() -> None:
    seen = SharedBeginnings()
    assert seen.shared("a", PROMPT) == 0
    assert seen.shared("a", (*PROMPT[:150], 7, 7, 7)) == 128
    assert seen.shared("a", PROMPT) == 192
    assert seen.shared("b", PROMPT) == 0
    assert seen.shared("a", (*PROMPT[:63], 7, 7, 7)) == 0  # too short to be worth it
    assert seen.shared("a", (7, *PROMPT)) == 0
    assert seen.shared("a", PROMPT[:128]) == 96  # the last token must be read


def test_the_oldest_are_forgotten() -> None:
    seen = SharedBeginnings(limit=6)
    seen.shared("a", PROMPT)
    seen.shared("a", PROMPT[::-1])
    assert seen.shared("a", PROMPT) == 0
