"""Whatever comes in: no 5xx, and every reply as the OpenAPI page says."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import checks

from tests.server.conftest import Server
from tests.server.test_http import EXAMPLES, QUESTION

_QUIET = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large, HealthCheck.large_base_example]


@pytest.fixture(scope="module")
def fuzzed(start_server: Callable[..., Server]) -> Server:
    return start_server(max_draws=4, draws=2, job_queue=4, timeout=120.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "path", "examples"),
    [
        ("POST", "/generate", 400),
        ("POST", "/score", 150),
        ("POST", "/feedback", 60),
        ("POST", "/adapt", 200),
        ("GET", "/adapt", 5),
        ("GET", "/adapt/{job}", 30),
        ("DELETE", "/adapt/{job}", 30),
        ("GET", "/tasks", 5),
        ("GET", "/tasks/{name}", 30),
        ("PUT", "/tasks/{name}/serving", 60),
        ("POST", "/tasks/{name}/recalibrate", 30),
        ("DELETE", "/tasks/{name}", 30),
        ("GET", "/metrics", 3),
        ("GET", "/healthz", 3),
        ("GET", "/readyz", 3),
    ],
)
def test_every_call_keeps_its_contract(fuzzed: Server, method: str, path: str, examples: int) -> None:
    schema: Any = schemathesis.openapi.from_url(f"{fuzzed.url}/openapi.json")
    wanted = (
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_schema_conformance,
    )

    seen: set[int] = set()

    @settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=_QUIET,
        database=None,
        phases=[Phase.generate],
        derandomize=True,
    )
    @given(case=schema[path][method].as_strategy())
    def ask(case: Any) -> None:
        reply = case.call_and_validate(checks=wanted)
        seen.add(reply.status_code)
        hurried = isinstance(case.body, dict) and (case.body.get("timeout") or 999) < 120
        assert reply.status_code < 500 or (hurried and reply.status_code == 504), reply.text

    ask()
    assert path != "/generate" or {200, 404, 422} <= seen, "what is sent does not reach the engine"
    assert fuzzed.http.post("/generate", json=QUESTION).status_code == 200


def test_a_stream_keeps_its_contract(fuzzed: Server) -> None:
    schema: Any = schemathesis.openapi.from_url(f"{fuzzed.url}/openapi.json")
    for fields in ({"max_tokens": 4}, {"options": ["a", "b"]}, {"max_tokens": 200, "timeout": 0.1}):
        case = schema["/generate"]["POST"].Case(body={"prompt": "p", "stream": True} | fields)
        reply = case.call_and_validate(checks=(checks.content_type_conformance, checks.response_schema_conformance))
        assert reply.status_code in (200, 504)


def send(server: Server, path: str, body: bytes, content_type: str = "application/json") -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.settings.port, timeout=60)
    try:
        connection.request("POST", path, body, {"Content-Type": content_type})
        reply = connection.getresponse()
        return reply.status, json.loads(reply.read())
    finally:
        connection.close()


def question(**fields: Any) -> bytes:
    return json.dumps(QUESTION | fields).encode()


# What is sent, and the statuses that are right.
HOSTILE: dict[str, tuple[bytes, set[int]]] = {
    "10 MB prompt": (question(prompt="x" * 10_000_000), {413, 422}),
    "prompt at the limit of characters": (question(prompt="x" * 200_000), {413}),
    "20 MB body": (question(prompt="x" * 20_000_000), {413}),
    "NUL": (question(prompt="a\0b", options=["\0", "x\0"]), {200}),
    "lone surrogate in the prompt": (question(prompt="\ud800"), {422}),
    "lone surrogate in an option": (question(options=["a", "\udfff"]), {422}),
    "lone surrogate in the task": (question(task="\ud800"), {404, 422}),
    "surrogate as bytes": (b'{"prompt": "\xed\xa0\x80", "options": ["a", "b"]}', {400, 422}),
    "bytes that are no UTF-8": (b'{"prompt": "\xff\xfe", "options": ["a", "b"]}', {400}),
    "right to left": (
        question(prompt="\u202eabc \u05e9\u05dc\u05d5\u05dd", options=["\u0646\u0639\u0645", "\u0644\u0627"]),
        {200},
    ),
    "10,000 options": (question(options=[str(i) for i in range(10_000)]), {422}),
    "no options": (question(options=[]), {422}),
    "one option": (question(options=["a"]), {422}),
    "the same option twice": (question(options=["a", "a"]), {422}),
    "blank options": (question(options=["", " "]), {422}),
    "options that differ in a space alone": (question(options=["a", "a "]), {200, 422}),
    "NaN": (b'{"prompt": "x", "options": ["a", "b"], "tolerance": NaN}', {400, 422}),
    "infinity": (b'{"prompt": "x", "options": ["a", "b"], "timeout": Infinity}', {400, 422}),
    "1e999": (b'{"prompt": "x", "options": ["a", "b"], "tolerance": 1e999}', {400, 422}),
    "a seed of 5,000 digits": (b'{"prompt": "x", "options": ["a", "b"], "seed": ' + b"9" * 5000 + b"}", {400, 422}),
    "deep nesting": (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", {400, 422}),
    "nesting never closed": (b'{"a":' * 50_000, {400, 422}),
    "a field twice": (b'{"prompt": "x", "prompt": "y", "options": ["a", "b"]}', {200, 422}),
    "true for a number": (question(seed=True), {422}),
    "2 ** 63 draws": (question(draws=2**63), {422}),
    "no body": (b"", {422}),
    "null": (b"null", {422}),
    "a list": (b"[1]", {422}),
    "blank prompt": (question(prompt=" \n\t\u200b\u3000"), {200, 422}),
    "task of a path": (question(task="../../etc/passwd"), {404}),
    "task of a hidden folder": (question(task=".deleted.x"), {404}),
    "task with a NUL": (question(task="a\0"), {404}),
    "byte order mark": (b"\xef\xbb\xbf" + question(), {200, 400, 422}),
    "UTF-16": (question().decode().encode("utf-16"), {200, 400, 422}),
    "control characters": (question(prompt="".join(map(chr, range(1, 32)))), {200}),
    "combining marks": (question(prompt="z" + "\u0301" * 100), {200, 413}),
    "special tokens": (question(prompt="<|begin_of_text|><|endoftext|></s><s>[PAD]", options=["</s>", "<s>"]), {200}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_questions_get_a_clear_reply(fuzzed: Server, name: str) -> None:
    body, expected = HOSTILE[name]
    status, reply = send(fuzzed, "/generate", body)
    assert status in expected, reply
    if status != 200:
        assert reply["error"]["message"]
        assert len(json.dumps(reply)) < 2000, "the reply repeats what was sent"
    assert send(fuzzed, "/generate", question())[0] == 200


@pytest.mark.parametrize(
    "examples",
    [
        [],
        EXAMPLES * 1000,
        [{"prompt": "\ud800", "options": ["a", "b"], "answer": "a"}],
        [{"prompt": "x", "options": ["a", "b"], "answer": 10**30}],
        [{"prompt": "x", "options": ["a", "b"], "answer": float("nan")}],
        [{"prompt": "x" * 100_000, "options": ["a", "b"], "answer": "a"}],
        [{"prompt": "x", "options": [str(i) for i in range(10_000)], "answer": "1"}],
        [[]],
        "examples",
    ],
)
def test_hostile_examples_make_no_job(fuzzed: Server, examples: Any) -> None:
    status, reply = send(fuzzed, "/adapt", json.dumps({"task": "hostile", "examples": examples}).encode())
    assert status in (400, 413, 422), reply
    assert len(json.dumps(reply)) < 2000
    assert not any(job["task"] == "hostile" for job in fuzzed.http.get("/adapt").json())


@pytest.mark.parametrize(
    "name", ["../x", "..", ".", "a/b", "/etc", "a\\b", "A", "", "a" * 65, "con\0", ".hidden", "\ud800", "é"]
)
def test_no_task_is_made_outside_its_folder(fuzzed: Server, name: str) -> None:
    status, reply = send(fuzzed, "/adapt", json.dumps({"task": name, "examples": EXAMPLES}).encode())
    assert status == 422, reply
    assert reply["error"]["field"] == "task"


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_other_content_types_are_refused(fuzzed: Server, content_type: str) -> None:
    assert send(fuzzed, "/generate", question(), content_type)[0] in (415, 422)


@settings(max_examples=150, suppress_health_check=_QUIET, database=None)
@given(
    prompt=st.text(min_size=1, max_size=60).filter(str.strip),
    options=st.lists(st.text(min_size=1, max_size=8).filter(str.strip), min_size=2, max_size=5, unique_by=str.strip),
)
def test_any_text_gets_a_distribution(fuzzed: Server, prompt: str, options: list[str]) -> None:
    status, reply = send(fuzzed, "/generate", question(prompt=prompt, options=options))
    if status == 200:
        assert reply["options"] == options
        assert abs(sum(reply["probabilities"]) - 1) < 1e-6
    else:
        assert status in (413, 422), reply
