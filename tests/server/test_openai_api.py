"""OpenAI's API, driven with the clients that people have."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from langchain_core.messages import AIMessageChunk
from langchain_openai import ChatOpenAI
from pydantic import SecretStr

from tests.server.conftest import Server
from tests.server.test_http import QUESTION, adapt
from training.settings import SEED_LIMIT

OPTIONS: Any = QUESTION["options"]
ASKED: list[Any] = [{"role": "user", "content": QUESTION["prompt"]}]
LONG: list[Any] = [{"role": "user", "content": 2 * [{"type": "text", "text": "a" * 150_000}]}]


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    assert server.wait_job(adapt(server, "openai", steps=1)["job"])["status"] == "done"
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def generate(server: Server, **fields: Any) -> dict[str, Any]:
    reply = server.http.post("/generate", json={"prompt": QUESTION["prompt"]} | fields)
    assert reply.status_code == 200, reply.text
    return reply.json()


def extra(of: Any) -> dict[str, Any]:
    return of.model_extra["abmll"]


def test_tasks_are_models(client: openai.OpenAI, server: Server) -> None:
    assert {"global", "openai"} <= {model.id for model in client.models.list()}
    task = client.models.retrieve("openai")
    assert (task.owned_by, task.object) == ("abmll", "model")
    assert task.created > 1_700_000_000
    assert client.models.retrieve("openai:1").model_extra == task.model_extra | {"parent": "openai"}  # pyright: ignore
    with pytest.raises(openai.NotFoundError, match="no model 'openai:7'"):
        client.models.retrieve("openai:7")
    with pytest.raises(openai.NotFoundError, match="no task 'nowhere'"):
        client.models.retrieve("nowhere")
    assert server.wait_job(adapt(server, "openai", steps=1)["job"])["status"] == "done"
    assert {"openai", "openai:1", "openai:2"} <= {model.id for model in client.models.list()}
    reply = client.chat.completions.create(model="openai:1", messages=ASKED, extra_body={"options": OPTIONS})
    assert extra(reply.choices[0])["posterior"]["version"] == 1


def test_a_choice_among_options_is_that_of_generate(client: openai.OpenAI, server: Server) -> None:
    own = generate(server, options=OPTIONS, task="openai")
    reply = client.chat.completions.create(
        model="openai", messages=ASKED, logprobs=True, top_logprobs=2, extra_body={"options": OPTIONS}
    )
    choice = reply.choices[0]
    assert choice.message.content == own["answer"]
    told = extra(choice)
    for name in ("confidence", "probabilities", "uncertainty", "prediction_set", "calibrated", "posterior", "draws"):
        assert told[name] == own[name], name
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    (token,) = choice.logprobs.content
    assert token.token == own["answer"]
    assert bytes(token.bytes or []).decode() == own["answer"]
    assert token.logprob == pytest.approx(math.log(own["confidence"]))
    likeliest = sorted(own["probabilities"], reverse=True)[:2]
    assert [math.exp(other.logprob) for other in token.top_logprobs] == pytest.approx(likeliest)
    assert reply.usage is not None
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply.usage.prompt_tokens == own["usage"]["prompt_tokens"]


def test_free_text_has_predictive_logprobs(client: openai.OpenAI, server: Server) -> None:
    own = generate(server, max_tokens=6, tokens=True)
    reply = client.chat.completions.create(model="global", messages=ASKED, max_tokens=6, logprobs=True, top_logprobs=3)
    choice = reply.choices[0]
    assert choice.message.content == own["answer"]
    assert choice.finish_reason == {"end": "stop", "stop": "stop", "length": "length"}[own["finish"]]
    assert choice.logprobs is not None
    tokens = choice.logprobs.content or []
    assert "".join(token.token for token in tokens) == own["answer"]
    assert [token.logprob for token in tokens] == pytest.approx(
        [math.log(token["probability"]) for token in own["tokens"][: len(tokens)]]
    )
    assert all(len(token.top_logprobs) == 3 for token in tokens)
    assert extra(choice)["confidence"] == own["confidence"]

    legacy = client.completions.create(model="global", prompt=QUESTION["prompt"], max_tokens=6, logprobs=3)
    old = legacy.choices[0].logprobs
    assert legacy.choices[0].text == own["answer"]
    assert old is not None
    assert old.tokens is not None
    assert old.tokens == [token.token for token in tokens]
    assert old.token_logprobs == pytest.approx([token.logprob for token in tokens])
    assert old.text_offset == [len("".join(old.tokens[:at])) for at in range(len(old.tokens))]


@pytest.mark.parametrize("stop", [None, ["e"]])
def test_a_stream_tells_the_same_as_one_reply(client: openai.OpenAI, stop: list[str] | None) -> None:
    asked: dict[str, Any] = {"model": "global", "max_tokens": 12, "stop": stop, "temperature": 1.5, "seed": 3}
    whole = client.chat.completions.create(messages=ASKED, logprobs=True, **asked)
    chunks = list(client.chat.completions.create(
        messages=ASKED, stream=True, logprobs=True, stream_options={"include_usage": True}, **asked
    ))  # fmt: skip
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == whole.choices[0].message.content
    assert len([text for text in texts if text]) > 1
    assert chunks[0].choices[0].delta.role == "assistant"
    last = chunks[-2].choices[0]
    assert last.finish_reason == whole.choices[0].finish_reason
    assert extra(last)["confidence"] == extra(whole.choices[0])["confidence"]
    assert last.logprobs is not None
    assert whole.choices[0].logprobs is not None
    assert last.logprobs.model_dump() == whole.choices[0].logprobs.model_dump()
    assert chunks[-1].usage == whole.usage

    legacy = client.completions.create(prompt=QUESTION["prompt"], stream=True, **asked)
    assert "".join(chunk.choices[0].text for chunk in legacy) == whole.choices[0].message.content


def test_a_doubtful_answer_is_refused_with_its_reason(client: openai.OpenAI) -> None:
    doubt: Any = {"options": OPTIONS, "abstain_below": 1}
    reply = client.chat.completions.create(model="global", messages=ASKED, extra_body=doubt)
    message = reply.choices[0].message
    assert message.content is None
    assert "below the 100 % asked for" in (message.refusal or "")
    assert reply.choices[0].finish_reason == "content_filter"
    assert len(extra(reply.choices[0])["abstained"]["candidates"]) == len(OPTIONS)
    chunks = list(client.chat.completions.create(model="global", messages=ASKED, extra_body=doubt, stream=True))
    assert chunks[0].choices[0].delta.refusal == message.refusal


def test_several_choices_have_ids_that_feedback_can_be_given_on(client: openai.OpenAI, server: Server) -> None:
    reply = client.completions.create(
        model="global", prompt=["one film", "another"], n=2, temperature=1.5, max_tokens=4, seed=5
    )
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    alone = client.completions.create(model="global", prompt="one film", temperature=1.5, max_tokens=4, seed=6)
    assert reply.choices[1].text == alone.choices[0].text
    ids = [extra(choice)["request_id"] for choice in reply.choices]
    assert len(set(ids)) == 4
    for id in ids:
        said = server.http.post("/feedback", json={"request_id": id, "correct": True})
        assert said.status_code == 200, said.text


def test_a_conversation_is_one_question_of_lines(client: openai.OpenAI, server: Server) -> None:
    talk: list[Any] = [
        {"role": "system", "content": "Answer shortly."},
        {"role": "user", "content": [{"type": "text", "text": "Was it "}, {"type": "text", "text": "good?"}]},
        {"role": "assistant", "content": "It was."},
        {"role": "user", "content": "And long?"},
    ]
    reply = client.chat.completions.create(model="global", messages=talk, extra_body={"options": OPTIONS})
    prompt = "Answer shortly.\nUser: Was it good?\nAssistant: It was.\nUser: And long?\nAssistant:"
    assert extra(reply.choices[0])["probabilities"] == generate(server, prompt=prompt, options=OPTIONS)["probabilities"]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"n": 2}, "all choices are the same"),
        ({"n": 2, "temperature": 1, "stream": True}, "a stream tells one choice"),
        ({"presence_penalty": 0.5}, "presence_penalty must be 0"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "calls no tools"),
        ({"response_format": {"type": "json_object"}}, "give options"),
        ({"top_logprobs": 2}, "needs logprobs"),
        ({"messages": [{"role": "user", "content": " "}]}, "prompt is empty"),
        ({"messages": [*ASKED, {"role": "assistant", "content": "yes"}]}, "end with a user's"),
        ({"messages": [{"role": "tool", "content": "yes", "tool_call_id": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "text alone"),
        ({"extra_body": {"nonsense": 1}}, "nonsense: unknown field"),
        ({"extra_body": {"options": ["one"]}}, "options"),
        ({"messages": LONG}, "300000 characters"),
    ],
)
def test_what_it_has_not_is_refused_with_what_would_be_right(
    client: openai.OpenAI, wrong: dict[str, Any], says: str
) -> None:
    ask: Any = client.chat.completions.create
    with pytest.raises(openai.UnprocessableEntityError, match=says):
        ask(**({"model": "global", "messages": ASKED} | wrong))


def test_an_unknown_model_and_token_ids_are_told(client: openai.OpenAI) -> None:
    for stream in (False, True):
        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(model="nowhere", messages=ASKED, stream=stream)
        assert missing.value.body == {
            "type": "TaskNotFound", "message": missing.value.body["message"], "field": "model",  # pyright: ignore
        }  # fmt: skip
    with pytest.raises(openai.UnprocessableEntityError, match="not token ids"):
        client.completions.create(model="global", prompt=[1, 2, 3])
    with pytest.raises(openai.NotFoundError, match="global:0"):
        client.chat.completions.create(model="global:0", messages=ASKED)


def test_the_last_seed_has_choices_too(client: openai.OpenAI) -> None:
    reply = client.completions.create(
        model="global", prompt="a film", n=2, temperature=1, seed=SEED_LIMIT - 1, max_tokens=2
    )
    assert len(reply.choices) == 2


def test_langchain_asks_and_streams(client: openai.OpenAI, server: Server) -> None:
    model = ChatOpenAI(
        model="openai", base_url=f"{server.url}/v1", api_key=SecretStr("none"), max_retries=0, logprobs=True,
        extra_body={"options": OPTIONS},
    )  # fmt: skip
    own = generate(server, options=OPTIONS, task="openai")
    answer = model.invoke(QUESTION["prompt"])
    assert answer.content == own["answer"]
    assert answer.response_metadata["logprobs"]["confidence"] == own["confidence"]
    assert answer.response_metadata["system_fingerprint"] == own["posterior"]["id"]
    text = ChatOpenAI(model="global", base_url=f"{server.url}/v1", api_key=SecretStr("none"), max_completion_tokens=6)
    parts = list(text.stream(QUESTION["prompt"]))
    assert all(isinstance(part, AIMessageChunk) for part in parts)
    assert "".join(str(part.content) for part in parts) == generate(server, max_tokens=6)["answer"]
