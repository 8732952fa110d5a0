"""What survives: restarts, crashes, damage; and what a server says that cannot start."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest
from safetensors.torch import load_file, save_file

from abmll.store import StoredPosterior
from server.jobs import ATTEMPTS, JobRegistry
from server.local_server import processes_below
from server.run import run
from server.settings import Settings
from tests.server.conftest import Server, free_port, wait_for
from tests.server.test_http import QUESTION, adapt
from tests.server.test_load import metric


def wait_running(server: Server, job: str) -> psutil.Process:
    """Waits until a job makes progress; returns the adaptation process."""
    deadline = time.monotonic() + 240
    reply = None
    while time.monotonic() < deadline:
        reply = server.http.get(f"/adapt/{job}").json()
        workers = processes_below(server.process.pid, "server.worker")
        if reply["status"] == "running" and reply["progress"] > 0 and len(workers) == 1:
            return workers[0]
        time.sleep(0.05)
    raise AssertionError(reply)


def statuses_until_ready(server: Server) -> list[tuple[int, int, int]]:
    """What /healthz, /generate and /readyz say while a server starts."""
    seen: list[tuple[int, int, int]] = []
    while not seen or seen[-1][2] != 200:
        assert server.process.poll() is None, server.log.read_text()
        time.sleep(0.05)
        with contextlib.suppress(httpx.TransportError):
            health = server.http.get("/healthz").status_code
            generate = server.http.post("/generate", json=QUESTION).status_code
            seen.append((health, generate, server.http.get("/readyz").status_code))
    return seen


@pytest.mark.slow
def test_tasks_and_jobs_survive_restarts_and_damage_stays_where_it_is(
    start_server: Callable[..., Server], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    server = start_server(store, wait=False)
    seen = statuses_until_ready(server)
    assert {health for health, _, _ in seen} == {200}
    assert {generate for _, generate, _ in seen} <= {200, 503}

    for name in ("kept", "broken"):
        assert server.wait_job(adapt(server, name, steps=1)["job"])["status"] == "done"
    ask = QUESTION | {"task": "kept"}
    before = server.http.post("/generate", json=ask).json()
    running = adapt(server, "long", steps=150)["job"]
    queued = adapt(server, "next", steps=1)["job"]
    wait_running(server, running)
    assert server.stop() == 0
    jobs = JobRegistry(store / "jobs.sqlite3")
    assert (jobs.get(running).status, jobs.get(running).attempts) == ("queued", 0)
    weights = store / "tasks" / "broken" / "v0001" / "posterior.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])

    server = start_server(store)
    assert server.http.post("/generate", json=ask).json()["probabilities"] == before["probabilities"]
    tasks = {task["task"]: task for task in server.http.get("/tasks").json()}
    assert tasks["broken"]["status"] == "damaged"
    assert "damaged" in tasks["broken"]["error"]
    refused = server.http.post("/generate", json=ask | {"task": "broken"})
    assert (refused.status_code, refused.json()["error"]["type"]) == (500, "InvalidPosterior")
    assert server.wait_job(running, 240)["status"] == "done"
    assert server.wait_job(queued)["status"] == "done"
    assert server.wait_job(adapt(server, "broken", steps=1)["job"])["posterior"]["version"] == 2
    assert server.http.post("/generate", json=ask | {"task": "broken"}).status_code == 200

    orphan = adapt(server, "orphan", steps=1000)["job"]
    worker = wait_running(server, orphan)
    server.process.kill()
    server.process.wait()
    deadline = time.monotonic() + 60
    while worker.is_running() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not worker.is_running(), "the adaptation process outlived its server"
    assert (jobs.get(orphan).status, jobs.get(orphan).attempts) == ("running", 0)


@pytest.mark.slow
def test_a_job_outlives_kills_of_the_whole_container(start_server: Callable[..., Server], tmp_path: Path) -> None:
    store = tmp_path / "store"
    server = start_server(store)
    job = adapt(server, "patient", steps=60)["job"]
    for _ in range(ATTEMPTS):
        worker = wait_running(server, job)
        server.process.send_signal(signal.SIGSTOP)  # so that it cannot see its worker die before it
        worker.kill()
        server.process.kill()
        server.process.wait()
        server = start_server(store)
    assert server.wait_job(job, 240)["status"] == "done"


@pytest.mark.slow
def test_a_dead_worker_is_replaced_and_a_deadly_job_fails(server: Server) -> None:
    job = adapt(server, "deadly", steps=1000)["job"]
    died = metric(server, "abmll_worker_restarts_total")
    wait_running(server, job).kill()
    wait_for(lambda: metric(server, "abmll_worker_restarts_total") == died + 1)
    wait_running(server, job).kill()
    assert server.wait_job(job)["status"] == "failed"
    assert "died" in server.http.get(f"/adapt/{job}").json()["error"]
    assert server.wait_job(adapt(server, "lively", steps=1)["job"])["status"] == "done"


@pytest.mark.slow
def test_ctrl_c_ends_a_server_without_a_word_of_python(
    global_posterior: tuple[Path, StoredPosterior], tiny_model_folder: Path, tmp_path: Path
) -> None:
    log, port = tmp_path / "log", free_port()
    command = [
        sys.executable,
        "-m",
        "server.cli",
        "serve",
        "--engine",
        "torch",
        "--port",
        port,
        "--store",
        tmp_path / "s",
    ]
    command += ["--model", tiny_model_folder, "--posterior", global_posterior[0]]
    with log.open("w") as stream:
        # The terminal's foreground group, as a shell makes it.
        server = subprocess.Popen([*map(str, command)], stdout=stream, stderr=stream, start_new_session=True)
    try:
        wait_for(lambda: "ready: " in log.read_text(), 90)
        wait_for(lambda: bool(processes_below(server.pid, "server.worker")))
        (worker,) = processes_below(server.pid, "server.worker")
        os.killpg(server.pid, signal.SIGINT)
        assert server.wait(30) == 0
    finally:
        server.kill()
    wait_for(lambda: not worker.is_running())
    assert "Traceback" not in log.read_text()


def test_servers_that_cannot_start_say_why_in_a_line(
    server: Server,
    global_posterior: tuple[Path, StoredPosterior],
    tiny_model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damaged, other = tmp_path / "damaged", tmp_path / "other-model"
    shutil.copytree(global_posterior[0], damaged)
    (damaged / "posterior.safetensors").write_bytes(b"x")
    shutil.copytree(tiny_model_folder, other)
    weights = load_file(other / "model.safetensors")
    save_file({key: tensor + 1 for key, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    (tmp_path / "file").write_text("")
    cases = {
        "is damaged": {"posterior": damaged},
        "is not a posterior folder": {"posterior": tmp_path / "nowhere"},
        "no model folder": {"model": str(tmp_path / "nowhere")},
        "serve it with its own base model": {"model": str(other)},
        "choose another --port": {"port": server.settings.port, "store": tmp_path / "store"},
        "another server uses the store": {"store": server.settings.store},
        "cannot make the store": {"store": tmp_path / "file" / "store"},
        "--vllm-option is for --engine vllm": {"vllm_options": {"tensor_parallel_size": 2}},
    }
    usable = {"model": str(tiny_model_folder), "posterior": global_posterior[0], "port": 0}
    for reason, wrong in cases.items():
        assert run(Settings.model_validate(usable | {"store": tmp_path / reason} | wrong)) == 1
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith("abmll: ")
        assert reason in line
