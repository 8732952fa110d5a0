"""More than the server can do: it refuses politely, drops what nobody waits for, and stays fair."""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.server.conftest import Server, wait_for
from tests.server.test_http import EXAMPLES, QUESTION, adapt

SLOW = QUESTION | {"prompt": "play it again " * 60, "draws": 64}


def metric(server: Server, name: str) -> float:
    families = text_string_to_metric_families(server.http.get("/metrics").text)
    return sum(sample.value for family in families for sample in family.samples if sample.name == name)


@pytest.fixture(scope="module")
def small(start_server: Callable[..., Server]) -> Server:
    """A server with one place, and room for three that wait."""
    return start_server(concurrency=1, queue=3, job_queue=2, timeout=20.0, max_body=100_000)


def test_past_its_queue_the_server_says_when_to_ask_again(small: Server) -> None:
    def ask(number: int) -> httpx.Response:
        return httpx.post(f"{small.url}/generate", json=SLOW | {"seed": number}, timeout=60)

    with ThreadPoolExecutor(12) as clients:
        replies = list(clients.map(ask, range(12)))
    counts = Counter(reply.status_code for reply in replies)
    assert set(counts) == {200, 429}
    assert counts[200] >= 4
    refused = next(reply for reply in replies if reply.status_code == 429)
    assert int(refused.headers["Retry-After"]) >= 1
    assert refused.json()["error"]["type"] == "Overloaded"
    assert metric(small, "abmll_refused_total") >= counts[429]
    assert small.http.post("/generate", json=QUESTION).status_code == 200


def test_a_question_that_takes_too_long_is_given_up(small: Server) -> None:
    begun = time.monotonic()
    late = small.http.post("/generate", json=SLOW | {"timeout": 0.001, "seed": 1000})
    assert (late.status_code, late.json()["error"]["type"], late.json()["error"]["field"]) == (
        504, "DeadlineExceeded", "timeout",
    )  # fmt: skip
    assert time.monotonic() - begun < 20
    wait_for(lambda: metric(small, "abmll_inside") == 0)
    for wrong in (0, -1, "soon"):
        assert small.http.post("/generate", json=QUESTION | {"timeout": wrong}).status_code == 422


def test_a_question_asked_again_is_cheap_and_gets_the_same_answer(small: Server) -> None:
    asked = SLOW | {"seed": 2000}
    before = metric(small, "abmll_questions_again_total")
    first, *again = (small.http.post("/generate", json=asked).json() for _ in range(4))
    assert metric(small, "abmll_questions_again_total") == before + 3
    assert all(reply["probabilities"] == first["probabilities"] for reply in again)
    assert min(reply["timing"]["engine_ms"] for reply in again) < first["timing"]["engine_ms"] / 4
    other = small.http.post("/generate", json=asked | {"seed": 2001}).json()
    assert other["probabilities"] != first["probabilities"]


def test_a_client_that_goes_away_frees_its_work(small: Server) -> None:
    body = httpx.Request("POST", f"{small.url}/generate", json=SLOW | {"seed": 99}).read()
    head = (
        f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    connections: list[socket.socket] = []
    for _ in range(4):
        connection = socket.create_connection(("127.0.0.1", small.settings.port))
        connection.sendall(head.encode() + body)
        connections.append(connection)
    wait_for(lambda: metric(small, "abmll_waiting") > 0)
    for connection in connections:
        connection.close()
    wait_for(lambda: metric(small, "abmll_waiting") == metric(small, "abmll_inside") == 0)
    families = text_string_to_metric_families(small.http.get("/metrics").text)
    gone = [s for f in families for s in f.samples if s.name == "abmll_requests_total" and s.labels["status"] == "499"]
    assert sum(sample.value for sample in gone) >= 1


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_past_the_limit_is_refused(small: Server, declared: bool) -> None:
    body = b'{"prompt": "' + b"x" * 200_000 + b'"}'
    content: Any = body if declared else (body[i : i + 1000] for i in range(0, len(body), 1000))
    reply = small.http.post("/generate", content=content, headers={"Content-Type": "application/json"})
    assert reply.status_code == 413, reply.text
    assert reply.json()["error"]["type"] == "BodyTooLarge"
    assert "100000 bytes" in reply.json()["error"]["message"]
    assert small.http.post("/generate", json=QUESTION).status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", b'{"prompt": "x", "options": [' + b"1," * 40_000 + b"1]}"),
        ("/adapt", b'{"task": "q", "examples": [' + b"{}," * 30_000 + b"{}]}"),
        ("/generate", b'{"prompt": "x", "a": ' + b"[" * 400 + b"1," * 30_000 + b"1" + b"]" * 400 + b"}"),
    ],
)
def test_a_body_of_endless_values_is_refused_and_holds_nobody_up(small: Server, path: str, body: bytes) -> None:
    begun = time.monotonic()
    reply = small.http.post(path, content=body, headers={"Content-Type": "application/json"})
    assert (reply.status_code, reply.json()["error"]["type"]) == (413, "BodyTooLarge")
    assert "20000 values" in reply.json()["error"]["message"]
    assert time.monotonic() - begun < 10  # read where others are answered, it would take half a minute


def test_a_head_without_end_is_not_read_on(small: Server) -> None:
    with socket.create_connection(("127.0.0.1", small.settings.port)) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: a\r\n")
        with pytest.raises(ConnectionError):  # noqa: PT012 -- whichever of the sends meets the closed connection
            for number in range(4000):
                connection.sendall(f"x{number}: {'y' * 1000}\r\n".encode())
    assert small.http.get("/healthz").status_code == 200


def test_past_its_job_queue_the_server_refuses_jobs(small: Server) -> None:
    jobs = [adapt(small, "long", steps=1000)["job"]]
    wait_for(lambda: small.http.get(f"/adapt/{jobs[0]}").json()["status"] == "running")
    jobs += [adapt(small, f"waiting{number}", steps=1)["job"] for number in range(2)]
    refused = small.http.post("/adapt", json={"task": "one-more", "examples": EXAMPLES})
    assert (refused.status_code, refused.json()["error"]["type"]) == (429, "Overloaded")
    assert int(refused.headers["Retry-After"]) > 0
    small.http.delete(f"/adapt/{jobs[0]}")
    for job in jobs[1:]:
        assert small.wait_job(job)["status"] == "done"


def test_a_busy_task_does_not_starve_another(start_server: Callable[..., Server]) -> None:
    server = start_server(concurrency=2, queue=200, timeout=300)
    assert server.wait_job(adapt(server, "quiet", steps=1)["job"])["status"] == "done"

    def ask(task: str, seed: int) -> float:
        begun = time.perf_counter()
        reply = httpx.post(f"{server.url}/generate", json=SLOW | {"task": task, "seed": seed}, timeout=300)
        assert reply.status_code == 200, reply.text
        return time.perf_counter() - begun

    with ThreadPoolExecutor(41) as clients:
        busy = [clients.submit(ask, "global", seed) for seed in range(40)]
        wait_for(lambda: metric(server, "abmll_waiting") >= 30)
        quiet = clients.submit(ask, "quiet", 0).result()
        whole = max(future.result() for future in busy)
    # First come, first served would put it behind all forty.
    assert quiet < 0.5 * whole


def test_a_server_told_to_stop_answers_what_it_has_taken(start_server: Callable[..., Server]) -> None:
    server = start_server(concurrency=1)

    def ask(seed: int) -> int:
        return clients.post(f"{server.url}/generate", json=SLOW | {"seed": seed}).status_code

    def all_taken() -> bool:
        """Whether all are in the server, and some still wait: read in the order that they go, none counts twice."""
        done, inside = metric(server, "abmll_confidence_count"), metric(server, "abmll_inside")
        waiting = metric(server, "abmll_waiting")
        return waiting > 0 and done + inside + waiting == 8

    with ThreadPoolExecutor(8) as threads, httpx.Client(timeout=120) as clients:
        asked = [threads.submit(ask, seed) for seed in range(8)]
        wait_for(all_taken)
        assert server.stop() == 0
        assert [future.result() for future in asked] == [200] * 8
