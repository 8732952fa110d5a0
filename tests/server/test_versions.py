"""Versions of a task: rolled back, asked for by number, sharing the traffic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import Server
from tests.server.test_http import QUESTION, adapt

URL = "/tasks/versioned/serving"


def answering(server: Server, **fields: Any) -> int:
    reply = server.http.post("/generate", json=QUESTION | {"task": "versioned", "draws": 1} | fields)
    assert reply.status_code == 200, reply.text
    return reply.json()["posterior"]["version"]


@pytest.fixture(scope="module")
def versioned(start_server: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory) -> Server:
    server = start_server(tmp_path_factory.mktemp("versions") / "store")
    for seed in range(2):
        assert server.wait_job(adapt(server, "versioned", steps=1, seed=seed)["job"])["status"] == "done"
    return server


def test_the_newest_answers_until_another_is_named_and_again_after(versioned: Server) -> None:
    assert answering(versioned) == 2
    assert answering(versioned, version=1) == 1
    shown = versioned.http.put(URL, json={"versions": {"1": 1}}).json()
    assert (shown["serving"], shown["version"]) == ({"1": 1.0}, 1)
    assert answering(versioned) == 1
    assert answering(versioned, version=2) == 2

    # A new version does not undo a roll-back.
    assert versioned.wait_job(adapt(versioned, "versioned", steps=1, seed=2)["job"])["status"] == "done"
    assert answering(versioned) == 1
    assert versioned.http.put(URL, json={"versions": None}).json()["version"] == 3
    assert answering(versioned) == 3


def test_versions_share_the_questions_and_the_same_question_stays(versioned: Server) -> None:
    shown = versioned.http.put(URL, json={"versions": {"1": 3, "2": 1}}).json()
    assert (shown["serving"], shown["version"]) == ({"1": 0.75, "2": 0.25}, 1)
    first = [answering(versioned, prompt=f"question {i}") for i in range(200)]
    assert first == [answering(versioned, prompt=f"question {i}") for i in range(200)]
    counts = Counter(first)
    assert set(counts) == {1, 2}
    assert 120 <= counts[1] <= 180  # 150 is expected; beyond 4.9 standard deviations
    versioned.http.put(URL, json={"versions": None})


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"versions": {"9": 1}}, 404),
        ({"versions": {}}, 422),
        ({"versions": {"1": 0}}, 422),
        ({"versions": {"1": -1, "2": 1}}, 422),
        ({"versions": {"newest": 1}}, 422),
        ({"versions": {"1": 1, "01": 1}}, 422),
        ({}, 422),
    ],
)
def test_wrong_shares_change_nothing(versioned: Server, body: dict[str, Any], status: int) -> None:
    before = versioned.http.get("/tasks/versioned").json()
    refused = versioned.http.put(URL, json=body)
    assert refused.status_code == status, refused.text
    assert versioned.http.get("/tasks/versioned").json() == before
    assert versioned.http.put("/tasks/nowhere/serving", json={"versions": None}).status_code == 404
    assert versioned.http.put("/tasks/global/serving", json={"versions": None}).status_code == 409
    assert versioned.http.post("/generate", json=QUESTION | {"task": "versioned", "version": 99}).status_code == 404


def test_a_roll_back_survives_a_restart_and_its_damage_is_told(
    start_server: Callable[..., Server], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    server = start_server(store)
    for seed in range(2):
        assert server.wait_job(adapt(server, "versioned", steps=1, seed=seed)["job"])["status"] == "done"
    assert server.http.put(URL, json={"versions": {"1": 1}}).status_code == 200
    assert server.stop() == 0

    server = start_server(store)
    assert answering(server) == 1
    (store / "tasks" / "versioned" / "serving.json").write_text("{")
    refused = server.http.post("/generate", json=QUESTION | {"task": "versioned"})
    assert refused.status_code == 500
    assert "PUT" in refused.json()["error"]["message"]
    listed = {task["task"]: task for task in server.http.get("/tasks").json()}
    assert listed["versioned"]["status"] == "damaged"
    assert listed["global"]["status"] == "ready"
    assert server.http.put(URL, json={"versions": {"1": 1}}).status_code == 200
    assert answering(server) == 1
