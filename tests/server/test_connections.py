from __future__ import annotations

import asyncio
import contextlib
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from server import bodies, connections
from server.bodies import BodyLimit
from server.connections import ImpatientProtocol
from server.errors import install
from server.keys import Keys
from tests.server.conftest import Server


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The port of an app that waits a second and a half for what it usually waits longer for."""
    monkeypatch.setattr(connections, "HEAD_SECONDS", 1.5)
    monkeypatch.setattr(bodies, "BODY_SECONDS", 1.5)
    app = FastAPI()
    app.add_middleware(BodyLimit, limit=1000)
    install(app)

    @app.post("/slow")
    async def slow(body: dict[str, int]) -> dict[str, int]:  # pyright: ignore[reportUnusedFunction] -- a route
        await asyncio.sleep(2)
        return body

    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = uvicorn.Server(uvicorn.Config(app, http=ImpatientProtocol, log_config=None))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]})
        thread.start()
        yield taken.getsockname()[1]
        server.should_exit = True
        thread.join()


def said(port: int, *parts: bytes) -> bytes:
    """What the server says, until it closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        for part in parts:
            connection.sendall(part)
            time.sleep(0.1)
        return b"".join(iter(lambda: connection.recv(10_000), b""))


def test_who_says_nothing_or_half_is_not_waited_for(impatient: int) -> None:
    assert said(impatient) == b""
    assert said(impatient, b"GET /x HTTP/1.1\r\n", b"Host: a\r\n") == b""
    whole = b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n"
    again = said(impatient, whole, b"GET /x HT")  # on a connection that was used before
    assert again.count(b"HTTP/1.1 404") == 1
    head = b"POST /slow HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n"
    late = said(impatient, head, b'{"a"')
    assert b"HTTP/1.1 408" in late
    assert b"BodyTooSlow" in late


def test_a_reply_may_take_its_time_and_a_body_come_in_parts(impatient: int) -> None:
    def parts() -> Iterator[bytes]:
        for part in (b'{"a"', b": 1", b"}"):
            time.sleep(0.6)
            yield part

    headers = {"Content-Type": "application/json"}
    with httpx.Client(base_url=f"http://127.0.0.1:{impatient}", timeout=30) as client:
        for _ in range(2):
            assert client.post("/slow", content=parts(), headers=headers).json() == {"a": 1}


@pytest.mark.slow
def test_a_connection_is_kept_while_it_is_idle(start_server: Callable[..., Server]) -> None:
    server = start_server()
    with contextlib.closing(HTTPConnection("127.0.0.1", server.settings.port, timeout=30)) as connection:
        connection.connect()
        kept = connection.sock
        for pause in (0, connections.HEAD_SECONDS + 1):  # longer than uvicorn's 5 s, and than a head may take
            time.sleep(pause)
            connection.request("GET", "/healthz")
            with connection.getresponse() as response:
                assert (response.status, response.read()) == (200, b'{"status":"ok"}')
            assert connection.sock is kept


def test_a_locked_file_of_keys_holds_up_nobody_who_needs_none(
    start_server: Callable[..., Server], tmp_path: Path
) -> None:
    keys = Keys(tmp_path / "keys")
    headers = {"Authorization": f"Bearer {keys.add('one', ['query'])}"}
    server = start_server(keys=keys.path)
    with sqlite3.connect(keys.path, isolation_level=None) as db:
        db.execute("BEGIN EXCLUSIVE")
        replies: list[int] = []
        asking = [
            threading.Thread(target=lambda: replies.append(server.http.get("/tasks", headers=headers).status_code))
            for _ in range(6)
        ]
        for thread in asking:
            thread.start()
        time.sleep(0.2)
        assert server.http.get("/healthz").status_code == 200
        assert len(replies) < 6  # they wait a second each for the file, two at a time
        for thread in asking:
            thread.join()
        db.execute("ROLLBACK")
    assert replies == [503] * 6
    assert server.http.get("/tasks", headers=headers).status_code == 200
