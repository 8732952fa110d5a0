"""A small HTTP server that replies what a test tells it, broken replies included; and a real one, with keys."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from server.keys import RIGHTS, Keys
from server.settings import Settings
from tests.server.conftest import Server, free_port

ANSWER: dict[str, Any] = {
    "request_id": "a1b2",
    "task": "films",
    "posterior": {"id": "5f0c", "version": 3, "task": "films"},
    "answer": "good",
    "probabilities": [0.9, 0.1],
    "confidence": 0.9,
    "raw_confidence": 0.95,
    "uncertainty": {"total": 0.325, "aleatoric": 0.304, "epistemic": 0.021},
    "standard_error": 0.012,
    "draws": 8,
    "timing": {"total_ms": 41.4, "engine_ms": 39.0, "queue_ms": 1.0},
}


def job(status: str, progress: float = 0.0, **more: Any) -> dict[str, Any]:
    return {"job": "j1", "task": "films", "status": status, "progress": progress, "error": None, **more}


@dataclass
class Scripted:
    """Replies in turn, the last one for ever, and keeps what it was asked."""

    url: str
    replies: list[tuple[int, bytes, dict[str, str]]] = field(default_factory=list[tuple[int, bytes, dict[str, str]]])
    asked: list[tuple[str, str, bytes]] = field(default_factory=lambda: list[tuple[str, str, bytes]]())

    def reply(self, status: int, body: bytes, **headers: str) -> Scripted:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.replies.append((status, body, named))
        return self

    async def handle(self, request: Request) -> Response:
        self.asked.append((request.method, request.scope["raw_path"].decode(), await request.body()))
        status, body, headers = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        return Response(body, status, headers, media_type="application/json")


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    listening = socket.create_server(("127.0.0.1", 0))
    script = Scripted(f"http://127.0.0.1:{listening.getsockname()[1]}")
    app = Starlette(routes=[Route("/{path:path}", script.handle, methods=["GET", "POST", "PUT", "DELETE"])])
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    yield script
    server.should_exit = True
    thread.join(timeout=10)
    listening.close()


@pytest.fixture
def free_url() -> str:
    """Address that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


@dataclass
class Keyed:
    """A real server over the embedded model, which asks for keys, and one key of each kind."""

    server: Server
    owner: str  # may do everything
    reader: str  # may ask
    slow: str  # may ask once an hour

    @property
    def url(self) -> str:
        return self.server.url


@pytest.fixture(scope="session")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    """One for all JavaScript: it takes ten seconds to start."""
    folder: Path = tmp_path_factory.mktemp("keyed")
    keys = Keys(folder / "keys.sqlite3")
    owner, reader = keys.add("owner", list(RIGHTS)), keys.add("reader", ["query"])
    slow = keys.add("slow", ["query"], "1/hour")
    settings = Settings(port=free_port(), engine="torch", store=folder / "store", keys=keys.path)
    server = Server(settings, folder / "server.log")
    try:
        server.wait_ready()
        yield Keyed(server, owner, reader, slow)
    finally:
        server.stop()
