"""From a request of OpenAI's API to the questions that it asks."""

from __future__ import annotations

import re
from collections.abc import Sequence

from abmll.errors import InvalidRequest
from server.openai_api.requests import MAX_CHOICES, ChatMessage, ChatRequest, CompletionRequest, OpenAIRequest
from server.schemas import MAX_CHARACTERS, GenerateRequest
from training.settings import SEED_LIMIT

_SPEAKERS = {"system": "", "developer": "", "user": "User: ", "assistant": "Assistant: "}


def model_of(name: str) -> tuple[str, int | None]:
    """Splits a model's name into task and version: ``films:2`` into ("films", 2)."""
    found = re.fullmatch(r"(.+):0*([1-9][0-9]{0,8})", name)
    return (name, None) if found is None else (found[1], int(found[2]))


def questions_of(request: CompletionRequest | ChatRequest) -> list[GenerateRequest]:
    """The questions that a request asks: one for each choice of each prompt.

    Raises:
        InvalidRequest: It asks for what this server has not.
    """
    _check(request)
    prompts = [chat_prompt(request.messages)] if isinstance(request, ChatRequest) else _prompts(request)
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if len(stop) > 8:
        raise InvalidRequest(f"stop has {len(stop)} strings; give at most 8", field="stop")
    choices, seed = request.n or 1, request.seed or 0
    if choices > 1 and not request.temperature:
        raise InvalidRequest(f"n is {choices}, but at temperature 0 all choices are the same; raise it", field="n")
    if choices * len(prompts) > MAX_CHOICES:
        raise InvalidRequest(f"prompts times n is {choices * len(prompts)}; at most {MAX_CHOICES}", field="prompt")
    if request.stream and choices * len(prompts) > 1:
        raise InvalidRequest("a stream tells one choice of one prompt: leave stream out, or ask for one", "stream")
    task, version = model_of(request.model)
    return [
        GenerateRequest(
            prompt=prompt,
            task=task,
            version=version,
            options=request.options,
            draws=request.draws,
            tolerance=request.tolerance,
            seed=(seed + choice) % SEED_LIMIT,
            abstain_below=request.abstain_below,
            target_risk=request.target_risk,
            max_tokens=request.most_tokens,
            stop=stop,
            temperature=request.temperature or 0.0,
            top_p=1.0 if request.top_p is None else request.top_p,
            samples=request.samples,
            meaning=request.meaning,
            tokens=request.top is not None and request.options is None,
            stream=bool(request.stream),
            timeout=None,
            normalize=None,
        )
        for prompt in prompts
        for choice in range(choices)
    ]


def chat_prompt(messages: Sequence[ChatMessage]) -> str:
    """The question that a conversation ends with.

    A single message is the question as it stands, as for ``POST /generate``. Of several, each stands on a line of its
    own with who said it, and the last line is the assistant's to go on with.

    Raises:
        InvalidRequest: It does not end with a user's message, or is too long.
    """
    if messages[-1].role != "user":
        raise InvalidRequest(f"the last message is the {messages[-1].role}'s; end with a user's", field="messages")
    lines = [f"{_SPEAKERS[message.role]}{message.text}" for message in messages]
    one = len(messages) == 1
    prompt = messages[0].text if one else "\n".join([*lines, _SPEAKERS["assistant"].rstrip()])
    if len(prompt) > MAX_CHARACTERS:
        raise InvalidRequest(f"messages have {len(prompt)} characters; at most {MAX_CHARACTERS}", field="messages")
    return prompt


def _prompts(request: CompletionRequest) -> list[str]:
    given = [request.prompt] if isinstance(request.prompt, str) else request.prompt
    if not 1 <= len(given) <= MAX_CHOICES:
        raise InvalidRequest(f"prompt has {len(given)} entries; give 1 to {MAX_CHOICES} texts", field="prompt")
    prompts = [entry for entry in given if isinstance(entry, str) and len(entry) <= MAX_CHARACTERS]
    if len(prompts) < len(given):
        raise InvalidRequest(
            f"prompt must be text of at most {MAX_CHARACTERS} characters, or a list of such; not token ids",
            field="prompt",
        )
    return prompts


def _check(request: OpenAIRequest) -> None:
    refused = [
        ("presence_penalty", request.presence_penalty, "0: answers have the model's own probabilities"),
        ("frequency_penalty", request.frequency_penalty, "0: answers have the model's own probabilities"),
        ("logit_bias", request.logit_bias, "empty: to choose among answers give options"),
    ]
    if isinstance(request, CompletionRequest):
        refused += [("echo", request.echo, "false: to score a finished answer, POST /score"),
                    ("suffix", request.suffix, "null: texts are continued, not filled in")]  # fmt: skip
        if request.best_of not in (None, request.n or 1):
            raise InvalidRequest("best_of must be null, or as n: to compare samples give samples", field="best_of")
    if isinstance(request, ChatRequest):
        refused += [("tools", request.tools, "empty: this server calls no tools")]
        if request.response_format is not None and request.response_format.type != "text":
            raise InvalidRequest(
                "response_format must be of type text; to choose among answers give options", field="response_format"
            )
        if request.top_logprobs and not request.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs: true", field="top_logprobs")
    for name, given, right in refused:
        if given:
            raise InvalidRequest(f"{name} must be {right}", field=name)
