"""Replies in the form of OpenAI's API; what is this server's own rides in ``abmll``, which clients keep."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from server.schemas import (
    Abstained,
    PosteriorId,
    Semantics,
    Timing,
    Uncertainty,
)

# The last: not sure enough, nothing is told.
FinishReason = Literal["stop", "length", "content_filter"]


class Confidence(BaseModel):
    """How sure an answer is; every field as in the reply to `POST /generate`."""

    request_id: str
    posterior: PosteriorId
    confidence: float
    raw_confidence: float
    calibrated: bool
    uncertainty: Uncertainty
    standard_error: float
    draws: int
    options: list[str] | None
    probabilities: list[float] | None
    prediction_set: list[str] | None
    abstained: Abstained | None
    semantics: Semantics | None
    timing: Timing


class TokenUsage(BaseModel):
    """Tokens of all questions and all choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TopLogprob(BaseModel):
    """A token that might stand in a place; with `options`, an option."""

    token: str
    bytes: list[int]
    logprob: float = Field(description="Predictive log-probability, in nats.")


class TokenLogprob(TopLogprob):
    """A token of the answer; with `options`, the answer as one."""

    top_logprobs: list[TopLogprob]
    uncertainty: Uncertainty | None = Field(description="Of this place, in nats.")


class ChatLogprobs(BaseModel):
    """The answer token by token, and how sure it is as a whole."""

    content: list[TokenLogprob] | None
    refusal: None = None
    confidence: float | None = Field(description="Also in `abmll`, which some clients drop.")
    calibrated: bool | None


class AssistantMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str | None = Field(description="null where it is not sure enough.")
    refusal: str | None = Field(None, description="Why there is no answer.")


class ChatChoice(BaseModel):
    """An answer."""

    index: int
    message: AssistantMessage
    finish_reason: FinishReason
    logprobs: ChatLogprobs | None
    abmll: Confidence


class ChatCompletion(BaseModel):
    """The reply to `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int = Field(description="Seconds since 1970.")
    model: str
    system_fingerprint: str = Field(description="Id of the posterior that answered.")
    choices: list[ChatChoice]
    usage: TokenUsage


class CompletionLogprobs(BaseModel):
    """The answer token by token; lists of the same length."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]
    confidence: float | None = None
    calibrated: bool | None = None


class CompletionChoice(BaseModel):
    """An answer."""

    index: int
    text: str = Field(description="Empty where it is not sure enough; `abmll.abstained` says why.")
    finish_reason: FinishReason
    logprobs: CompletionLogprobs | None
    abmll: Confidence


class Completion(BaseModel):
    """The reply to `POST /v1/completions`."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int = Field(description="Seconds since 1970.")
    model: str
    system_fingerprint: str = Field(description="Id of the posterior that answered.")
    choices: list[CompletionChoice]
    usage: TokenUsage


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

    id: str = Field(examples=["film-reviews"])
    object: Literal["model"] = "model"
    created: int = Field(description="Seconds since 1970; 0 where it is not known.")
    owned_by: Literal["abmll"] = "abmll"
    root: str | None = Field(description="The base model.")
    parent: str | None = Field(description="The task that this is a version of.")
    shots: int | None = Field(description="Labelled examples that it was adapted with.")
    calibrated: bool


class ModelList(BaseModel):
    """All that can be asked."""

    object: Literal["list"] = "list"
    data: list[Model]
