"""Replies in the form of OpenAI's API; what is this server's own rides in ``abmll``, which clients keep."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from server.schemas import (
    Abstained,
    GenerateReply,
    PosteriorId,
    Semantics,
    Timing,
    Uncertainty,
    described,
)

# The last: not sure enough, nothing is told.
FinishReason = Literal["stop", "length", "content_filter"]


class Confidence(BaseModel):
    """How sure an answer is; every field as in the reply to `POST /generate`."""

    request_id: str = Field(description=described(GenerateReply, "request_id"))
    posterior: PosteriorId = Field(description=described(GenerateReply, "posterior"))
    confidence: float = Field(description=described(GenerateReply, "confidence"))
    raw_confidence: float = Field(description=described(GenerateReply, "raw_confidence"))
    calibrated: bool = Field(description=described(GenerateReply, "calibrated"))
    uncertainty: Uncertainty = Field(description=described(GenerateReply, "uncertainty"))
    standard_error: float = Field(description=described(GenerateReply, "standard_error"))
    draws: int = Field(description=described(GenerateReply, "draws"))
    options: list[str] | None = Field(description=described(GenerateReply, "options"))
    probabilities: list[float] | None = Field(description=described(GenerateReply, "probabilities"))
    prediction_set: list[str] | None = Field(description=described(GenerateReply, "prediction_set"))
    abstained: Abstained | None = Field(description=described(GenerateReply, "abstained"))
    semantics: Semantics | None = Field(description=described(GenerateReply, "semantics"))
    timing: Timing = Field(description=described(GenerateReply, "timing"))


class TokenUsage(BaseModel):
    """Tokens of all questions and all choices."""

    prompt_tokens: int = Field(description="Of the questions.")
    completion_tokens: int = Field(description="Of the answers.")
    total_tokens: int = Field(description="Of both.")


class TopLogprob(BaseModel):
    """A token that might stand in a place; with `options`, an option."""

    token: str = Field(description="Its text.")
    bytes: list[int] = Field(description="Its text in UTF-8.")
    logprob: float = Field(description="Predictive log-probability, in nats.")


class TokenLogprob(TopLogprob):
    """A token of the answer; with `options`, the answer as one."""

    top_logprobs: list[TopLogprob] = Field(description="The likeliest in this place; with `options`, all of them.")
    uncertainty: Uncertainty | None = Field(description="Of this place, in nats.")


class ChatLogprobs(BaseModel):
    """The answer token by token, and how sure it is as a whole."""

    content: list[TokenLogprob] | None = Field(description="The answer's tokens; null where there is no answer.")
    refusal: None = Field(default=None, description="Always null.")
    confidence: float | None = Field(description="Also in `abmll`, which some clients drop.")
    calibrated: bool | None = Field(description="Likewise.")


class AssistantMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"] = Field(default="assistant", description="Always `assistant`.")
    content: str | None = Field(description="null where it is not sure enough.")
    refusal: str | None = Field(default=None, description="Why there is no answer.")


class _Choice(BaseModel):
    index: int = Field(description="Its number, from 0.")
    finish_reason: FinishReason = Field(
        description="`stop`: the answer ended; `length`: `max_tokens` ended it; `content_filter`: not sure enough."
    )
    abmll: Confidence = Field(description="How sure the answer is.")


class ChatChoice(_Choice):
    """An answer."""

    message: AssistantMessage = Field(description="The answer.")
    logprobs: ChatLogprobs | None = Field(description="Where they were asked for.")


class _Completion(BaseModel):
    id: str = Field(description="Of the reply.")
    created: int = Field(description="Seconds since 1970.")
    model: str = Field(description="The task that answered, as it was asked for.")
    system_fingerprint: str = Field(description="Id of the posterior that answered.")
    usage: TokenUsage = Field(description="Tokens of all questions and all choices.")


class ChatCompletion(_Completion):
    """The reply to `POST /v1/chat/completions`."""

    object: Literal["chat.completion"] = Field(default="chat.completion", description="The kind of reply.")
    choices: list[ChatChoice] = Field(description="The answers.")


class CompletionLogprobs(BaseModel):
    """The answer token by token; lists of the same length."""

    tokens: list[str] = Field(description="Texts of the tokens; with `options`, the answer as one.")
    token_logprobs: list[float] = Field(description="Predictive log-probabilities, in nats.")
    top_logprobs: list[dict[str, float]] = Field(description="Of the likeliest in each place.")
    text_offset: list[int] = Field(description="Where each begins in the answer.")
    confidence: float | None = Field(default=None, description="Also in `abmll`, which some clients drop.")
    calibrated: bool | None = Field(default=None, description="Likewise.")


class CompletionChoice(_Choice):
    """An answer."""

    text: str = Field(description="Empty where it is not sure enough; `abmll.abstained` says why.")
    logprobs: CompletionLogprobs | None = Field(description="Where they were asked for.")


class Completion(_Completion):
    """The reply to `POST /v1/completions`."""

    object: Literal["text_completion"] = Field(default="text_completion", description="The kind of reply.")
    choices: list[CompletionChoice] = Field(description="The answers.")


class Delta(BaseModel):
    """What a chunk adds to the message."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: str | None = None


class _ChunkChoice(BaseModel):
    index: int = 0
    finish_reason: FinishReason | None = None
    abmll: Confidence | None = Field(default=None, description="In the last chunk: how sure the answer is.")


class ChatChunkChoice(_ChunkChoice):
    """What a chunk adds to a chat's choice."""

    delta: Delta
    logprobs: ChatLogprobs | None = None


class CompletionChunkChoice(_ChunkChoice):
    """What a chunk adds to a completion's choice."""

    text: str
    logprobs: CompletionLogprobs | None = None


class Chunk(BaseModel):
    """A part of a stream."""

    id: str
    object: Literal["chat.completion.chunk", "text_completion"]
    created: int
    model: str
    system_fingerprint: str | None = None
    choices: list[ChatChunkChoice | CompletionChunkChoice]
    usage: TokenUsage | None = None


class Model(BaseModel):
    """A task, or a version of it, that can be asked."""

    id: str = Field(description="What to ask for as `model`.", examples=["film-reviews"])
    object: Literal["model"] = Field(default="model", description="Always `model`.")
    created: int = Field(description="Seconds since 1970; 0 where it is not known.")
    owned_by: Literal["abmll"] = Field(default="abmll", description="Always `abmll`.")
    root: str | None = Field(description="The base model.")
    parent: str | None = Field(description="The task that this is a version of.")
    shots: int | None = Field(description="Labelled examples that it was adapted with.")
    calibrated: bool = Field(description="Whether its confidence is calibrated.")


class ModelList(BaseModel):
    """All that can be asked."""

    object: Literal["list"] = Field(default="list", description="Always `list`.")
    data: list[Model] = Field(description="Tasks and their versions.")
