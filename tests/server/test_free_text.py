from __future__ import annotations

import asyncio

import pytest
import torch

from server.clock import Clock, current_clock, start_clock, together
from server.free_text import semantics


def test_meanings_are_told_by_their_likeliest_wording_with_the_samples_that_mean_them() -> None:
    wordings = {(1,): "Paris", (2,): "the paris", (3,): "Rome", (4,): "PARIS!"}
    p = torch.tensor([[0.1, 0.3, 0.2, 0.05], [0.1, 0.1, 0.4, 0.05]])
    found = semantics(wordings, [0, 0, 1, 0], p.log().double(), [(2,), (3,), (2,), (4,), (3,)])
    assert [(m.answer, m.samples) for m in found.meanings] == [("the paris", 3), ("Rome", 2)]
    assert [m.probability for m in found.meanings] == pytest.approx([0.35, 0.3])
    assert found.unseen == pytest.approx(0.35)
    assert found.answer_probability == pytest.approx(0.35)  # the answer is the first wording
    assert found.consistency == pytest.approx(0.6)


def test_questions_asked_together_wait_as_long_as_the_one_that_waits_longest() -> None:
    async def wait(seconds: float) -> float:
        clock = current_clock()
        assert clock is not None
        clock.queued += seconds
        return seconds

    async def ask() -> tuple[list[float], Clock]:
        clock = start_clock()
        clock.queued = 1.0
        return await together(map(wait, (0.25, 2.0, 0.5))), clock

    answers, clock = asyncio.run(ask())
    assert answers == [0.25, 2.0, 0.5]
    assert clock.queued == 3.0


def test_a_question_that_fails_ends_those_asked_with_it() -> None:
    ended: list[str] = []

    async def fail() -> None:
        raise ValueError("no")

    async def wait() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.append("wait")
            raise

    async def ask() -> None:
        with pytest.raises(ValueError, match="no"):
            await together([wait(), fail()])
        await asyncio.sleep(0)

    asyncio.run(ask())
    assert ended == ["wait"]
