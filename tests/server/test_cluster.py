"""Engines behind Ray Serve and adaptation as Ray's tasks: a real Ray, begun by the server on this machine."""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from abmll.store import StoredPosterior
from server.cluster.ray_process import adaptation_resources
from server.cluster.router import home
from server.settings import Settings
from tests.command_line import CommandLine
from tests.server.conftest import Server, all_processes, assert_ended, servers, wait_for
from tests.server.test_http import QUESTION, adapt, without_times
from tests.server.test_load import metric

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("one_ray")]

READY = 240.0


def ray_processes(server: Server, title: str) -> list[psutil.Process]:
    """Processes of the server's Ray that call themselves so."""
    return [process for process in all_processes(server) if title in " ".join(_command(process))]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.fixture(scope="module")
def start_cluster(
    tiny_model_folder: Path, global_posterior: tuple[Path, StoredPosterior], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Server]]:
    with servers(tiny_model_folder, global_posterior, tmp_path_factory) as start:

        def start_one(**options: Any) -> Server:
            server = start(wait=False, threads=1, **options)
            server.wait_ready(READY)
            return server

        yield start_one


@pytest.fixture(scope="module")
def cluster(start_cluster: Callable[..., Server]) -> Server:
    return start_cluster(replicas=2)


FREE = {"prompt": "the film was a", "max_tokens": 6, "draws": 4, "seed": 3}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", QUESTION),
        ("/generate", FREE | {"tokens": True}),
        ("/generate", FREE | {"samples": 3, "temperature": 0.8}),
        ("/score", {"prompt": "the film was a", "answer": " delight", "draws": 4}),
    ],
)
def test_a_cluster_answers_as_one_engine_does(cluster: Server, server: Server, path: str, body: dict[str, Any]) -> None:
    replies = [asked.http.post(path, json=body) for asked in (cluster, server)]
    assert [reply.status_code for reply in replies] == [200, 200], replies[0].text
    got, expected = (without_times(reply.json()) for reply in replies)
    assert got.pop("posterior")["id"] == expected.pop("posterior")["id"]
    assert_alike(got, expected)


def assert_alike(got: Any, expected: Any) -> None:
    """Equal, but for rounding."""
    if isinstance(expected, dict):
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            assert_alike(got[key], value)
    elif isinstance(expected, list):
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            assert_alike(one, other)
    elif isinstance(expected, float):
        assert got == pytest.approx(expected, rel=1e-3, abs=1e-5)
    else:
        assert got == expected


def test_tokens_come_as_they_are_decoded(cluster: Server, server: Server) -> None:
    texts = [
        [
            line
            for line in asked.http.post("/generate", json=FREE | {"stream": True}).text.splitlines()
            if "data" in line
        ]
        for asked in (cluster, server)
    ]
    assert len(texts[0]) == len(texts[1]) > 2
    assert texts[0][:-1] == texts[1][:-1]


def test_bad_questions_are_told_apart_from_failures(cluster: Server) -> None:
    long = cluster.http.post("/generate", json=QUESTION | {"prompt": "film " * 600})
    assert long.status_code == 413, long.text
    assert "tokens" in long.json()["error"]["message"]
    late = cluster.http.post("/generate", json=FREE | {"prompt": "never asked before", "timeout": 0.001})
    assert late.status_code == 504, late.text
    assert cluster.http.post("/generate", json=QUESTION).status_code == 200


def test_a_task_is_taught_by_a_task_of_ray_and_seen_by_all_replicas(cluster: Server, server: Server) -> None:
    jobs = [asked.wait_job(adapt(asked, "cluster-task", seed=5)["job"], READY) for asked in (cluster, server)]
    assert [job["status"] for job in jobs] == ["done", "done"], jobs
    asked = QUESTION | {"task": "cluster-task"}
    got, expected = (each.http.post("/generate", json=asked).json()["probabilities"] for each in (cluster, server))
    assert got == pytest.approx(expected, abs=1e-4)
    assert cluster.http.delete("/tasks/cluster-task").status_code == 204
    assert cluster.http.post("/generate", json=asked).status_code == 404
    server.http.delete("/tasks/cluster-task")


def test_a_job_can_be_cancelled_and_the_next_goes_on(cluster: Server) -> None:
    job = adapt(cluster, "long", steps=1000)["job"]
    wait_for(lambda: cluster.http.get(f"/adapt/{job}").json()["progress"] > 0, READY)
    assert cluster.http.delete(f"/adapt/{job}").json()["status"] == "cancelled"
    assert cluster.wait_job(adapt(cluster, "after")["job"], READY)["status"] == "done"
    assert cluster.http.get("/tasks/long").status_code == 404


def test_a_job_whose_process_dies_is_taken_up_again(cluster: Server) -> None:
    job = adapt(cluster, "killed", steps=100)["job"]
    wait_for(lambda: cluster.http.get(f"/adapt/{job}").json()["progress"] > 0, READY)
    before = metric(cluster, "abmll_worker_restarts_total")
    for process in ray_processes(cluster, "ray::_adapt"):
        process.kill()
    wait_for(lambda: metric(cluster, "abmll_worker_restarts_total") == before + 1, READY)
    assert cluster.wait_job(job, READY)["status"] == "done"


def test_a_replica_killed_under_load_costs_no_answer_and_changes_none(cluster: Server, server: Server) -> None:
    for each in (cluster, server):
        assert each.wait_job(adapt(each, "other", seed=5)["job"], READY)["status"] == "done"
    # Another seed each time: nothing is answered from what is known already.
    questions = [
        QUESTION | {"prompt": f"the film number {number} was a delight", "task": task, "draws": 4, "seed": seed}
        for seed in (1, 2, 3)
        for number in range(60)
        for task in ("global", "other")
    ]
    (victim, *others) = ray_processes(cluster, "ray::ServeReplica")
    assert others
    with ThreadPoolExecutor(8) as pool:
        replies = pool.map(lambda question: ask(cluster, question), questions)
        time.sleep(0.5)
        victim.kill()
        acknowledged = adapt(cluster, "meanwhile")["job"]
        replied = list(replies)
    assert Counter(status for status, _ in replied) == {200: len(questions)}
    for question, (_, probabilities) in zip(questions, replied, strict=True):
        assert probabilities == pytest.approx(ask(server, question)[1], abs=1e-4)
    assert cluster.wait_job(acknowledged, READY)["status"] == "done"
    wait_for(lambda: len(ray_processes(cluster, "ray::ServeReplica")) == 2, READY)
    assert metric(cluster, "abmll_engine_restarts_total") == 0
    assert cluster.http.get("/readyz").status_code == 200


def ask(server: Server, question: dict[str, Any]) -> tuple[int, list[float]]:
    with httpx.Client(base_url=server.url, timeout=120) as http:
        reply = http.post("/generate", json=question)
    return reply.status_code, reply.json().get("probabilities", [])


def test_a_killed_server_takes_its_cluster_along_and_the_next_goes_on_with_more_replicas_as_questions_queue(
    cluster: Server, start_cluster: Callable[..., Server], at_the_end: Callable[[Callable[[], None]], None]
) -> None:
    job = adapt(cluster, "begun", steps=1000)["job"]
    wait_for(lambda: cluster.http.get(f"/adapt/{job}").json()["status"] == "running", READY)
    engines, processes = ray_processes(cluster, "ray::ServeReplica"), all_processes(cluster)
    cluster.process.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    cluster.process.wait(30)
    assert len(engines) == 2
    assert_ended(engines, 30)

    server = start_cluster(replicas=1, max_replicas=2, replica_load=1.0, store=cluster.settings.store)
    assert server.http.get(f"/adapt/{job}").json()["status"] in ("queued", "running")
    assert server.http.delete(f"/adapt/{job}").json()["status"] == "cancelled"
    assert len(ray_processes(server, "ray::ServeReplica")) == 1
    stop = time.monotonic() + 120
    came = threading.Event()

    def keep_asking(worker: int) -> set[int]:
        seen, number = set[int](), 0
        while time.monotonic() < stop and not came.is_set():
            number += 1
            seen.add(ask(server, QUESTION | {"prompt": f"film {number} of {worker}", "draws": 16})[0])
        return seen

    with ThreadPoolExecutor(8) as pool:
        statuses = pool.map(keep_asking, range(8))
        wait_for(lambda: len(ray_processes(server, "ray::ServeReplica")) == 2, 120)
        came.set()
        assert set[int]().union(*statuses) == {200}
    with ends_all(server):
        assert server.stop() == 0
    # Ray's own agents wait a minute for their cluster.
    at_the_end(lambda: assert_ended(processes, max(0, killed + 90 - time.monotonic())))


@contextmanager
def ends_all(server: Server) -> Generator[None]:
    """Checks that the server's end is the end of all its processes."""
    processes = all_processes(server)
    yield
    assert_ended(processes, 90)


def test_a_cluster_that_does_not_answer_is_told(
    tiny_model_folder: Path, global_posterior: tuple[Path, StoredPosterior], tmp_path_factory: pytest.TempPathFactory
) -> None:
    with servers(tiny_model_folder, global_posterior, tmp_path_factory) as start:
        server = start(wait=False, replicas=1, ray_address="127.0.0.1:1")
        assert server.process.wait(240) == 1
        last = server.log.read_text().strip().splitlines()[-1]
        assert "no Ray cluster answers at 127.0.0.1:1" in last
        assert "--ray-address" in last
        assert "RAY_AUTH_TOKEN" in last


def test_settings_that_contradict_each_other_are_told(abmll: CommandLine) -> None:
    assert "give replicas" in abmll("serve", "--max-replicas", "3").refusal
    assert "below replicas 3" in abmll("serve", "--replicas", "3", "--max-replicas", "2").refusal
    assert "give auto, or HOST:PORT" in abmll("serve", "--ray-address", "ray://head:10001").refusal
    assert "Ray chooses the GPU" in abmll("serve", "--replicas", "2", "--adapt-device", "cuda:1").refusal
    assert "such as team-b" in abmll("serve", "--ray-application", "my engines").refusal
    assert "--adapt-resource GPU is not NAME=VALUE" in abmll("serve", "--replicas", "1", "--adapt-resource", "GPU").err


def test_few_posteriors_move_when_a_replica_comes_or_goes() -> None:
    keys = [f"posterior-{number}" for number in range(300)]
    three = {key: home(key, ["a", "b", "c"]) for key in keys}
    assert min(Counter(three.values()).values()) > 60
    four = {key: home(key, ["a", "b", "c", "d"]) for key in keys}
    moved = [key for key in keys if four[key] != three[key]]
    assert {four[key] for key in moved} == {"d"}
    two = {key: home(key, ["a", "c"]) for key in keys}
    assert all(two[key] == three[key] for key in keys if three[key] != "b")


def test_resources_of_an_adaptation_are_as_the_operator_says() -> None:
    assert adaptation_resources(Settings(replicas=1)) == {"num_cpus": 1, "num_gpus": 0.0, "resources": {}}
    on_gpu = Settings(replicas=1, adapt_device="cuda", adapt_resources={"GPU": 0.5, "teach": 1})
    assert adaptation_resources(on_gpu) == {"num_cpus": 1, "num_gpus": 0.5, "resources": {"teach": 1.0}}
