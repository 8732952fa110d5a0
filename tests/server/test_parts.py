"""Store and jobs on their own."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from abmll.errors import InvalidPosterior, InvalidRequest, StoreFailure, TaskConflict, TaskNotFound
from abmll.examples import Example
from abmll.names import check_name
from abmll.posterior import Posterior
from abmll.store import Record, StoredPosterior
from server.errors import Told, install
from server.jobs import ATTEMPTS, SERVERS, JobCancelled, JobRegistry
from server.logs import Logged
from server.store import TaskStore
from server.task_schemas import AdaptRequest
from server.tasks import damaged, summarize
from tests.server.conftest import random_posterior


def record(version: int) -> Record:
    return Record(task="t", version=version)


@pytest.fixture
def registry(tmp_path: Path) -> JobRegistry:
    return JobRegistry(tmp_path / "jobs.sqlite3")


EXAMPLES = [Example("p", ("a", "b"), 0)]


@pytest.mark.parametrize("name", ["", "A", "-a", "a/b", "..", "a b", "a\n", "é", "a" * 65])
def test_names_that_are_no_task_names(name: str) -> None:
    with pytest.raises(InvalidRequest):
        check_name(name)


def test_a_damaged_newest_version_leaves_the_one_before_it(
    tiny_model_folder: Path, global_posterior: tuple[Path, StoredPosterior], tmp_path: Path
) -> None:
    store = TaskStore(tmp_path, global_posterior[1])
    with pytest.raises(TaskNotFound, match="global"):
        store.current("t")
    first = store.add("t", random_posterior(tiny_model_folder, 1), None, record)
    second = store.add("t", random_posterior(tiny_model_folder, 2), None, record)
    assert store.current("t").digest == second.digest
    (tmp_path / "tasks" / "t" / "v0002" / "posterior.json").write_text("{}")
    assert store.current("t").digest == first.digest
    assert [version.status for version in store.versions("t")] == ["ready", "damaged"]
    assert list(store.damaged()) == ["t"]
    (tmp_path / "tasks" / "t" / "v0001" / "posterior.safetensors").unlink()
    with pytest.raises(InvalidPosterior):
        TaskStore(tmp_path, global_posterior[1]).current("t")
    assert store.delete("t")
    store.add("t", second.posterior, None, record)
    with pytest.raises(TaskNotFound, match="deleted meanwhile"):
        store.add("t", first.posterior, None, record, source=first)
    assert store.delete("t")
    with pytest.raises(TaskNotFound):
        store.delete("t")
    assert store.names() == ["global"]
    assert not list((tmp_path / "tasks").iterdir())


def test_what_killed_processes_left_is_removed_and_nothing_else(
    tiny_model_folder: Path, global_posterior: tuple[Path, StoredPosterior], tmp_path: Path
) -> None:
    store = TaskStore(tmp_path, global_posterior[1])
    kept = store.add("t", random_posterior(tiny_model_folder, 1), None, record)
    tasks = tmp_path / "tasks"
    left = [tasks / ".deleted.x1", tasks / "t" / ".v0002.ab", tasks / "t" / ".v0001.old.cd"]
    for folder in left:
        folder.mkdir()
        (folder / "posterior.json").write_text("{}")
    (tasks / "t" / ".serving.json.ef").write_text("{}")
    store.sweep()
    assert [folder.exists() for folder in left] == [False, False, True]
    assert sorted(entry.name for entry in (tasks / "t").iterdir()) == [".v0001.old.cd", "v0001"]
    assert store.current("t").digest == kept.digest


def test_a_version_that_was_restored_is_served_again(
    tiny_model_folder: Path,
    global_posterior: tuple[Path, StoredPosterior],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = TaskStore(tmp_path, global_posterior[1])
    made = store.add("t", random_posterior(tiny_model_folder, 1), None, record)
    weights = tmp_path / "tasks" / "t" / "v0001" / "posterior.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1])
    for _ in range(3):  # it is not read anew for each question
        with pytest.raises(InvalidPosterior, match="damaged"):
            store.current("t")
    weights.write_bytes(good)
    with pytest.raises(InvalidPosterior, match="damaged"):
        store.current("t")
    monkeypatch.setattr("server.store._DAMAGED_SECONDS", 0.0)
    assert store.current("t").digest == made.digest
    assert len([r for r in caplog.records if "cannot be used" in r.getMessage()]) == 1


def test_a_posterior_for_another_base_model_is_refused(
    tiny_model_folder: Path, global_posterior: tuple[Path, StoredPosterior], tmp_path: Path
) -> None:
    def check(_: Posterior) -> None:
        raise InvalidPosterior("made for another base model")

    TaskStore(tmp_path, global_posterior[1]).add("t", random_posterior(tiny_model_folder, 1), None, record)
    with pytest.raises(InvalidPosterior, match="another base model"):
        TaskStore(tmp_path, global_posterior[1], check).current("t")


def test_jobs_run_in_order_and_one_a_task(registry: JobRegistry) -> None:
    first = registry.submit("a", EXAMPLES, None, 0)
    second = registry.submit("b", EXAMPLES, 3, 1)
    with pytest.raises(TaskConflict):
        registry.submit("a", EXAMPLES, None, 0)
    claimed = registry.claim()
    assert claimed is not None
    assert claimed.id == first.id
    assert registry.examples(first.id) == EXAMPLES
    registry.report(first.id, 0.5)
    registry.complete(first.id, lambda: ("digest", 4))
    done = registry.get(first.id)
    assert (done.status, done.progress, done.digest, done.version) == ("done", 1.0, "digest", 4)
    registry.submit("a", EXAMPLES, None, 0)
    assert [job.task for job in registry.list()] == ["a", "b", "a"]
    assert registry.counts() == {"done": 1, "queued": 2}
    claimed = registry.claim()
    assert claimed is not None
    assert claimed.id == second.id


def test_a_cancelled_job_saves_nothing(registry: JobRegistry) -> None:
    job = registry.submit("a", EXAMPLES, None, 0)
    registry.claim()
    assert registry.cancel(job.id).status == "cancelled"
    with pytest.raises(JobCancelled):
        registry.report(job.id, 0.1)
    saved: list[int] = []
    with pytest.raises(JobCancelled):
        registry.complete(job.id, lambda: (str(saved.append(1)), 1))
    assert not saved
    registry.fail(job.id, "late")
    assert registry.get(job.id).status == "cancelled"


def test_what_was_taught_is_kept_no_longer_than_the_job(registry: JobRegistry, tmp_path: Path) -> None:
    secret = "what only we know"
    examples = [Example(secret, ("a", "b"), 0)]

    def kept() -> str:
        with sqlite3.connect(tmp_path / "jobs.sqlite3") as db:
            return str([tuple(row) for row in db.execute("SELECT status, examples FROM jobs")])

    endings: list[Callable[[str], object]] = [
        lambda job: registry.complete(job, lambda: ("digest", 1)),
        lambda job: registry.fail(job, "it would not learn"),
        registry.cancel,
    ]
    for end in endings:
        job = registry.submit("a", examples, None, 0)
        assert registry.claim() is not None
        assert secret in kept()
        end(job.id)
        assert secret not in kept()
        with pytest.raises(JobCancelled):
            registry.examples(job.id)
    registry.submit("a", examples, None, 0)
    for _ in range(ATTEMPTS):
        assert registry.claim() is not None
        registry.recover()
    assert secret not in kept()

    with sqlite3.connect(tmp_path / "jobs.sqlite3") as db:  # as earlier versions left it
        db.execute("UPDATE jobs SET examples = 'an old secret'")
    waiting = registry.submit("b", examples, None, 0)
    registry.recover_after_server()
    assert "an old secret" not in kept()
    assert registry.claim() is not None
    assert registry.examples(waiting.id) == examples


def test_a_save_that_fails_leaves_the_job_running(registry: JobRegistry) -> None:
    job = registry.submit("a", EXAMPLES, None, 0)
    registry.claim()

    def full_disk() -> tuple[str, int]:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        registry.complete(job.id, full_disk)
    assert registry.get(job.id).status == "running"
    assert registry.cancel(job.id).status == "cancelled"


def test_a_job_is_taken_up_again_once(registry: JobRegistry) -> None:
    job = registry.submit("a", EXAMPLES, None, 0)
    for status in ("queued", "failed"):
        assert registry.claim() is not None
        registry.recover()
        assert registry.get(job.id).status == status
    assert registry.claim() is None


def test_a_job_that_was_given_back_has_not_been_tried(registry: JobRegistry) -> None:
    job = registry.submit("a", EXAMPLES, None, 0)
    for _ in range(SERVERS + ATTEMPTS):
        assert registry.claim() is not None
        registry.give_back()
        registry.recover_after_server()
    assert (registry.get(job.id).status, registry.get(job.id).attempts) == ("queued", 0)


def test_a_server_that_is_killed_costs_a_job_nothing_until_it_seems_to_be_the_job_that_kills(
    registry: JobRegistry,
) -> None:
    job, other = (registry.submit(task, EXAMPLES, None, 0) for task in ("a", "b"))
    registry.claim()
    registry.recover()  # one death of the adaptation process, which alone counts as such
    for _ in range(SERVERS - 1):
        assert registry.claim() is not None
        registry.recover_after_server()
        found = registry.get(job.id)
        assert (found.status, found.attempts) == ("queued", 1)
        assert registry.get(other.id).status == "queued"
    assert registry.claim() is not None
    assert registry.examples(job.id) == EXAMPLES
    registry.recover_after_server()
    failed = registry.get(job.id)
    assert failed.status == "failed"
    assert f"killed {SERVERS} times" in (failed.error or "")
    assert registry.get(other.id).status == "queued"


def test_a_job_that_is_being_saved_locks_nothing_and_cannot_be_cancelled(registry: JobRegistry) -> None:
    job = registry.submit("a", EXAMPLES, None, 0)
    registry.claim()

    def save() -> tuple[str, int]:
        registry.submit("b", EXAMPLES, None, 0)
        assert registry.cancel(job.id).status == "running"
        return "digest", 1

    registry.complete(job.id, save)
    assert registry.get(job.id).status == "done"


def test_a_task_or_store_whose_disk_fails_is_not_taken_for_deleted(
    tiny_model_folder: Path,
    global_posterior: tuple[Path, StoredPosterior],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = TaskStore(tmp_path, global_posterior[1])
    store.add("t", random_posterior(tiny_model_folder, 1), None, record)
    iterdir = Path.iterdir

    def failing(path: Path) -> Any:
        if path.name == "t":
            raise OSError(116, "Stale file handle")
        return iterdir(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", failing)
        _check_unreadable(store)
    shutil.move(tmp_path / "tasks", tmp_path / "away")
    for ask in (store.names, lambda: store.choose("t", None, 0.0)):
        with pytest.raises(StoreFailure, match="cannot be read"):
            ask()
    assert store.choose("global", None, 0.0) == global_posterior[1]
    told = damaged("t", None, "its disk is gone")
    assert (told.status, told.error, told.version) == ("damaged", "its disk is gone", None)


def _check_unreadable(store: TaskStore) -> None:
    assert store.names() == ["global", "t"]
    with pytest.raises(StoreFailure, match="task 't' cannot be read"):
        store.choose("t", None, 0.0)
    assert "cannot be read" in store.damaged()["t"]


def test_a_task_pinned_to_a_damaged_version_says_what_is_wrong_with_it(
    tiny_model_folder: Path, global_posterior: tuple[Path, StoredPosterior], tmp_path: Path
) -> None:
    store = TaskStore(tmp_path, global_posterior[1])
    for seed in (1, 2):
        store.add("t", random_posterior(tiny_model_folder, seed), None, record)
    store.serve("t", {1: 1.0})
    (tmp_path / "tasks" / "t" / "v0001" / "posterior.json").write_text("{}")
    store = TaskStore(tmp_path, global_posterior[1])
    told = summarize("t", store.versions("t"), store.serving("t"))
    assert (told.status, told.version) == ("damaged", 1)
    assert "damaged" in (told.error or "")


def test_an_error_of_our_own_is_a_reply_with_the_requests_id_and_without_the_question(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = FastAPI()
    app.add_middleware(Told)
    app.add_middleware(Logged)
    install(app)

    @app.get("/broken")
    def broken(wrong: bool = False) -> None:  # pyright: ignore[reportUnusedFunction] -- a route
        if wrong:
            AdaptRequest.model_validate({"task": 7, "examples": "the secret question"})
        raise RuntimeError("a bug")

    with TestClient(app) as client:
        for query in ("", "?wrong=true"):
            reply = client.get(f"/broken{query}")
            assert (reply.status_code, reply.json()["error"]["type"]) == (500, "InternalError")
            assert len(reply.headers["X-Request-ID"]) == 16
    assert "a bug" in caplog.text
    assert "secret" not in caplog.text


def test_a_list_reads_only_what_may_answer(
    tiny_model_folder: Path, global_posterior: tuple[Path, StoredPosterior], tmp_path: Path
) -> None:
    made = TaskStore(tmp_path, global_posterior[1])
    for seed in range(4):
        made.add("t", random_posterior(tiny_model_folder, seed), None, record)

    def told() -> tuple[Any, list[int], int]:
        store = TaskStore(tmp_path, global_posterior[1])
        read, shares = store.answering("t")
        summary = summarize("t", read, shares)
        assert summary == summarize("t", made.versions("t"), made.serving("t"))
        return summary.version, [version.number for version in read], len(store._loaded)  # pyright: ignore[reportPrivateUsage]

    assert told() == (4, [4], 1)
    made.serve("t", {2: 1.0})
    assert told() == (2, [2, 4], 2)
    made.serve("t", None)
    (tmp_path / "tasks" / "t" / "v0004" / "posterior.json").write_text("{}")
    assert told() == (3, [3, 4], 1)
    store = TaskStore(tmp_path, global_posterior[1])
    assert list(store.damaged()) == ["t"]
    assert len(store._loaded) == 0  # pyright: ignore[reportPrivateUsage]
