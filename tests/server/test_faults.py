"""Real faults: a full disk, a read-only one, killed processes, flipped bits; what was acknowledged stays."""

from __future__ import annotations

import fcntl
import importlib.util
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from abmll.store import Record, StoredPosterior, load_posterior
from server.local_server import processes_below
from server.objects import Objects
from server.store import TaskStore
from tests.server.conftest import Server, random_posterior, wait_for
from tests.server.test_http import EXAMPLES, QUESTION, adapt
from tests.server.test_lifetime import statuses_until_ready, wait_running
from tests.server.test_load import SLOW, metric


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of four megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def remount(folder: Path, mode: str) -> None:
    deadline = time.monotonic() + 10
    while subprocess.run(["mount", "-o", f"remount,{mode}", folder], capture_output=True).returncode:
        assert time.monotonic() < deadline, "the file system stays busy"
        time.sleep(0.05)


def fill(folder: Path) -> Path:
    """Takes every byte that is left."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 16, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                continue
    return filler


def probabilities(server: Server, task: str) -> object:
    reply = server.http.post("/generate", json=QUESTION | {"task": task})
    assert reply.status_code == 200, reply.text
    return reply.json()["probabilities"]


def refusal(reply: httpx.Response) -> tuple[int, str]:
    assert int(reply.headers.get("Retry-After", 0)) > 0, reply.text
    return reply.status_code, reply.json()["error"]["type"]


def half_written(store: Path) -> list[str]:
    """Versions that cannot be read, and whatever else lies visibly among them."""
    wrong: list[str] = []
    for task in (store / "tasks").glob("[!.]*"):
        for version in task.glob("[!.]*"):
            try:
                load_posterior(version)
            except Exception as error:
                wrong.append(str(error))
    return wrong


@pytest.mark.slow
def test_a_full_disk_takes_no_job_loses_none_and_answers_go_on(start_server: Callable[..., Server], disk: Path) -> None:
    store = disk / "store"
    server = start_server(store)
    assert server.wait_job(adapt(server, "kept", steps=1)["job"])["status"] == "done"
    before = probabilities(server, "kept")
    running = adapt(server, "running", steps=60)["job"]
    wait_running(server, running)

    filler = fill(disk)
    body = {"task": "late", "examples": EXAMPLES * 16}
    assert refusal(server.http.post("/adapt", json=body)) == (503, "StoreFailure")
    assert probabilities(server, "kept") == before
    assert server.http.get("/readyz").status_code == 200
    time.sleep(8)  # the job comes to its end meanwhile
    assert probabilities(server, "kept") == before
    assert half_written(store) == []

    filler.unlink()
    ended = server.wait_job(running)
    assert ended["status"] == "done" or "space" in ended["error"], ended
    assert (store / "tasks" / "running").exists() == (ended["status"] == "done")
    assert half_written(store) == []
    assert server.wait_job(adapt(server, "late", steps=1)["job"])["status"] == "done"
    assert probabilities(server, "kept") == before


@pytest.mark.slow
def test_a_read_only_store_answers_before_and_after_a_restart(start_server: Callable[..., Server], disk: Path) -> None:
    store = disk / "store"
    server = start_server(store)
    assert server.wait_job(adapt(server, "kept", steps=1)["job"])["status"] == "done"
    before = probabilities(server, "kept")

    remount(disk, "ro")
    for attempt in range(2):
        assert refusal(server.http.post("/adapt", json=adapt_body("late"))) == (503, "StoreFailure")
        assert refusal(server.http.delete("/tasks/kept")) == (503, "StoreFailure")
        assert probabilities(server, "kept") == before
        assert {task["task"] for task in server.http.get("/tasks").json()} == {"global", "kept"}
        assert server.http.get("/metrics").status_code == 200
        if attempt == 0:
            assert server.stop() == 0
            server = start_server(store)

    remount(disk, "rw")
    assert server.wait_job(adapt(server, "late", steps=1)["job"])["status"] == "done"
    assert server.http.delete("/tasks/kept").status_code == 204


def adapt_body(task: str) -> dict[str, object]:
    return {"task": task, "examples": [{"prompt": "a film", "answer": "good", "options": ["good", "bad"]}], "steps": 1}


@pytest.mark.slow
def test_acknowledged_jobs_survive_being_killed_at_any_moment(
    start_server: Callable[..., Server], tmp_path: Path
) -> None:
    store, moments = tmp_path / "store", random.Random(5)
    acknowledged: dict[str, str] = {}
    for life in range(3):
        server = start_server(store)
        for i in range(3):
            task = f"t{life}-{i}"
            acknowledged[task] = server.http.post("/adapt", json=adapt_body(task)).json()["job"]
        time.sleep(moments.uniform(0, 3))
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
        assert half_written(store) == []

    server = start_server(store)
    for task, job in acknowledged.items():
        ended = server.wait_job(job)
        assert ended["status"] == "done", ended
        assert ended["posterior"]["version"] == 1, "a job that was taken up again has made two versions"
        probabilities(server, task)


@pytest.mark.slow
def test_a_flipped_bit_falls_back_to_the_version_before(start_server: Callable[..., Server], tmp_path: Path) -> None:
    store = tmp_path / "store"
    server = start_server(store)
    answers: list[object] = []
    for seed in range(2):
        job = server.http.post("/adapt", json=adapt_body("task") | {"seed": seed}).json()["job"]
        assert server.wait_job(job)["status"] == "done"
        answers.append(probabilities(server, "task"))
    assert server.stop() == 0

    weights = store / "tasks" / "task" / "v0002" / "posterior.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    server = start_server(store)
    assert probabilities(server, "task") == answers[0]
    shown = server.http.get("/tasks/task").json()["versions"]
    assert [version["status"] for version in shown] == ["ready", "damaged"]


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM exists for Linux only")
def test_a_killed_vllm_is_started_anew_and_nothing_is_lost(start_server: Callable[..., Server]) -> None:
    server = start_server(engine="vllm", wait=False)
    seen = statuses_until_ready(server)
    assert seen[0] == (200, 503, 503)
    assert server.wait_job(adapt(server, "kept", steps=1)["job"])["status"] == "done"
    before = probabilities(server, "kept")
    assert metric(server, "abmll_engine_restarts_total") == 0

    (core,) = processes_below(server.process.pid, "EngineCore")
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(server.http.post, "/generate", json=SLOW | {"seed": seed}) for seed in range(4)]
        wait_for(lambda: metric(server, "abmll_inside") == 4)
        core.kill()
        in_flight = [future.result() for future in asked]
    assert {refusal(reply) for reply in in_flight} == {(503, "EngineFailure")}
    wait_for(lambda: server.http.get("/readyz").status_code == 503)
    assert server.http.get("/healthz").status_code == 200
    assert refusal(server.http.post("/generate", json=SLOW | {"seed": 5})) == (503, "EngineFailure")

    server.wait_ready(400)
    assert probabilities(server, "kept") == pytest.approx(before, abs=1e-3)
    assert metric(server, "abmll_engine_restarts_total") == 1
    assert not core.is_running()
    assert server.wait_job(adapt(server, "later", steps=1)["job"])["status"] == "done"

    started = processes_below(server.process.pid)
    assert len(started) > 2
    server.process.kill()
    wait_for(lambda: not any(process.is_running() for process in started))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM exists for Linux only")
def test_a_stop_in_the_middle_of_vllms_start_is_quick_and_leaves_nothing(start_server: Callable[..., Server]) -> None:
    server = start_server(engine="vllm", wait=False)
    wait_for(lambda: bool(processes_below(server.process.pid, "EngineCore")), 240)
    started = processes_below(server.process.pid)
    begun = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - begun < 40  # a start takes a minute
    wait_for(lambda: not any(process.is_running() for process in started))


def test_deletions_that_wait_for_the_store_hold_no_answer_up(
    start_server: Callable[..., Server], tmp_path: Path
) -> None:
    server = start_server(tmp_path / "store")
    assert server.wait_job(adapt(server, "films", steps=1)["job"])["status"] == "done"
    with (tmp_path / "store" / ".adding").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as who waits for object storage does
        for _ in range(40):  # more than any pool of threads has
            with pytest.raises(httpx.ReadTimeout):
                server.http.delete("/tasks/films", timeout=0.1)
        for _ in range(3):
            assert server.http.post("/generate", json=QUESTION, timeout=10).status_code == 200
    wait_for(lambda: server.http.get("/tasks/films").status_code == 404)


def test_a_store_that_is_gone_is_told_by_the_metrics_and_costs_its_tasks_alone(
    start_server: Callable[..., Server], tmp_path: Path
) -> None:
    server = start_server(tmp_path / "store")
    assert server.wait_job(adapt(server, "films", steps=1)["job"])["status"] == "done"
    tasks = tmp_path / "store" / "tasks"
    tasks.rename(tmp_path / "away")
    assert metric(server, "abmll_store_up") == 0
    asked = server.http.post("/generate", json=QUESTION | {"task": "films"})
    assert (asked.status_code, asked.json()["error"]["type"]) == (503, "StoreFailure")
    assert server.http.get("/tasks").status_code == 503
    assert server.http.post("/generate", json=QUESTION).status_code == 200
    (tmp_path / "away").rename(tasks)
    assert metric(server, "abmll_store_up") == 1
    assert server.http.post("/generate", json=QUESTION | {"task": "films"}).status_code == 200


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["full", "read-only", "conflict"])
def test_a_server_starts_with_what_its_disk_has_where_object_storage_has_more(
    disk: Path,
    fault: str,
    start_server: Callable[..., Server],
    tmp_path: Path,
    global_posterior: tuple[Path, StoredPosterior],
    tiny_model_folder: Path,
) -> None:
    place, store = f"file://{tmp_path}/objects", disk / "store"
    elsewhere = TaskStore(tmp_path / "elsewhere", global_posterior[1], objects=Objects(place))

    def made(store: TaskStore, name: str, seed: int) -> None:
        store.add(name, random_posterior(tiny_model_folder, seed), None, lambda n: Record(task=name, version=n))

    made(elsewhere, "first", 1)
    start_server(store=store, objects=place).stop()
    if fault == "conflict":
        made(TaskStore(store, global_posterior[1]), "later", 3)
    made(elsewhere, "later", 2)
    filler = fill(disk) if fault == "full" else None
    if fault == "read-only":
        remount(disk, "ro")
    server = start_server(store=store, objects=place)
    assert metric(server, "abmll_store_up") == 0
    assert "is not brought up to date, what is there is served" in server.log.read_text()
    probabilities(server, "first")
    if filler is not None:
        filler.unlink()
    elif fault == "read-only":
        remount(disk, "rw")
    else:
        elsewhere.delete("later")
    wait_for(lambda: metric(server, "abmll_store_up") == 1)
    probabilities(server, "later")
