"""API keys, rates and the log, over a real server process."""

from __future__ import annotations

import json
import sqlite3
import stat
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from abmll.errors import AbmllError
from clients.errors import AccessDenied
from clients.http import Client
from server.cli import create_cli
from server.keys import Keys, parse_rate
from server.run import run
from server.settings import Settings
from tests.server.conftest import Server, wait_for
from tests.server.test_http import EXAMPLES, QUESTION


@pytest.fixture(scope="module")
def keyed(start_server: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory) -> tuple[Server, Keys]:
    keys = Keys(tmp_path_factory.mktemp("keys") / "keys.sqlite3")
    keys.add("first", ["query"])
    return start_server(keys=keys.path, log_format="json"), keys


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def lines(server: Server) -> list[dict[str, Any]]:
    """The log, each line of which must be a JSON object."""
    return [json.loads(line) for line in server.log.read_text().splitlines()]


def test_each_right_opens_its_own_calls(keyed: tuple[Server, Keys]) -> None:
    server, keys = keyed
    calls = {
        "query": ("POST", "/generate", QUESTION, 200),
        "adapt": ("POST", "/adapt", {"task": "keyed", "examples": EXAMPLES, "steps": 1}, 202),
        "admin": ("DELETE", "/tasks/keyed", None, 204),
    }
    holders = {right: keys.add(right, [right]) for right in calls}
    for right, (method, path, body, expected) in calls.items():
        for holder, secret in holders.items():
            if holder != right:
                refused = server.http.request(method, path, json=body, headers=bearer(secret))
                assert (refused.status_code, refused.json()["error"]["type"]) == (403, "Forbidden")
                assert right in refused.json()["error"]["message"]
        allowed = server.http.request(method, path, json=body, headers=bearer(holders[right]))
        assert allowed.status_code == expected, allowed.text
        if right == "adapt":
            job = f"/adapt/{allowed.json()['job']}"
            while server.http.get(job, headers=bearer(holders["adapt"])).json()["status"] != "done":
                pass


def test_without_a_key_nothing_but_health_and_documentation(keyed: tuple[Server, Keys]) -> None:
    server, keys = keyed
    wrong: list[dict[str, str]] = [
        {},
        bearer("abmll_nonsense"),
        {"Authorization": "Bearer"},
        {"Authorization": "Basic x"},
        {"Authorization": "Bearer ,, ,"},
    ]
    with closing(sqlite3.connect(keys.path)) as db:  # whoever has stolen the file has no key
        wrong.append(bearer(db.execute("SELECT hash FROM keys").fetchone()[0]))
    for headers in wrong:
        for method, path in (("POST", "/generate"), ("GET", "/tasks"), ("GET", "/adapt"), ("GET", "/metrics")):
            # Not even whether the body is right is told.
            reply = server.http.request(method, path, content=b"{", headers=headers)
            assert (reply.status_code, reply.json()["error"]["type"]) == (401, "Unauthorized")
            assert reply.headers["WWW-Authenticate"] == "Bearer"
    for path in ("/healthz", "/readyz", "/docs", "/openapi.json"):
        assert server.http.get(path).status_code == 200
    operation = server.http.get("/openapi.json").json()["paths"]["/generate"]["post"]
    assert operation["security"] == [{"key": ["query"]}]
    assert {"401", "403"} <= operation["responses"].keys()


def test_a_revoked_key_ends_at_once_and_no_secret_is_stored(keyed: tuple[Server, Keys]) -> None:
    server, keys = keyed
    secret = keys.add("leaver", ["query"])
    assert stat.S_IMODE(keys.path.stat().st_mode) == 0o600
    assert secret.encode() not in keys.path.read_bytes()
    with Client(server.url, key=secret) as client:
        assert client.generate("a film", options=["good", "bad"]).confidence > 0
        keys.revoke("leaver")
        with pytest.raises(AccessDenied, match="revoked"):
            client.tasks()


def test_a_key_has_its_own_rate(keyed: tuple[Server, Keys]) -> None:
    server, keys = keyed
    slow, free = keys.add("slow", ["query"], "3/hour"), keys.add("free", ["query"])
    statuses = [server.http.get("/tasks", headers=bearer(slow)).status_code for _ in range(5)]
    assert statuses == [200] * 3 + [429] * 2
    refused = server.http.get("/tasks", headers=bearer(slow))
    assert refused.json()["error"]["type"] == "RateLimited"
    assert 3000 < int(refused.headers["Retry-After"]) <= 3600
    assert server.http.get("/tasks", headers=bearer(free)).status_code == 200


def test_the_log_tells_request_key_and_change_but_no_question(keyed: tuple[Server, Keys]) -> None:
    server, keys = keyed
    secret = keys.add("logged", ["query", "adapt", "admin"])
    question = QUESTION | {"prompt": "a most private matter"}
    asked = server.http.post("/generate", json=question, headers=bearer(secret))
    examples = [{"prompt": "a secret lesson", "options": ["yes", "no"], "answer": "yes"}]
    taught = server.http.post("/adapt", json={"task": "logged", "examples": examples}, headers=bearer(secret))
    ended = server.http.delete(f"/adapt/{taught.json()['job']}", headers=bearer(secret))
    assert ended.status_code == 200

    wait_for(lambda: ended.headers["X-Request-ID"] in server.log.read_text())
    log = lines(server)
    (line,) = [line for line in log if line.get("request_id") == asked.headers["X-Request-ID"]]
    assert line["key"] == "logged"
    assert (line["method"], line["path"], line["status"]) == ("POST", "/generate", 200)
    audits = {line["action"]: line for line in log if line["logger"] == "abmll.audit" and line["key"] == "logged"}
    assert audits["adapt"]["task"] == audits["cancel"]["task"] == "logged"
    assert audits["adapt"]["request_id"] == taught.headers["X-Request-ID"]
    text = server.log.read_text()
    assert "private" not in text
    assert "secret lesson" not in text
    assert secret not in text


def test_questions_are_logged_if_asked_for_and_every_reply_has_an_id(start_server: Callable[..., Server]) -> None:
    server = start_server(log_prompts=True)
    ids = {
        server.http.post("/generate", json=QUESTION | {"prompt": "tell\nit"}).headers["X-Request-ID"],
        server.http.get("/nowhere").headers["X-Request-ID"],
        server.http.post("/generate", content=b"{").headers["X-Request-ID"],
    }
    assert len(ids) == 3
    wait_for(lambda: all(f"[{id}]" in server.log.read_text() for id in ids))
    assert r"'tell\nit'" in server.log.read_text()
    forged = server.http.get("/tasks/x%0a2026-01-01 INFO forged")
    assert forged.status_code == 404
    assert not any(line.startswith("2026-01-01") for line in server.log.read_text().splitlines())


def test_keys_are_made_listed_and_revoked_on_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "new" / "keys"

    def abmll(*words: str) -> Any:
        return CliRunner().invoke(create_cli(), ["keys", *words, "--keys", str(file)])

    secret = abmll("add", "team", "--rights", "query, adapt", "--rate", "10/second").stdout.strip()
    found = Keys(file).find(secret)
    assert found is not None
    assert (found.name, found.rights, found.rate) == ("team", {"query", "adapt"}, "10/second")
    listed = abmll("list").stdout
    assert "team" in listed
    assert secret not in listed
    for words in (["add", "team"], ["add", "x", "--rights", "root"], ["add", "x", "--rate", "often"], ["revoke", "x"]):
        assert isinstance(abmll(*words).exception, AbmllError)
    assert abmll("revoke", "team").exit_code == 0
    assert Keys(file).all() == []
    for rate in ("0/minute", "-1/minute", "", "5", "600/minute;10/second"):
        with pytest.raises(AbmllError, match="such as"):
            parse_rate(rate)


def test_a_server_without_usable_keys_does_not_start(
    tmp_path: Path, tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad").write_bytes(b"not a database" * 100)
    empty = Keys(tmp_path / "empty")
    empty.add("gone", ["query"])
    empty.revoke("gone")
    for name, reason in (("absent", "abmll keys add"), ("bad", "cannot be used"), ("empty", "holds no key")):
        settings = Settings(model=str(tiny_model_folder), store=tmp_path / "store", keys=tmp_path / name, port=0)
        assert run(settings) == 1
        assert reason in capsys.readouterr().err


def test_a_broken_file_of_keys_lets_nobody_in(start_server: Callable[..., Server], tmp_path: Path) -> None:
    keys = Keys(tmp_path / "keys")
    secret = keys.add("one", ["query"])
    server = start_server(keys=keys.path)
    keys.path.write_bytes(b"x" * 5000)
    reply: httpx.Response = server.http.get("/tasks", headers=bearer(secret))
    assert (reply.status_code, reply.json()["error"]["type"]) == (503, "StoreFailure")
