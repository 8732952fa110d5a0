from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clients import calls
from clients.errors import (
    ApiError,
    Conflict,
    InvalidArgument,
    InvalidReply,
    NotFound,
    RequestRejected,
    ServerUnavailable,
)
from clients.examples import LabelledExample
from clients.http import Client
from tests.clients.conftest import ANSWER


def test_a_question_is_sent_with_every_field_of_the_contract():
    call = calls.generate(
        "p",
        version=2,
        task="t",
        options=("a", "b"),
        draws="auto",
        tolerance=0.1,
        seed=3,
        abstain_below=0.4,
        target_risk=None,
        max_tokens=5,
        stop=("\n",),
        temperature=0.7,
        top_p=0.9,
        samples=6,
        meaning="entailment",
        tokens=True,
        normalize="mean",
        timeout=9.0,
    )
    assert (call.method, call.path) == ("POST", "/generate")
    assert call.body == {
        "prompt": "p", "task": "t", "version": 2, "options": ["a", "b"], "draws": "auto", "tolerance": 0.1, "seed": 3,
        "abstain_below": 0.4, "target_risk": None, "max_tokens": 5, "stop": ["\n"], "temperature": 0.7, "top_p": 0.9,
        "samples": 6, "meaning": "entailment", "tokens": True, "normalize": "mean", "timeout": 9.0,
    }  # fmt: skip


def test_a_finished_answer_is_sent_with_every_field_of_the_contract():
    call = calls.score("p", "a", task="t", version=None, draws=4, seed=2, end=False, timeout=None)
    assert (call.method, call.path) == ("POST", "/score")
    assert call.body == {
        "prompt": "p", "answer": "a", "task": "t", "version": None, "draws": 4, "seed": 2, "end": False,
        "timeout": None,
    }  # fmt: skip


def test_examples_given_as_models_and_as_mappings_are_sent_alike():
    row = {"prompt": "p", "options": ["a", "b"], "answer": 1}
    as_mapping = calls.adapt("t", [row], steps=None, seed=0)
    as_model = calls.adapt("t", [LabelledExample.model_validate(row)], steps=None, seed=0)
    assert as_mapping.body == as_model.body == {"task": "t", "examples": [row], "steps": None, "seed": 0}


def test_a_frame_is_taught_as_its_records():
    rows = [{"prompt": "p", "options": ["a", "b"], "answer": 1}, {"prompt": "q", "answer": 0}]
    frame = pd.DataFrame([rows[0] | {"options": np.array(["a", "b"])}, rows[1]])
    assert (calls.adapt("t", frame, steps=None, seed=0).body or {})["examples"] == rows


@pytest.mark.parametrize(
    "examples", ["examples.jsonl", Path("examples.jsonl"), {"prompt": "p", "answer": "a"}, 3, None]
)
def test_what_is_no_list_of_examples_is_told(examples: Any):
    with pytest.raises(InvalidArgument, match=r"examples is .+; give a list of records"):
        calls.adapt("t", examples, steps=None, seed=0)
    with pytest.raises(InvalidArgument, match=r"examples\[1\] is 'p'; give {\"prompt\", \"options\", \"answer\"}"):
        calls.adapt("t", cast(Any, [{"prompt": "p", "answer": "a"}, "p"]), steps=None, seed=0)


@pytest.mark.parametrize(("name", "value"), [("tolerance", float("nan")), ("prompt", "\ud800"), ("seed", {1})])
def test_what_has_no_form_in_json_is_told(name: str, value: object):
    call = calls.score("p", "a", task="t", version=None, draws=4, seed=2, end=False, timeout=None)
    with pytest.raises(InvalidArgument, match="POST /score: an argument has no form in JSON"):
        calls.request_of(replace(call, body={name: value}))


def test_one_text_is_no_list_of_options():
    with Client("http://127.0.0.1:1") as client:
        with pytest.raises(InvalidArgument, match="options is the one text 'ab'; give a list"):
            client.generate("p", options="ab")
        with pytest.raises(InvalidArgument, match="stop is the one text"):
            client.generate("p", stop="END")


@given(st.text(min_size=1).filter(lambda name: not any(0xD800 <= ord(c) <= 0xDFFF for c in name)))
def test_a_task_name_stays_one_segment_of_the_path(name: str):
    path = calls.task(name).path
    assert path.startswith("/tasks/")
    assert not set(path[len("/tasks/") :]) & set("/?# ")


def test_fields_that_a_newer_server_adds_are_kept():
    answer = calls.read(
        calls.generate(
            "p",
            task="t",
            version=None,
            options=None,
            draws=1,
            tolerance=0.1,
            seed=0,
            abstain_below=None,
            target_risk=None,
            max_tokens=1,
            stop=(),
            temperature=0.0,
            top_p=1.0,
            samples=0,
            meaning="normalized",
            tokens=False,
            normalize="sum",
            timeout=None,
        ),
        200,
        json.dumps(ANSWER | {"novelty": 7}),
    )
    assert answer.confidence == 0.9
    assert answer.model_extra == {"novelty": 7}


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, RequestRejected),
        (404, NotFound),
        (409, Conflict),
        (413, RequestRejected),
        (422, RequestRejected),
        (429, ServerUnavailable),
        (500, ApiError),
        (503, ServerUnavailable),
    ],
)
def test_a_status_becomes_its_kind_of_error_with_the_servers_words(status: int, kind: type[ApiError]):
    body = json.dumps({"error": {"type": "Kind", "message": "say it so", "field": "options"}})
    with pytest.raises(ApiError, match="say it so") as caught:
        calls.read(calls.tasks(), status, body)
    assert type(caught.value) is kind
    assert (caught.value.status, caught.value.type, caught.value.field) == (status, "Kind", "options")
    assert caught.value.retry_after is None


@pytest.mark.parametrize("body", ["<html>Bad gateway</html>", "", "[]", '{"detail": "no"}', '{"error": "no"}'])
def test_an_error_without_our_form_is_still_an_api_error(body: str):
    with pytest.raises(ApiError, match="502") as caught:
        calls.read(calls.tasks(), 502, body)
    assert caught.value.status == 502


@pytest.mark.parametrize("body", ["<html>", "", "{}", '{"job": 1}', '[{"status": "ready"}]'])
def test_a_reply_that_breaks_the_contract_is_an_invalid_reply(body: str):
    with pytest.raises(InvalidReply, match="GET /tasks"):
        calls.read(calls.tasks(), 200, body)


def test_a_deletion_has_no_content():
    assert calls.read(calls.delete_task("t"), 204, "") is None
    assert calls.read(calls.delete_version("t", 1), 204, "") is None


@pytest.mark.parametrize(("header", "seconds"), [("7", 7), ("soon", None), (None, None)])
def test_an_error_says_when_to_ask_again(header: str | None, seconds: int | None):
    for body in ('{"error": {"type": "Overloaded", "message": "busy"}}', "<html>busy</html>"):
        with pytest.raises(ServerUnavailable) as caught:
            calls.read(calls.tasks(), 429, body, header)
        assert caught.value.retry_after == seconds
