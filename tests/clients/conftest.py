"""A small HTTP server that replies what a test tells it, broken replies included."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

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
    replies: list[tuple[int, bytes]] = field(default_factory=lambda: list[tuple[int, bytes]]())
    asked: list[tuple[str, str, bytes]] = field(default_factory=lambda: list[tuple[str, str, bytes]]())

    def reply(self, status: int, body: bytes) -> Scripted:
        self.replies.append((status, body))
        return self

    async def handle(self, request: Request) -> Response:
        self.asked.append((request.method, request.scope["raw_path"].decode(), await request.body()))
        status, body = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        return Response(body, status, media_type="application/json")


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
