"""A streamed answer's parts are the answer, whatever its tokens are cut into."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Coroutine
from typing import Any

import pytest
from fastapi.sse import EventSourceResponse
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter

from abmll.errors import EngineFailure, TaskNotFound
from clients.async_http import AsyncClient
from clients.errors import NotFound
from clients.http import Client
from clients.replies import Answer, StreamedToken
from server.engine import Tell
from server.schemas import GenerateReply
from server.streaming import TokenEvents, WholeText, stream
from tests.server.conftest import Server
from tests.server.test_http import without_times


class Bytes:
    """A tokenizer whose tokens are bytes: every character but ASCII's takes several."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        return bytes(token_ids).decode(errors="replace")


@given(
    st.text(st.sampled_from("ab\n.é…🙂"), max_size=20), st.lists(st.text("ab.\n", min_size=1, max_size=3), max_size=3)
)
def test_parts_are_whole_characters_and_end_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    parts, whole = [], WholeText(Bytes(), stop)
    for token in text.encode():
        parts.append(whole.add(token))
        assert "\N{REPLACEMENT CHARACTER}" not in parts[-1]
        said = "".join(parts)
        assert not any(string in said for string in stop)
    parts.append(whole.rest())
    ends = [place for string in stop if (place := text.find(string)) >= 0]
    # Of stop strings that overlap, the one that is whole first ends the text.
    assert "".join(parts) == text[: min(ends, default=len(text))] or len(ends) > 1
    assert text.startswith("".join(parts))


def test_a_part_waits_only_while_a_stop_string_may_begin() -> None:
    whole = WholeText(Bytes(), ["\n\n"])
    assert [whole.add(token) for token in b"a\nb\n\nc"] == ["a", "", "\nb", "", "", ""]
    assert whole.rest() == ""


async def events(response: EventSourceResponse) -> list[tuple[str, Any]]:
    text = b"".join([part async for part in response.body_iterator]).decode()  # pyright: ignore[reportArgumentType]
    told = [dict(line.split(": ", 1) for line in event.splitlines()) for event in text.split("\n\n") if event]
    return [(event["event"], json.loads(event["data"])) for event in told]


async def as_is(first: Coroutine[Any, Any, Any]) -> Any:
    return await first


def test_an_error_before_the_first_token_is_raised_and_a_later_one_told() -> None:
    async def fails(tell: Tell) -> GenerateReply:
        raise TaskNotFound("there is no task", field="task")

    async def breaks(tell: Tell) -> GenerateReply:
        for token in "é\u2028".encode():  # a line's end within JSON must not part the event
            tell(token, -0.5)
        await asyncio.sleep(0)
        raise EngineFailure("it died")

    async def ask() -> list[tuple[str, Any]]:
        with pytest.raises(TaskNotFound):
            await stream(fails, WholeText(Bytes(), []), TokenEvents(), as_is, print, print)
        return await events(await stream(breaks, WholeText(Bytes(), []), TokenEvents(), as_is, print, broken.inc))

    registry = CollectorRegistry()
    broken = Counter("broken", "Streams.", registry=registry)
    told = asyncio.run(ask())
    assert registry.get_sample_value("broken_total") == 1  # not the one that failed before it had begun
    assert [kind for kind, _ in told] == ["token"] * 5 + ["error"]
    assert [data["text"] for _, data in told[:-1]] == ["", "é", "", "", "\u2028"]
    assert told[0][1]["probability"] == pytest.approx(0.6065, abs=1e-4)
    assert told[-1][1]["error"] == {"type": "EngineFailure", "message": "it died", "field": None}


def test_a_reader_who_goes_away_ends_the_work() -> None:
    ended: list[bool] = []

    async def goes_on(tell: Tell) -> GenerateReply:
        try:
            tell(65, -0.5)
            await asyncio.sleep(60)
            raise AssertionError("it went on")
        finally:
            ended.append(True)

    async def ask() -> None:
        response = await stream(goes_on, WholeText(Bytes(), []), TokenEvents(), as_is, print, print)
        iterator: Any = response.body_iterator
        assert b'"text": "A"' in await anext(iterator)
        await iterator.aclose()

    asyncio.run(ask())
    assert ended == [True]


REQUEST: dict[str, Any] = {"prompt": "please set an alarm", "max_tokens": 8}


def test_a_streamed_answer_is_the_one_that_comes_whole(server: Server) -> None:
    whole = server.http.post("/generate", json=REQUEST | {"tokens": True}).json()
    with Client(server.url) as client:
        *tokens, answer = client.stream(**REQUEST, tokens=True)
    assert isinstance(answer, Answer)
    assert without_times(answer.model_dump()) == without_times(Answer.model_validate(whole).model_dump())
    parts = [token for token in tokens if isinstance(token, StreamedToken)]
    assert "".join(part.text for part in parts).strip() == answer.answer
    assert len([part for part in parts if part.probability is not None]) == 8
    assert all(part.probability is None or 0 < part.probability <= 1 for part in parts)

    async def ask() -> list[StreamedToken | Answer]:
        async with AsyncClient(server.url) as client:
            return [item async for item in client.stream(**REQUEST, tokens=True)]

    again = asyncio.run(ask())
    assert [t.model_dump() for t in again[:-1]] == [t.model_dump() for t in tokens]


def test_the_stream_says_what_went_wrong_with_a_status_and_ends_before_a_stop_string(server: Server) -> None:
    with Client(server.url) as client:
        with pytest.raises(NotFound, match="there is no task"):
            list(client.stream("p", task="nowhere"))
        told = "".join(item.text for item in client.stream(**REQUEST) if isinstance(item, StreamedToken))
        stop = told[len(told) // 2 :][:3]
        *parts, answer = client.stream(**REQUEST, stop=[stop])
    said = "".join(part.text for part in parts if isinstance(part, StreamedToken))
    assert said == told[: told.index(stop)]
    assert isinstance(answer, Answer)
    assert answer.answer == said.strip()
    options = REQUEST | {"options": ["a", "b"], "stream": True}
    reply = server.http.post("/generate", json=options)
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.text.startswith("event: answer\n")


LONG: dict[str, Any] = REQUEST | {"max_tokens": 200, "stream": True}


def test_a_deadline_within_the_stream_is_told(server: Server) -> None:
    reply = server.http.post("/generate", json=LONG | {"timeout": 0.15})
    if reply.status_code == 200:  # a token came in time
        assert reply.text.startswith("event: token")
        assert '"type": "DeadlineExceeded"' in reply.text.split("event: error")[1]
    else:
        assert reply.status_code == 504


def test_a_client_that_goes_away_frees_the_engine(server: Server) -> None:
    def seconds() -> float:
        begun = time.monotonic()
        assert server.http.post("/generate", json=LONG | {"seed": 1, "stream": False}).status_code == 200
        return time.monotonic() - begun

    def among_those_left() -> float:
        begun = time.monotonic()
        for _ in range(12):
            with server.http.stream("POST", "/generate", json=LONG) as reply:
                next(reply.iter_text())
        return time.monotonic() - begun + seconds()

    alone = min(seconds() for _ in range(3))
    # One after another to their ends, twelve texts would take twelve times as long, whatever else the machine does.
    assert any(among_those_left() < 7 * alone for _ in range(3))


def test_tokens_come_one_by_one(server: Server) -> None:
    with server.http.stream("POST", "/generate", json=REQUEST | {"max_tokens": 100, "stream": True}) as reply:
        chunks = list(reply.iter_text())
    assert len(chunks) > 20
