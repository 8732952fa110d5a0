"""Versions of a task: rolled back, asked for by number, sharing the traffic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from abmll.errors import TaskConflict
from abmll.store import Record, StoredPosterior
from clients.http import Client
from server.store import TaskStore
from tests.server.conftest import Server, wait_for
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


def test_a_version_that_does_not_answer_is_deleted_with_what_was_said_of_it(
    start_server: Callable[..., Server], tmp_path: Path
) -> None:
    server = start_server(tmp_path / "store")
    for seed in range(3):
        assert server.wait_job(adapt(server, "versioned", steps=1, seed=seed)["job"])["status"] == "done"
    asked = {
        version: server.http.post("/generate", json=QUESTION | {"task": "versioned", "version": version}).json()
        for version in (1, 2, 3)
    }
    versions = "/tasks/versioned/versions"
    assert server.http.put(URL, json={"versions": {"2": 1}}).status_code == 200
    for version, why in ((2, "answers"), (3, "newest")):
        refused = server.http.delete(f"{versions}/{version}")
        assert (refused.status_code, refused.json()["error"]["field"]) == (409, "version")
        assert why in refused.json()["error"]["message"]
    for url, status in ((f"{versions}/9", 404), (f"{versions}/0", 422), (f"{versions}/x", 422),
                        ("/tasks/nowhere/versions/1", 404), ("/tasks/global/versions/1", 409)):  # fmt: skip
        assert server.http.delete(url).status_code == status, url
    assert server.http.post("/feedback", json={"request_id": asked[1]["request_id"], "answer": 0}).status_code == 200

    assert server.http.delete(f"{versions}/1").status_code == 204
    assert [row["version"] for row in server.http.get("/tasks/versioned").json()["versions"]] == [2, 3]
    assert sorted(path.name for path in (tmp_path / "store/tasks").rglob("v0*")) == ["v0002", "v0003"]
    assert server.http.delete(f"{versions}/1").status_code == 404
    assert server.http.post("/generate", json=QUESTION | {"task": "versioned", "version": 1}).status_code == 404
    said = {
        version: server.http.post("/feedback", json={"request_id": reply["request_id"], "answer": 0}).status_code
        for version, reply in asked.items()
    }
    assert said == {1: 404, 2: 200, 3: 200}
    lines = server.http.get("/metrics").text.splitlines()
    counted = {line.split('version="')[1][0] for line in lines if line.startswith("abmll_feedback_count{")}
    assert counted == {"2", "3"}
    assert answering(server) == 2
    with Client(server.url) as client:
        client.serve("versioned", None)
        client.delete_version("versioned", 2)
        assert [row.version for row in client.task("versioned").versions or []] == [3]
    assert server.wait_job(adapt(server, "versioned", steps=1, seed=3)["job"])["posterior"]["version"] == 4


def test_nothing_is_deleted_where_nobody_knows_which_version_answers(
    global_posterior: tuple[Path, StoredPosterior], tmp_path: Path
) -> None:
    store = TaskStore(tmp_path, global_posterior[1])
    for _ in range(3):
        store.add("t", global_posterior[1].posterior, None, lambda number: Record(task="t", version=number))
    (tmp_path / "tasks/t/serving.json").write_text("{")
    with pytest.raises(TaskConflict, match="PUT /tasks"):
        store.delete_version("t", 1)
    (tmp_path / "tasks/t/serving.json").unlink()
    (tmp_path / "tasks/t/v0003/posterior.safetensors").write_bytes(b"damaged")
    store = TaskStore(tmp_path, global_posterior[1])
    with pytest.raises(TaskConflict, match="answers"):
        store.delete_version("t", 2)  # in place of the damaged one
    store.delete_version("t", 1)
    assert [version.number for version in store.versions("t")] == [2, 3]


def test_of_old_versions_those_go_that_do_not_answer(
    global_posterior: tuple[Path, StoredPosterior], start_server: Callable[..., Server], tmp_path: Path
) -> None:
    store = TaskStore(tmp_path / "store", global_posterior[1])

    def add(name: str) -> None:
        store.add(name, global_posterior[1].posterior, None, lambda number: Record(task=name, version=number))

    def damage(name: str, *numbers: int) -> None:
        for number in numbers:
            (store.tasks / f"{name}/v000{number}/posterior.safetensors").write_bytes(b"damaged")

    for name, count in (("few", 2), ("many", 5), ("pinned", 5), ("unknown", 4), ("broken", 4), ("none", 4), ("old", 4)):
        for _ in range(count):
            add(name)
    store.serve("pinned", {1: 1.0, 3: 1.0})
    (store.tasks / "unknown/serving.json").write_text("{")
    damage("broken", 3, 4)  # version 2 answers
    damage("none", 1, 2, 3, 4)
    damage("old", 1)  # perhaps for now alone
    (store.tasks / "aloop").symlink_to("aloop")  # cannot be read, and holds up no other

    server = start_server(tmp_path / "store", versions_kept=2)
    left = {"few": [1, 2], "many": [4, 5], "pinned": [1, 3, 4, 5], "unknown": [1, 2, 3, 4], "broken": [2, 3, 4],
            "none": [1, 2, 3, 4], "old": [1, 3, 4]}  # fmt: skip

    def numbers() -> dict[str, list[int]]:
        return {name: sorted(int(path.name[1:]) for path in (store.tasks / name).glob("v*")) for name in left}

    wait_for(lambda: numbers() == left)
    assert [row["version"] for row in server.http.get("/tasks/many").json()["versions"]] == [4, 5]
    log = server.log.read_text()
    assert "delete_version task=pinned version=2 by=--versions-kept" in log
    again = TaskStore(tmp_path / "store", global_posterior[1])
    assert {name: again.prune(name, 2) for name in left} == {name: {} for name in left}
    assert again.prune("many", 1) == {4: []}  # not loaded, but to see that it can be
