"""The HTTP contract, over a real server process."""

from __future__ import annotations

import json
import math
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from abmll.entailment import ENTAILS, entailment_prompt
from abmll.meanings import normalized
from abmll.store import StoredPosterior
from tests.server.conftest import Server, wait_for

QUESTION = {"prompt": "the film was a delight", "options": ["positive", "negative", "neutral"]}
EXAMPLES = [
    {"prompt": "the film was a delight", "options": ["positive", "negative"], "answer": "positive"},
    {"prompt": "two hours that i will not get back", "options": ["positive", "negative"], "answer": 1},
    {"prompt": "i would see it again", "options": ["positive", "negative"], "answer": 0},
    {"prompt": "not the band", "options": ["positive", "negative"], "answer": "negative"},
]


def without_times(reply: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in reply.items() if key not in ("request_id", "timing")}


def adapt(server: Server, task: str, **fields: Any) -> dict[str, Any]:
    reply = server.http.post("/adapt", json={"task": task, "examples": EXAMPLES, **fields})
    assert reply.status_code == 202, reply.text
    return reply.json()


def test_options_get_a_distribution_an_answer_and_its_uncertainty(
    server: Server, global_posterior: tuple[Path, StoredPosterior]
) -> None:
    response = server.http.post("/generate", json=QUESTION)
    assert response.status_code == 200, response.text
    reply = response.json()
    assert reply["answer"] == QUESTION["options"][reply["answer_index"]]
    assert math.isclose(sum(reply["probabilities"]), 1.0, abs_tol=1e-9)
    assert reply["confidence"] == max(reply["probabilities"])
    uncertainty = reply["uncertainty"]
    assert math.isclose(uncertainty["total"], uncertainty["aleatoric"] + uncertainty["epistemic"], abs_tol=1e-9)
    assert 0 < uncertainty["epistemic"] < uncertainty["total"] <= math.log(3) + 1e-9
    assert reply["calibrated"]
    assert reply["confidence"] < reply["raw_confidence"]  # temperature 2 at no shots
    assert reply["answer"] in reply["prediction_set"]
    assert reply["posterior"] == {"id": global_posterior[1].digest, "version": 1, "task": "global"}
    assert 2 <= reply["draws"] <= 8
    timing = reply["timing"]
    assert 0 <= timing["queue_ms"] <= timing["engine_ms"] <= timing["total_ms"]
    assert response.headers["X-Request-ID"] == reply["request_id"]


def test_the_same_seed_gives_the_same_reply_and_another_seed_another(server: Server) -> None:
    first, again, other = (
        without_times(server.http.post("/generate", json={**QUESTION, "seed": seed}).json()) for seed in (5, 5, 6)
    )
    assert first == again
    assert first["probabilities"] != other["probabilities"]


def test_draws_go_on_until_they_settle_the_answer(server: Server) -> None:
    def ask(**fields: Any) -> dict[str, Any]:
        return without_times(server.http.post("/generate", json=QUESTION | fields).json())

    whole, few, usual = ask(draws=8), ask(tolerance=0.3), ask()
    assert ask(tolerance=0) | {"request_id": None} == whole | {"request_id": None}
    assert few["draws"] < 8
    for reply in (few, usual):
        assert abs(reply["confidence"] - whole["confidence"]) <= (0.3 if reply is few else 0.02)
        assert reply["probabilities"] == pytest.approx(ask(draws=reply["draws"])["probabilities"], abs=1e-6)
    assert server.http.post("/generate", json=QUESTION | {"tolerance": -0.1}).json()["error"]["field"] == "tolerance"


def test_the_order_of_options_does_not_matter(server: Server) -> None:
    forward = server.http.post("/generate", json=QUESTION).json()
    reverse = server.http.post("/generate", json={**QUESTION, "options": QUESTION["options"][::-1]}).json()
    assert reverse["probabilities"][::-1] == pytest.approx(forward["probabilities"], abs=1e-5)


def test_calibration_is_applied_to_scores_as_trained_alone(server: Server) -> None:
    question = QUESTION | {"options": ["positive", "two hours that i will not get back"]}
    trained, mean, whole = (
        server.http.post("/generate", json=question | {"normalize": normalize}).json()
        for normalize in (None, "mean", "sum")
    )
    assert trained["calibrated"]
    assert trained["probabilities"] == mean["probabilities"]
    assert not whole["calibrated"]
    assert whole["prediction_set"] is None
    assert whole["confidence"] == whole["raw_confidence"] != trained["raw_confidence"]


def test_the_docs_page_needs_nothing_from_elsewhere(server: Server) -> None:
    page = server.http.get("/docs").text
    assert server.http.get(re.findall(r'<script src="(/[^"]+)"', page)[0]).status_code == 200
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', page)


def test_free_text_has_a_confidence_but_no_probabilities(server: Server) -> None:
    request = {"prompt": "please set an alarm", "max_tokens": 5}
    reply = server.http.post("/generate", json=request).json()
    assert reply["probabilities"] is reply["answer_index"] is reply["options"] is reply["prediction_set"] is None
    assert not reply["calibrated"]  # five tokens are not the whole text
    assert 0 < reply["raw_confidence"] <= reply["confidence"] <= 1
    assert reply["uncertainty"]["epistemic"] >= 0
    assert without_times(reply) == without_times(server.http.post("/generate", json=request).json())


def test_a_free_text_is_told_token_by_token_where_it_is_asked_for(server: Server) -> None:
    request = {"prompt": "please set an alarm", "max_tokens": 5}
    plain = server.http.post("/generate", json=request).json()
    told = server.http.post("/generate", json=request | {"tokens": True}).json()
    assert plain["tokens"] is None
    assert without_times(plain) == without_times(told | {"tokens": None})
    tokens = told["tokens"]
    assert "".join(token["text"] for token in tokens).strip() == told["answer"]
    assert math.prod(token["probability"] for token in tokens) == pytest.approx(told["raw_confidence"])
    for token in tokens:
        parts = token["uncertainty"]
        assert parts["total"] == pytest.approx(parts["aleatoric"] + parts["epistemic"])
        ordered = [other["probability"] for other in token["likeliest"]]
        assert ordered == sorted(ordered, reverse=True)
        assert ordered[0] + 1e-6 >= token["probability"]


def test_samples_tell_whether_the_model_agrees_with_itself(server: Server) -> None:
    request = {"prompt": "please set an alarm", "max_tokens": 3, "samples": 6, "draws": 4}
    reply = server.http.post("/generate", json=request).json()
    found = reply["semantics"]
    assert sum(meaning["samples"] for meaning in found["meanings"]) == 6
    probabilities = [meaning["probability"] for meaning in found["meanings"]]
    assert probabilities == sorted(probabilities, reverse=True)
    assert sum(probabilities) + found["unseen"] == pytest.approx(1)
    assert found["answer_probability"] == pytest.approx(reply["raw_confidence"], rel=1e-3)  # no other wording of it
    own = next(m for m in found["meanings"] if normalized(m["answer"]) == normalized(reply["answer"]))
    assert own["probability"] == pytest.approx(found["answer_probability"])
    assert own["samples"] / 6 == found["consistency"]
    split = found["uncertainty"]
    assert split["total"] == pytest.approx(split["aleatoric"] + split["epistemic"])
    assert 0 < split["total"] <= math.log(len(probabilities) + 1) + 1e-9
    assert without_times(server.http.post("/generate", json=request).json()) == without_times(reply)
    greedy = server.http.post("/generate", json=request | {"samples": 0}).json()
    assert greedy["semantics"] is None
    assert greedy["answer"] == reply["answer"]
    assert greedy["confidence"] == pytest.approx(reply["confidence"], abs=1e-6)

    warm = {"prompt": "please set an alarm", "max_tokens": 8, "temperature": 1.5, "top_p": 0.9}
    said = [server.http.post("/generate", json=warm | {"seed": seed}).json()["answer"] for seed in (1, 1, 2)]
    assert said[0] == said[1] != said[2]


def test_meanings_that_the_model_finds_to_entail_each_other_are_one(server: Server) -> None:
    request = {"prompt": "please set an alarm", "max_tokens": 2, "samples": 6, "draws": 4}
    apart = server.http.post("/generate", json=request).json()["semantics"]
    joined = server.http.post("/generate", json=request | {"meaning": "entailment"}).json()["semantics"]
    assert len(apart["meanings"]) > 1

    def entails(first: str, second: str) -> bool:
        asked = {"prompt": entailment_prompt("please set an alarm", first, second), "options": ENTAILS, "draws": 2}
        return server.http.post("/generate", json=asked).json()["answer"] == "yes"

    kept: list[str] = []
    greedy = server.http.post("/generate", json=request).json()["answer"]
    assert joined["unseen"] == pytest.approx(apart["unseen"], abs=1e-6)
    assert sum(meaning["samples"] for meaning in joined["meanings"]) == 6
    texts = sorted((m["answer"] for m in apart["meanings"]), key=lambda text: text != greedy)
    for text in texts:
        if not any(entails(other, text) and entails(text, other) for other in kept):
            kept.append(text)
    assert len(joined["meanings"]) == len(kept)


def test_a_free_text_ends_before_a_stop_string(server: Server) -> None:
    request = {"prompt": "please set an alarm", "max_tokens": 12, "tokens": True}
    whole = server.http.post("/generate", json=request).json()
    told = "".join(token["text"] for token in whole["tokens"])
    middle = len(told) // 2
    stop = told[middle : middle + 3]
    cut = server.http.post("/generate", json=request | {"stop": ["never said", stop]}).json()
    assert cut["answer"] == told[: told.index(stop)].strip()
    count = len(cut["tokens"])
    assert stop in "".join(token["text"] for token in cut["tokens"])
    assert stop not in "".join(token["text"] for token in cut["tokens"][:-1])
    assert count < len(whole["tokens"])
    for ours, theirs in zip(cut["tokens"], whole["tokens"][:count], strict=True):
        assert ours["probability"] == pytest.approx(theirs["probability"], rel=1e-3)
    assert without_times(
        server.http.post("/generate", json=request | {"stop": ["never said"]}).json()
    ) == without_times(whole)


def test_a_finished_answer_is_scored_whole_and_token_by_token(server: Server) -> None:
    request = {"prompt": QUESTION["prompt"], "answer": QUESTION["options"][0], "draws": 4, "end": False}
    reply = server.http.post("/score", json=request).json()
    assert not reply["calibrated"]
    assert reply["answer"] == request["answer"]
    assert reply["draws"] == 4
    assert reply["options"] is reply["probabilities"] is None
    assert "".join(token["text"] for token in reply["tokens"]).strip() == request["answer"]
    assert math.prod(token["probability"] for token in reply["tokens"]) == pytest.approx(reply["raw_confidence"])
    assert 0 < reply["raw_confidence"] <= reply["confidence"] <= 1
    assert without_times(reply) == without_times(server.http.post("/score", json=request).json())
    other = server.http.post("/score", json=request | {"prompt": "something else"}).json()
    assert other["raw_confidence"] != reply["raw_confidence"]
    whole = server.http.post("/score", json=request | {"end": True}).json()
    assert [token["text"] for token in whole["tokens"]] == [token["text"] for token in reply["tokens"]] + [""]
    p = whole["raw_confidence"]
    assert p == pytest.approx(reply["raw_confidence"] * whole["tokens"][-1]["probability"], rel=1e-3)
    assert not whole["calibrated"]  # the model would have said something else
    assert whole["confidence"] == pytest.approx(1 / (1 + math.exp(-0.25 * math.log(p / (1 - p)) - 1)), rel=1e-4)


@pytest.mark.parametrize(
    ("change", "status", "field"),
    [
        ({"answer": " "}, 422, "answer"),
        ({"answer": 3}, 422, "answer"),
        ({"end": "no"}, 422, "end"),
        ({"prompt": ""}, 422, "prompt"),
        ({"draws": 0}, 422, "draws"),
        ({"options": ["a", "b"]}, 422, "options"),
        ({"task": "films"}, 404, "task"),
        ({"answer": "a b " * 400}, 413, "answer"),
        ({"prompt": "a b " * 400}, 413, "prompt"),
    ],
)
def test_an_answer_that_cannot_be_scored_is_refused_with_the_reason(
    server: Server, change: dict[str, Any], status: int, field: str
) -> None:
    reply = server.http.post("/score", json={"prompt": "q", "answer": "a"} | change)
    assert reply.status_code == status
    error = reply.json()["error"]
    assert error["message"]
    assert error["field"] == field


def test_an_answer_that_is_not_sure_enough_is_withheld_with_the_reason_and_the_candidates(server: Server) -> None:
    def ask(**fields: Any) -> dict[str, Any]:
        return without_times(server.http.post("/generate", json=QUESTION | fields).json())

    plain = ask()
    assert plain["abstained"] is None
    own = plain["confidence"]
    assert ask(abstain_below=own) == ask(abstain_below=own / 2) == ask(target_risk=0.6) == plain
    for fields in ({"abstain_below": (1 + own) / 2}, {"target_risk": 0.2}):
        withheld = ask(**fields)
        said = withheld.pop("abstained")
        assert withheld | {"answer": plain["answer"], "answer_index": plain["answer_index"], "abstained": None} == plain
        assert withheld["answer"] is withheld["answer_index"] is None
        assert said["threshold"] > own
        assert f"{math.floor(1000 * own) / 10:g} %" in said["reason"]
        ordered = sorted(plain["probabilities"], reverse=True)
        assert [candidate["probability"] for candidate in said["candidates"]] == ordered
        assert said["candidates"][0]["answer"] == plain["answer"]
    text = {"prompt": "please set an alarm", "max_tokens": 3}
    answer = server.http.post("/generate", json=text).json()
    nothing = server.http.post("/generate", json=text | {"abstain_below": 1}).json()
    assert nothing["answer"] is None
    assert nothing["abstained"]["candidates"][0]["answer"] == answer["answer"]
    assert 'abmll_abstained_total{kind="options"} ' in server.http.get("/metrics").text


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"target_risk": 0.1}, "0.2 or more"),
        ({"target_risk": 0.3, "abstain_below": 0.5}, "give one"),
        ({"target_risk": 0.3, "options": None, "temperature": 0.5}, "likeliest text"),
        ({"target_risk": 0.3, "options": None, "stop": ["."]}, "likeliest text"),
        ({"target_risk": 0.3, "normalize": "sum"}, "abstain_below"),
    ],
)
def test_a_risk_that_cannot_be_promised_is_refused(server: Server, fields: dict[str, Any], told: str) -> None:
    reply = server.http.post("/generate", json=QUESTION | fields)
    assert reply.status_code == 422, reply.text
    assert reply.json()["error"]["field"] == "target_risk"
    assert told in reply.json()["error"]["message"]


GENERATE_ERRORS: list[tuple[dict[str, Any], int, str, str | None]] = [
    ({"prompt": ""}, 422, "InvalidRequest", "prompt"),
    ({"prompt": " \n"}, 422, "InvalidRequest", "prompt"),
    ({}, 422, "InvalidRequest", "prompt"),
    ({"prompt": 3}, 422, "InvalidRequest", "prompt"),
    ({"prompt": "\ud800"}, 422, "InvalidRequest", "prompt"),
    ({"prompt": "a b " * 400, "options": ["a", "b"]}, 413, "PromptTooLong", "prompt"),
    ({"prompt": "a b " * 20_000, "options": ["a", "b"]}, 413, "PromptTooLong", "prompt"),
    ({"prompt": "q", "options": []}, 422, "InvalidRequest", "options"),
    ({"prompt": "q", "stop": [""]}, 422, "InvalidRequest", "stop[0]"),
    ({"prompt": "q", "stop": ["x"] * 9}, 422, "InvalidRequest", "stop"),
    ({"prompt": "q", "abstain_below": 1.5}, 422, "InvalidRequest", "abstain_below"),
    ({"prompt": "q", "target_risk": 0}, 422, "InvalidRequest", "target_risk"),
    ({"prompt": "q", "options": ["one"]}, 422, "InvalidRequest", "options"),
    ({"prompt": "q", "options": ["a", "b ", "a"]}, 422, "InvalidRequest", "options[2]"),
    ({"prompt": "q", "options": ["a", " "]}, 422, "InvalidRequest", "options[1]"),
    ({"prompt": "q", "options": ["a", 3]}, 422, "InvalidRequest", "options[1]"),
    ({"prompt": "q", "options": "a"}, 422, "InvalidRequest", "options"),
    ({"prompt": "q", "options": [str(i) for i in range(65)]}, 422, "InvalidRequest", "options"),
    ({"prompt": "q", "task": "films"}, 404, "TaskNotFound", "task"),
    ({"prompt": "q", "task": "../global"}, 404, "TaskNotFound", "task"),
    ({"prompt": "q", "draws": 0}, 422, "InvalidRequest", "draws"),
    ({"prompt": "q", "draws": 65}, 422, "InvalidRequest", "draws"),
    ({"prompt": "q", "draws": "many"}, 422, "InvalidRequest", "draws"),
    ({"prompt": "q", "draws": True}, 422, "InvalidRequest", "draws"),
    ({"prompt": "q", "seed": -1}, 422, "InvalidRequest", "seed"),
    ({"prompt": "q", "max_tokens": 0}, 422, "InvalidRequest", "max_tokens"),
    ({"prompt": "q", "temperature": -0.1}, 422, "InvalidRequest", "temperature"),
    ({"prompt": "q", "top_p": 0.0}, 422, "InvalidRequest", "top_p"),
    ({"prompt": "q", "samples": 33}, 422, "InvalidRequest", "samples"),
    ({"prompt": "q", "meaning": "entailment"}, 422, "InvalidRequest", "meaning"),
    ({"prompt": "q", "meaning": "same"}, 422, "InvalidRequest", "meaning"),
    ({"prompt": "q", "stream": 1}, 422, "InvalidRequest", "stream"),
    ({"prompt": "q", "stream": True, "abstain_below": 0.5}, 422, "InvalidRequest", "stream"),
    (QUESTION | {"meaning": "entailment"}, 422, "InvalidRequest", "meaning"),
    (QUESTION | {"temperature": 0.5}, 422, "InvalidRequest", "temperature"),
    (QUESTION | {"top_p": 0.5}, 422, "InvalidRequest", "top_p"),
    (QUESTION | {"samples": 2}, 422, "InvalidRequest", "samples"),
    ({"prompt": "q", "max_tokens": 513}, 422, "InvalidRequest", "max_tokens"),
    ({"prompt": "q", "max_tokens": 300}, 422, "InvalidRequest", "max_tokens"),
    ({"prompt": "q", "normalize": "max"}, 422, "InvalidRequest", "normalize"),
    ({"prompt": "q", "creativity": 1.0}, 422, "InvalidRequest", "creativity"),
]


@pytest.mark.parametrize(("body", "status", "kind", "field"), GENERATE_ERRORS)
def test_questions_that_cannot_be_answered(
    server: Server, body: dict[str, Any], status: int, kind: str, field: str | None
) -> None:
    response = server.http.post("/generate", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert (error["type"], error["field"]) == (kind, field)
    assert error["message"]


def example(**changes: Any) -> dict[str, Any]:
    return {"prompt": "p", "options": ["a", "b"], "answer": "a"} | changes


ADAPT_ERRORS: list[tuple[dict[str, Any], int, str, str | None]] = [
    ({"task": "t", "examples": []}, 422, "InvalidExamples", "examples"),
    ({"task": "t", "examples": [example()] * 65}, 422, "InvalidExamples", "examples"),
    ({"task": "t"}, 422, "InvalidExamples", "examples"),
    ({"task": "t", "examples": [example(), example(answer="c")]}, 422, "InvalidExamples", "examples[1].answer"),
    ({"task": "t", "examples": [example(answer=2)]}, 422, "InvalidExamples", "examples[0].answer"),
    ({"task": "t", "examples": [example(answer=-1)]}, 422, "InvalidExamples", "examples[0].answer"),
    ({"task": "t", "examples": [example(answer=1.5)]}, 422, "InvalidExamples", "examples[0].answer"),
    ({"task": "t", "examples": [example(answer=None)]}, 422, "InvalidExamples", "examples[0].answer"),
    ({"task": "t", "examples": [example(answer=True)]}, 422, "InvalidExamples", "examples[0].answer"),
    ({"task": "t", "examples": [example(options=["a"])]}, 422, "InvalidExamples", "examples[0].options"),
    ({"task": "t", "examples": [example(options=["a", "a"])]}, 422, "InvalidExamples", "examples[0].options[1]"),
    ({"task": "t", "examples": [example(prompt=" ")]}, 422, "InvalidExamples", "examples[0].prompt"),
    ({"task": "t", "examples": [example(label=1)]}, 422, "InvalidExamples", "examples[0].label"),
    ({"task": "t", "examples": [{"prompt": "p"}]}, 422, "InvalidExamples", "examples[0].answer"),
    ({"task": "t", "examples": ["p"]}, 422, "InvalidExamples", "examples[0]"),
    ({"task": "t", "examples": [example(prompt="a b " * 400)]}, 413, "PromptTooLong", "examples[0].prompt"),
    ({"task": "global", "examples": [example()]}, 422, "InvalidRequest", "task"),
    ({"task": "Films", "examples": [example()]}, 422, "InvalidRequest", "task"),
    ({"task": "../x", "examples": [example()]}, 422, "InvalidRequest", "task"),
    ({"task": "", "examples": [example()]}, 422, "InvalidRequest", "task"),
    ({"task": "a" * 65, "examples": [example()]}, 422, "InvalidRequest", "task"),
    ({"task": "t", "examples": [example()], "steps": 0}, 422, "InvalidRequest", "steps"),
    ({"task": "t", "examples": [example()], "steps": 1001}, 422, "InvalidRequest", "steps"),
]


@pytest.mark.parametrize(("body", "status", "kind", "field"), ADAPT_ERRORS)
def test_examples_that_cannot_be_learnt_from(
    server: Server, body: dict[str, Any], status: int, kind: str, field: str | None
) -> None:
    response = server.http.post("/adapt", json=body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert (error["type"], error["field"]) == (kind, field)
    assert "t" not in [task["task"] for task in server.http.get("/tasks").json()]


@pytest.mark.parametrize(
    ("content", "why"),
    [(b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "5000 digits"), (b"[" * 100_000, "recursion")],
    ids=["digits", "depth"],
)
def test_why_json_cannot_be_read_is_told(server: Server, content: bytes, why: str) -> None:
    response = server.http.post("/generate", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith("the body cannot be read as JSON: ")
    assert why in response.text


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "kind"),
    [
        ("POST", "/generate", b'{"prompt": ', 400, "MalformedJSON"),
        ("POST", "/generate", b"[1]", 422, "InvalidRequest"),
        ("POST", "/generate", b"", 422, "InvalidRequest"),
        ("POST", "/generate", b'"\xff"', 400, "MalformedJSON"),
        ("GET", "/generate", None, 405, "MethodNotAllowed"),
        ("GET", "/nowhere", None, 404, "NotFound"),
        ("GET", "/adapt/nojob", None, 404, "JobNotFound"),
        ("DELETE", "/adapt/nojob", None, 404, "JobNotFound"),
        ("GET", "/tasks/films", None, 404, "TaskNotFound"),
        ("DELETE", "/tasks/films", None, 404, "TaskNotFound"),
        ("DELETE", "/tasks/global", None, 409, "TaskConflict"),
    ],
)
def test_every_error_has_the_same_form(
    server: Server, method: str, path: str, content: bytes | None, status: int, kind: str
) -> None:
    headers = {"Content-Type": "application/json"}
    response = server.http.request(method, path, content=content, headers=headers)
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    assert set(response.json()["error"]) == {"type", "message", "field"}
    assert response.json()["error"]["type"] == kind


def test_an_unknown_tasks_error_names_the_known_ones(server: Server) -> None:
    reply = server.http.post("/generate", json={"prompt": "q", "task": "films"}).json()
    assert "global" in reply["error"]["message"]


def test_a_task_is_learnt_asked_listed_and_deleted(
    server: Server, global_posterior: tuple[Path, StoredPosterior]
) -> None:
    job = adapt(server, "films")
    assert job["status"] in ("queued", "running")
    done = server.wait_job(job["job"])
    assert done["status"] == "done", done
    assert done["progress"] == 1
    assert done["posterior"]["version"] == 1

    ask = {"prompt": "the film was a delight", "options": ["positive", "negative"], "task": "films"}
    reply = server.http.post("/generate", json=ask).json()
    before = server.http.post("/generate", json=ask | {"task": "global"}).json()
    assert reply["posterior"] == done["posterior"]
    index = ask["options"].index("positive")
    assert reply["probabilities"][index] > before["probabilities"][index]

    task = server.http.get("/tasks/films").json()
    assert task["shots"] == len(EXAMPLES)
    assert task["versions"][0]["parent"] == global_posterior[1].digest
    (entry,) = task["calibration"]["by_shots"]  # the task's own temperature, from its held-out examples
    assert (entry["shots"], entry["support"], entry["spread"]) == (len(EXAMPLES), len(EXAMPLES), 0.0)
    assert entry["temperature"] != 1.5
    assert server.http.get("/tasks").json()[0]["task"] == "global"

    again = server.wait_job(adapt(server, "films", seed=1, steps=2)["job"])
    assert again["posterior"]["version"] == 2
    assert server.http.post("/generate", json=ask).json()["posterior"]["version"] == 2
    assert [version["version"] for version in server.http.get("/tasks/films").json()["versions"]] == [1, 2]

    assert server.http.delete("/tasks/films").status_code == 204
    assert server.http.post("/generate", json=ask).status_code == 404
    assert "films" not in [entry["task"] for entry in server.http.get("/tasks").json()]

    anew = server.wait_job(adapt(server, "films", steps=1)["job"])
    reply = server.http.post("/generate", json=ask).json()
    assert reply["posterior"] == anew["posterior"]  # not the deleted task's, though folder and version are the same
    assert anew["posterior"]["version"] == 1
    assert anew["posterior"]["id"] != done["posterior"]["id"]
    server.http.delete("/tasks/films")


def test_a_task_is_taught_without_options_and_answers_in_free_text_with_a_confidence(server: Server) -> None:
    texts = [
        {"prompt": example["prompt"], "answer": "good" if at % 2 == 0 else "bad"} for at, example in enumerate(EXAMPLES)
    ]
    job = server.http.post("/adapt", json={"task": "words", "examples": texts, "steps": 60}).json()
    assert server.wait_job(job["job"])["status"] == "done"
    ask = {"prompt": EXAMPLES[0]["prompt"], "task": "words", "tokens": True}
    reply = server.http.post("/generate", json=ask).json()
    assert reply["answer"] == "good"
    assert reply["tokens"][-1]["text"] == ""  # it has learnt where an answer ends
    p = reply["raw_confidence"]
    assert math.prod(token["probability"] for token in reply["tokens"]) == pytest.approx(p)
    assert reply["calibrated"]
    assert reply["confidence"] == pytest.approx(1 / (1 + math.exp(-0.25 * math.log(p / (1 - p)) - 1)), rel=1e-4)

    calibration = server.http.get("/tasks/words").json()["calibration"]
    assert calibration["by_shots"] == []
    assert [entry["shots"] for entry in calibration["texts"]] == [len(EXAMPLES)]
    scored = server.http.post("/score", json={"prompt": ask["prompt"], "answer": "good", "task": "words"}).json()
    assert scored["raw_confidence"] == pytest.approx(p, rel=1e-3)
    assert scored["confidence"] == pytest.approx(reply["confidence"], rel=1e-3)
    assert scored["calibrated"]  # its own answer
    choice = {"prompt": ask["prompt"], "task": "words", "options": ["good", "bad"]}
    assert not server.http.post("/generate", json=choice).json()["calibrated"]

    sure = server.http.post("/generate", json=ask | {"target_risk": 0.5}).json()
    assert sure["answer"] == "good"
    unsure = server.http.post("/generate", json=ask | {"target_risk": 0.2}).json()
    assert unsure["answer"] is None
    assert unsure["abstained"]["candidates"][0]["answer"] == "good"
    for least in ({"target_risk": 0.5}, {"abstain_below": 0.01}):
        cut = server.http.post("/generate", json=ask | {"max_tokens": 1} | least).json()
        assert cut["answer"] is None
        assert "max_tokens" in cut["abstained"]["reason"]
    warm = server.http.post("/generate", json=ask | {"temperature": 0.5}).json()
    assert not warm["calibrated"]
    server.http.delete("/tasks/words")


@pytest.mark.parametrize(
    ("examples", "field", "told"),
    [
        ([EXAMPLES[0], {"prompt": "p", "answer": "good"}], "examples[1].options", "all of them options, or none"),
        ([{"prompt": "p", "answer": 1}], "examples[0].answer", "the index 1"),
        ([{"prompt": "p", "answer": " "}], "examples[0].answer", "empty"),
        ([{"prompt": "p", "answer": "a b " * 400}], "examples[0].answer", "shorten the answer"),
        ([{"prompt": "a b " * 400, "answer": "a"}], "examples[0].prompt", "shorten the prompt"),
    ],
)
def test_examples_without_options_that_cannot_teach_are_refused(
    server: Server, examples: list[dict[str, Any]], field: str, told: str
) -> None:
    reply = server.http.post("/adapt", json={"task": "words", "examples": examples})
    assert reply.status_code in (413, 422), reply.text
    assert reply.json()["error"]["field"] == field
    assert told in reply.json()["error"]["message"]


def test_the_same_examples_and_seed_make_the_same_posterior(server: Server) -> None:
    one, two = (server.wait_job(adapt(server, name, seed=3)["job"])["posterior"]["id"] for name in ("one", "two"))
    assert one == two


def test_a_job_is_cancelled_another_for_its_task_refused_and_questions_go_on(server: Server) -> None:
    def ask(_: int) -> float:
        begun = time.perf_counter()
        assert server.http.post("/generate", json=QUESTION).status_code == 200
        return time.perf_counter() - begun

    job = adapt(server, "slow", steps=1000)["job"]
    wait_for(lambda: server.http.get(f"/adapt/{job}").json()["progress"] > 0)
    with ThreadPoolExecutor(4) as clients:
        times = sorted(clients.map(ask, range(40)))
    assert server.http.get(f"/adapt/{job}").json()["status"] == "running"
    assert times[len(times) // 2] < 5.0
    conflict = server.http.post("/adapt", json={"task": "slow", "examples": EXAMPLES})
    assert (conflict.status_code, conflict.json()["error"]["type"]) == (409, "TaskConflict")

    assert server.http.delete(f"/adapt/{job}").json()["status"] == "cancelled"
    assert server.http.get("/tasks/slow").status_code == 404
    next_job = server.wait_job(adapt(server, "slow", steps=1)["job"])
    assert next_job["status"] == "done"
    assert server.http.get(f"/adapt/{job}").json()["status"] == "cancelled"
    assert job in [entry["job"] for entry in server.http.get("/adapt").json()]


def test_concurrent_clients_get_what_they_get_alone(server: Server) -> None:
    bodies = [QUESTION | {"prompt": f"play music {'again ' * (i % 7)}", "seed": i % 3} for i in range(24)]

    def ask(body: dict[str, Any]) -> list[float]:
        return server.http.post("/generate", json=body).json()["probabilities"]

    alone = [ask(body) for body in bodies]
    with ThreadPoolExecutor(12) as clients:
        for one, other in zip(alone, clients.map(ask, bodies), strict=True):
            assert one == pytest.approx(other, abs=1e-5)


def test_metrics_parse_and_count(server: Server) -> None:
    def samples() -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        text = server.http.get("/metrics").text
        families = text_string_to_metric_families(text)
        return {(s.name, tuple(sorted(s.labels.items()))): s.value for f in families for s in f.samples}

    server.http.post("/generate", json=QUESTION)
    server.http.get("/tasks/unknown-task-name")
    first = samples()
    server.http.post("/generate", json=QUESTION)
    server.http.get("/tasks/unknown-task-name")
    second = samples()
    for labels in (
        (("method", "POST"), ("route", "/generate"), ("status", "200")),
        (("method", "GET"), ("route", "/tasks/{name}"), ("status", "404")),
    ):
        assert second["abmll_requests_total", labels] == first["abmll_requests_total", labels] + 1
    options = (("kind", "options"),)
    assert second["abmll_confidence_count", options] == first["abmll_confidence_count", options] + 1
    assert second["abmll_engine_up", ()] == 1
    assert not any("unknown-task-name" in str(key) for key in second)
    for name in ("abmll_adapters_resident", "abmll_tasks", "abmll_adaptation_queued", "abmll_adapter_hits_total"):
        assert (name, ()) in second


def test_the_documentation_describes_every_route_and_error(server: Server) -> None:
    assert server.http.get("/", follow_redirects=True).status_code == 200
    document = server.http.get("/openapi.json").json()
    assert {"/generate", "/adapt", "/adapt/{job}", "/tasks", "/tasks/{name}", "/healthz", "/readyz", "/metrics"} <= set(
        document["paths"]
    )
    answers = document["paths"]["/generate"]["post"]["responses"]
    assert {"200", "404", "413", "422", "503"} <= set(answers)
    assert answers["422"]["content"]["application/json"]["schema"]["$ref"].endswith("ErrorReply")


def test_the_log_holds_no_prompt(server: Server) -> None:
    server.http.post("/generate", json=QUESTION | {"prompt": "xyzzyplugh"})
    server.http.post("/generate", json={"prompt": "xyzzyplugh", "options": ["xyzzyplugh"]})
    assert "xyzzyplugh" not in server.log.read_text()


def test_every_field_on_the_openapi_page_says_what_it_means(server: Server) -> None:
    schemas = server.http.get("/openapi.json").json()["components"]["schemas"]
    silent = [
        f"{name}.{field}"
        for name, schema in schemas.items()
        for field, told in schema.get("properties", {}).items()
        # A model that a field refers to may speak for it.
        if not (told if "description" in told else schemas[told["$ref"].split("/")[-1]]).get("description")
    ]
    assert len(schemas) > 40
    assert silent == []
    assert [name for name, schema in schemas.items() if "Attributes:" in schema.get("description", "")] == []


def test_every_error_on_the_openapi_page_is_the_one_that_is_sent(server: Server) -> None:
    schemas = server.http.get("/openapi.json").json()["components"]["schemas"]
    assert "ErrorReply" in schemas
    assert "HTTPValidationError" not in schemas
