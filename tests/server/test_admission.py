"""The queue before the engine: bounded, and fair between tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from abmll.errors import Overloaded
from server.admission import Admission


class Crowd:
    """Questions that hold their place until they are told to go."""

    def __init__(self, places: int, limit: int) -> None:
        self.admission = Admission(places, limit)
        self.order: list[str] = []
        self.go: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def ask(self, task: str, name: str) -> None:
        self.go[name] = asyncio.Event()
        self.tasks[name] = asyncio.create_task(self._hold(task, name))
        await settle()

    async def _hold(self, task: str, name: str) -> None:
        async with self.admission.admitted(task):
            self.order.append(name)
            await self.go[name].wait()

    async def finish(self, name: str) -> None:
        self.go[name].set()
        await settle()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(test())


def test_a_quiet_task_goes_before_a_busy_tasks_backlog() -> None:
    async def test() -> None:
        crowd = Crowd(places=2, limit=100)
        for number in range(10):
            await crowd.ask("busy", f"busy{number}")
        await crowd.ask("quiet", "quiet0")
        await crowd.ask("calm", "calm0")
        assert crowd.order == ["busy0", "busy1"]
        await crowd.finish("busy0")
        await crowd.finish("busy1")
        assert crowd.order[2:] == ["quiet0", "calm0"]
        await crowd.finish("quiet0")
        assert crowd.order[4:] == ["busy2"]

    run(test)


def test_a_place_goes_round_among_equals() -> None:
    async def test() -> None:
        crowd = Crowd(places=1, limit=100)
        await crowd.ask("a", "first")
        for name in ("b0", "b1", "c0", "c1"):
            await crowd.ask(name[0], name)
        for name in ("first", "b0", "c0", "b1"):
            await crowd.finish(name)
        assert crowd.order == ["first", "b0", "c0", "b1", "c1"]

    run(test)


def test_past_the_limit_the_busiest_task_is_refused() -> None:
    async def test() -> None:
        crowd = Crowd(places=1, limit=3)
        for number in range(4):
            await crowd.ask("busy", f"busy{number}")
        assert (crowd.admission.inside, crowd.admission.waiting) == (1, 3)
        await crowd.ask("busy", "busy4")
        with pytest.raises(Overloaded) as refusal:
            crowd.tasks["busy4"].result()
        assert refusal.value.retry_after >= 1
        await crowd.ask("quiet", "quiet0")
        with pytest.raises(Overloaded):
            crowd.tasks["busy3"].result()  # gave its place in the queue to the quiet task
        assert crowd.admission.waiting == 3
        assert crowd.admission.refused == 2
        await crowd.finish("busy0")
        assert crowd.order == ["busy0", "quiet0"]

    run(test)


def test_nothing_may_wait_where_the_limit_is_zero() -> None:
    async def test() -> None:
        crowd = Crowd(places=1, limit=0)
        await crowd.ask("a", "a0")
        await crowd.ask("b", "b0")
        with pytest.raises(Overloaded):
            crowd.tasks["b0"].result()

    run(test)


@pytest.mark.parametrize("moment", ["waiting", "as its turn comes"])
def test_a_client_that_goes_away_leaves_nothing_behind(moment: str) -> None:
    async def test() -> None:
        crowd = Crowd(places=1, limit=10)
        await crowd.ask("a", "a0")
        await crowd.ask("a", "a1")
        await crowd.ask("a", "a2")
        if moment == "waiting":
            crowd.tasks["a1"].cancel()
            await settle()
            assert crowd.admission.waiting == 1
            await crowd.finish("a0")
        else:
            crowd.tasks["a0"].cancel()
            await asyncio.sleep(0)  # a0 has given its place to a1, which does not know yet
            crowd.tasks["a1"].cancel()
            await settle()
        assert crowd.order == ["a0", "a2"]
        await crowd.finish("a2")
        assert (crowd.admission.inside, crowd.admission.waiting) == (0, 0)
        await crowd.ask("a", "a3")
        assert crowd.order[-1] == "a3"

    run(test)
