"""Stands in for the Hugging Face hub, which tests cannot reach: the part of its protocol that its client uses."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import urllib.parse
from collections.abc import Generator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Repository:
    """A model on the hub.

    Attributes:
        commits: Folder of files by commit.
        refs: Commit by branch or tag.
        readers: Tokens that may read a gated one; None: everybody may.
    """

    commits: dict[str, Path]
    refs: dict[str, str]
    readers: frozenset[str] | None = None


@dataclass(frozen=True)
class Asked:
    """A request that came."""

    method: str
    path: str
    token: str | None


@dataclass
class Hub:
    """The stand-in.

    Attributes:
        url: Its address, for ``HF_ENDPOINT``.
        repositories: What it has, by name.
        asked: The requests that came.
    """

    url: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)


@contextlib.contextmanager
def serve_hub() -> Generator[Hub]:
    """Serves on a free port of this machine while the context lasts."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub = hub = Hub(f"http://127.0.0.1:{server.server_port}")  # pyright: ignore[reportAttributeAccessIssue]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing; ``Hub.asked`` has it."""

    def do_HEAD(self) -> None:
        self._reply()

    def do_GET(self) -> None:
        self._reply()

    def _reply(self) -> None:
        hub: Hub = self.server.hub  # pyright: ignore[reportAttributeAccessIssue] -- set by serve_hub
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        hub.asked.append(Asked(self.command, path, token))
        parts = path.removeprefix("/api/models").strip("/").split("/")
        name, rest = "/".join(parts[:2]), parts[2:]
        repository = hub.repositories.get(name)
        if repository is None:  # without a token, the hub does not say whether it is private
            return self._refuse(401 if token is None else 404, "RepoNotFound", "Repository not found")
        closed = repository.readers is not None and token not in repository.readers
        revision = rest[1] if len(rest) > 1 else "main"
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if closed and rest and rest[0] in ("resolve", "auth-check"):  # anybody may see what there is
            return self._refuse(401 if token is None else 403, "GatedRepo", f"Access to model {name} is restricted")
        folder = repository.commits[commit]
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        match rest:
            case ["resolve", _, *below]:
                return self._send_file(folder.joinpath(*below), commit)
            case ["tree", _]:
                entries = [
                    {"type": "file", "path": str(file.relative_to(folder)), "size": file.stat().st_size, "oid": "0"}
                    for file in files
                ]
                return self._send(200, json.dumps(entries).encode())
            case [] | ["revision", _]:
                siblings = [{"rfilename": str(file.relative_to(folder))} for file in files]
                about = {"id": name, "sha": commit, "private": False, "siblings": siblings}
                return self._send(200, json.dumps(about).encode())
            case ["auth-check"]:
                return self._send(200)
            case _:
                return self._refuse(404, "EntryNotFound", "Entry not found")

    def _send_file(self, file: Path, commit: str) -> None:
        if not file.is_file():
            return self._refuse(404, "EntryNotFound", "Entry not found")
        data = file.read_bytes()
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        return self._send(200, data, {"ETag": etag, "X-Repo-Commit": commit, "X-Linked-Size": str(len(data))})

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._send(status, json.dumps({"error": message}).encode(), {"X-Error-Code": code, "X-Error-Message": message})

    def _send(self, status: int, data: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)
