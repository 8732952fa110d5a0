from __future__ import annotations

import asyncio
import inspect
import json
import math
import socket
import threading
import time
from typing import Any

import pytest

from clients import connection, replies
from clients.async_http import AsyncClient
from clients.errors import (
    ClientError,
    InvalidReply,
    JobCancelled,
    JobFailed,
    JobTimeout,
    NotFound,
    ReplyTimeout,
    ServerUnavailable,
    ServerUnreachable,
)
from clients.http import Client
from tests.clients.conftest import ANSWER, Keyed, Scripted, job


def _body(content: object) -> bytes:
    return json.dumps(content).encode()


def _public(kind: type) -> dict[str, inspect.Signature]:
    return {name: inspect.signature(value) for name, value in vars(kind).items() if not name.startswith("_")}


def test_both_clients_have_the_same_methods_with_the_same_parameters():
    waiting, asynchronous = _public(Client), _public(AsyncClient)
    assert waiting.keys() == asynchronous.keys()
    for name, signature in waiting.items():
        assert signature.parameters == asynchronous[name].parameters, name


def test_an_answer_travels_through_both_clients(scripted: Scripted):
    scripted.reply(200, _body(ANSWER))
    with Client(scripted.url) as client:
        first = client.generate("p", options=["good", "bad"])

    async def ask():
        async with AsyncClient(scripted.url) as client:
            return await client.generate("p", options=["good", "bad"])

    assert asyncio.run(ask()) == first
    assert first.probabilities == [0.9, 0.1]
    assert scripted.asked[0] == scripted.asked[1]


def test_the_address_comes_from_the_environment(scripted: Scripted, monkeypatch: pytest.MonkeyPatch):
    scripted.reply(200, b"[]")
    monkeypatch.setenv("ABMLL_URL", scripted.url + "/")
    with Client() as client:
        assert client.tasks() == []
    assert scripted.asked == [("GET", "/tasks", b"")]


def test_a_name_with_a_slash_reaches_the_server_in_one_segment(scripted: Scripted):
    scripted.reply(404, _body({"error": {"type": "TaskNotFound", "message": "there is no task", "field": "task"}}))
    with Client(scripted.url) as client, pytest.raises(NotFound, match="there is no task"):
        client.task("a/b")
    assert scripted.asked[0][:2] == ("GET", "/tasks/a%2Fb")


def test_an_absent_server_is_unreachable_neither_healthy_nor_ready(free_url: str):
    with Client(free_url) as client:
        assert not client.healthy()
        assert not client.ready()
        with pytest.raises(ServerUnreachable, match=free_url):
            client.generate("p")


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://", "http://host:port"])
def test_what_is_no_address_is_said_at_once(url: str):
    with pytest.raises(ServerUnreachable, match="give one such as"):
        Client(url)


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan"), None, "70", True])
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_time_that_is_none_is_said_at_once(kind: type[Client] | type[AsyncClient], timeout: Any):
    with pytest.raises(ClientError, match=r"timeout is .+; give seconds above 0"):
        kind("http://127.0.0.1:1", timeout=timeout)


@pytest.mark.parametrize("timeout", [math.inf, 1e12])
def test_a_reply_may_take_as_long_as_it_takes(scripted: Scripted, timeout: float):
    scripted.reply(200, _body(job("done")))
    with Client(scripted.url, timeout=timeout) as client:
        assert client.wait("j1", timeout=timeout).ended


def test_another_server_is_neither_healthy_nor_ready(scripted: Scripted):
    async def told():
        async with AsyncClient(scripted.url) as client:
            return await client.healthy(), await client.ready()

    for body in (b"<html>It works!</html>", b'{"up": true}', b"", b"[]"):
        scripted.replies.clear()
        scripted.reply(200, body)
        with Client(scripted.url) as client:
            assert (client.healthy(), client.ready()) == asyncio.run(told()) == (False, False)


def _streamed(url: str) -> tuple[list[replies.StreamedToken | replies.Answer], ...]:
    async def collect():
        async with AsyncClient(url) as client:
            return [item async for item in client.stream("q")]

    with Client(url) as client:
        return list(client.stream("q")), asyncio.run(collect())


def test_a_proxys_word_in_another_encoding_is_an_api_error(scripted: Scripted):
    scripted.reply(502, "<html>passerelle indisponible, réessayez</html>".encode("latin-1"))
    with Client(scripted.url) as client:
        for call in (lambda: list(client.stream("q")), lambda: client.generate("q")):
            with pytest.raises(ServerUnavailable, match="the server replied 502: <html>passerelle"):
                call()

    async def collect():
        async with AsyncClient(scripted.url) as client:
            return [item async for item in client.stream("q")]

    with pytest.raises(ServerUnavailable, match="the server replied 502"):
        asyncio.run(collect())


def test_an_event_of_a_newer_server_is_skipped_and_a_malformed_one_is_not(scripted: Scripted):
    events = b'event: token\ndata: {"text": "a", "probability": 0.5}\n\nevent: progress\ndata: {"at": 1}\n\n'
    answer = b"event: answer\ndata: " + _body(ANSWER) + b"\n\nevent: usage\ndata: ?\n\n"
    scripted.reply(200, events + answer, Content_Type="text/event-stream")
    for items in _streamed(scripted.url):
        assert [type(item) for item in items] == [replies.StreamedToken, replies.Answer]
    scripted.replies.clear()
    scripted.reply(200, b"event: token\ndata: {}\n\n" + answer, Content_Type="text/event-stream")
    with pytest.raises(InvalidReply, match="'token' is malformed"):
        _streamed(scripted.url)


def test_a_starting_server_is_healthy_but_not_ready(scripted: Scripted):
    scripted.reply(200, b'{"status": "ok"}')
    scripted.reply(503, _body({"error": {"type": "EngineFailure", "message": "starting", "field": None}}))
    with Client(scripted.url) as client:
        assert client.healthy()
        assert not client.ready()


def test_a_strange_server_gives_an_invalid_reply(scripted: Scripted):
    scripted.reply(200, b"<html>hello</html>")
    with Client(scripted.url) as client, pytest.raises(InvalidReply, match="is this an abmll server"):
        client.tasks()


def test_a_job_is_followed_to_its_end(scripted: Scripted):
    posterior = {"id": "5f", "version": 1, "task": "films"}
    for reply in (job("queued"), job("running", 0.5), job("done", 1.0, posterior=posterior)):
        scripted.reply(200, _body(reply))
    with Client(scripted.url) as client:
        done = client.wait("j1", poll=0.01)
    assert done.posterior is not None
    assert done.posterior.version == 1
    assert [path for _, path, _ in scripted.asked] == ["/adapt/j1"] * 3


@pytest.mark.parametrize(
    ("status", "kind", "words"), [("failed", JobFailed, "out of memory"), ("cancelled", JobCancelled, "was cancelled")]
)
def test_a_job_without_a_posterior_raises_in_both_clients(
    scripted: Scripted, status: str, kind: type[Exception], words: str
):
    scripted.reply(200, _body(job(status, error="out of memory")))
    with Client(scripted.url) as client, pytest.raises(kind, match=words):
        client.wait("j1")

    async def wait():
        async with AsyncClient(scripted.url) as client:
            await client.wait("j1")

    with pytest.raises(kind, match=words):
        asyncio.run(wait())


def test_waiting_ends_and_leaves_the_job_running(scripted: Scripted):
    scripted.reply(200, _body(job("running", 0.1)))
    with Client(scripted.url) as client, pytest.raises(JobTimeout, match="runs on") as caught:
        client.wait("j1", timeout=0.05, poll=0.02)
    assert caught.value.job.status == "running"
    assert all(method == "GET" for method, _, _ in scripted.asked)


def _waiting(url: str, **settings: Any) -> list[float]:
    """The seconds after which each client gave a job up."""
    running = replies.Job.model_validate(job("running"))

    async def wait():
        async with AsyncClient(url) as client:
            await client.wait(running, **settings)

    times: list[float] = []
    with Client(url) as client:
        for call in (lambda: client.wait(running, **settings), lambda: asyncio.run(wait())):
            begun = time.monotonic()
            with pytest.raises(JobTimeout, match="runs on"):
                call()
            times.append(time.monotonic() - begun)
    return times


def test_waiting_is_no_longer_than_its_time_however_seldom_it_looks(scripted: Scripted):
    scripted.reply(200, _body(job("running")))
    assert max(_waiting(scripted.url, timeout=0.2, poll=30)) < 5


def test_waiting_is_no_longer_than_its_time_on_a_server_that_says_nothing():
    server = _Breaking(silent=True)
    try:
        times = _waiting(server.url, timeout=0.2, poll=0.1)
        assert min(times) > 1  # what a reply may take at least
        assert max(times) < 5
    finally:
        server.close()


def test_a_server_that_says_when_to_come_back_is_waited_for(scripted: Scripted, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(connection, "_PATIENCE_SECONDS", 0.9)
    busy = _body({"error": {"type": "RateLimited", "message": "too many", "field": None}})
    scripted.reply(200, _body(job("running"))).reply(429, busy, Retry_After="1").reply(200, _body(job("done", 1.0)))
    with Client(scripted.url) as client:
        assert client.wait("j1", poll=0.01).ended
    scripted.replies.clear()
    scripted.reply(429, busy, Retry_After="99999999999")
    assert max(_waiting(scripted.url, timeout=0.2, poll=0.01)) < 5


class _Breaking:
    """Accepts connections, reads a request, hangs up (or says nothing); counts them."""

    def __init__(self, silent: bool) -> None:
        self.count = 0
        self._silent = silent
        self._held: list[socket.socket] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            self._held.append(connection)
            if not connection.recv(65536):
                continue
            self.count += 1
            if not self._silent:
                connection.close()

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._thread.join(timeout=5)
        for held in self._held:
            held.close()


def test_a_broken_connection_is_tried_again_for_a_get_and_never_for_a_post():
    server = _Breaking(silent=False)
    try:
        with Client(server.url) as client:
            with pytest.raises(ServerUnreachable):
                client.tasks()
            assert server.count == 3
            with pytest.raises(ServerUnreachable):
                client.generate("p")
            assert server.count == 4
    finally:
        server.close()


def test_a_silent_server_is_given_up_after_the_timeout_without_a_second_try():
    server = _Breaking(silent=True)
    try:
        with Client(server.url, timeout=0.3) as client, pytest.raises(ReplyTimeout, match="in time"):
            client.tasks()
        assert server.count == 1
    finally:
        server.close()


def test_a_job_is_followed_through_passing_trouble(scripted: Scripted, monkeypatch: pytest.MonkeyPatch):
    busy = _body({"error": {"type": "Overloaded", "message": "busy", "field": None}})
    done = job("done", 1.0, posterior={"id": "5f", "version": 1, "task": "films"})
    scripted.reply(200, _body(job("running", 0.5))).reply(503, busy).reply(429, busy, Retry_After="1")
    scripted.reply(200, _body(done))
    begun = time.monotonic()
    with Client(scripted.url) as client:
        assert client.wait("j1", poll=0.01).status == "done"
    assert time.monotonic() - begun >= 1
    monkeypatch.setattr(connection, "_PATIENCE_SECONDS", 0.05)
    scripted.replies.clear()
    scripted.reply(200, _body(job("running", 0.5))).reply(503, busy)
    with Client(scripted.url) as client:
        with pytest.raises(ServerUnavailable, match="busy"):
            client.wait("j1", poll=0.01)
        with pytest.raises(JobTimeout, match="still running"):
            client.wait(replies.Job.model_validate(job("running")), timeout=0.02, poll=0.01)

    async def wait():
        async with AsyncClient(scripted.url) as client:
            await client.wait(replies.Job.model_validate(job("running")), poll=0.01)

    with pytest.raises(ServerUnavailable, match="busy"):
        asyncio.run(wait())


def test_a_question_with_a_time_of_its_own_may_take_that(scripted: Scripted):
    server = _Breaking(silent=True)
    try:
        begun = time.monotonic()
        with pytest.MonkeyPatch.context() as patch, Client(server.url, timeout=0.1) as client:
            patch.setattr(connection, "_MORE_SECONDS", 0.3)
            with pytest.raises(ReplyTimeout):
                client.generate("p", timeout=0.5)
        assert time.monotonic() - begun >= 0.8
    finally:
        server.close()
    scripted.reply(200, _body(ANSWER))
    with Client(scripted.url) as client:
        client.generate("p", timeout=2.5)
        client.score("p", "a")
    assert [json.loads(body)["timeout"] for _, _, body in scripted.asked] == [2.5, None]


def test_replies_have_the_fields_that_the_server_says(keyed: Keyed):
    schemas = keyed.server.http.get("/openapi.json").json()["components"]["schemas"]
    other = {
        "Answer": "GenerateReply", "Job": "JobReply", "TaskInfo": "TaskReply", "TaskVersion": "VersionReply",
        "Feedback": "FeedbackReply", "Recalibration": "RecalibrationReply", "Reliability": "ReliabilityReply",
        "Token": "TokenReply", "ReliabilityBin": "Bin",
    }  # fmt: skip
    kinds = [kind for kind in vars(replies).values() if isinstance(kind, type) and issubclass(kind, replies.Reply)]
    told = {kind.__name__: set(kind.model_fields) for kind in kinds if kind is not replies.Reply}
    # Of a stream, whose events are not in OpenAPI's page.
    assert told.pop("StreamedToken") == {"text", "probability"}
    assert told == {name: set(schemas[other.get(name, name)]["properties"]) for name in told}


def test_the_newest_jobs_are_listed(scripted: Scripted):
    scripted.reply(200, _body([job("running", 0.5), job("done", 1.0)]))
    with Client(scripted.url) as client:
        assert [found.status for found in client.jobs()] == ["running", "done"]
    assert scripted.asked == [("GET", "/adapt", b"")]
