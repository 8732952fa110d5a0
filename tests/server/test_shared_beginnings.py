"""What counts as a beginning that others had too."""

from __future__ import annotations

from server.shared_beginnings import SharedBeginnings

PROMPT = tuple(range(200))


def test_a_beginning_is_shared_where_prompts_part() -> None:
    seen = SharedBeginnings()
    assert seen.shared("a", PROMPT) == 0
    assert seen.shared("a", (*PROMPT[:150], 7, 7, 7)) == 128
    assert seen.shared("a", PROMPT) == 128
    assert seen.shared("b", PROMPT) == 0
    assert seen.shared("a", (*PROMPT[:63], 7, 7, 7)) == 0  # too short to be worth it
    assert seen.shared("a", (7, *PROMPT)) == 0
    assert seen.shared("a", PROMPT[:129]) == 128
    assert seen.shared("a", PROMPT[:128]) == 0  # its last token must be read


def test_a_prompt_that_is_asked_again_is_no_shared_beginning() -> None:
    seen = SharedBeginnings()
    assert [seen.shared("a", PROMPT) for _ in range(3)] == [0, 0, 0]


def test_the_oldest_are_forgotten() -> None:
    seen = SharedBeginnings(limit=6)
    seen.shared("a", PROMPT)
    seen.shared("a", PROMPT[::-1])
    assert seen.shared("a", (*PROMPT[:150], 7, 7, 7)) == 0
