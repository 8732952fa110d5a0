"""Requests of OpenAI's API that this server answers, with what of its own it adds to them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from abmll.adaptive import TOLERANCE
from abmll.errors import InvalidRequest
from abmll.examples import MAX_OPTIONS
from server.schemas import MAX_TOKENS, GenerateRequest, Text, described
from training.settings import SEED_LIMIT

MAX_CHOICES = 16
# OpenAI's own default.
_COMPLETION_TOKENS = 16
_CHAT_TOKENS = 128

_Stop = Annotated[str, Field(min_length=1, max_length=64)]


class StreamOptions(BaseModel):
    """What a stream tells besides."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool | None = Field(False, description="Whether a last chunk tells the tokens.")
    include_obfuscation: bool | None = Field(None, description="Has no effect.")


class OpenAIRequest(BaseModel):
    """What both kinds of requests share."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(
        description="A task, as `GET /v1/models` lists them: `global`, `films`, or `films:2` for its second version.",
        examples=["global"],
    )
    temperature: float | None = Field(
        None, ge=0, le=2, description="null: 0, the likeliest text, which alone has a calibrated confidence."
    )
    top_p: float | None = Field(None, gt=0, le=1, description="null: 1.")
    n: int | None = Field(None, ge=1, le=MAX_CHOICES, description="Choices, each with a seed of its own.")
    stop: _Stop | list[_Stop] | None = Field(None, description="At most 8 strings that end the text.")
    seed: int | None = Field(None, ge=0, lt=SEED_LIMIT, description="null: 0. The same request gives the same reply.")
    stream: bool | None = Field(None, description="Whether the reply is a stream of server-sent events.")
    stream_options: StreamOptions | None = Field(None, description="What a stream tells besides.")
    presence_penalty: float | None = Field(None, description="0 alone is possible.")
    frequency_penalty: float | None = Field(None, description="0 alone is possible.")
    logit_bias: dict[str, float] | None = Field(None, description="Must be empty.")
    user: str | None = Field(None, description="Has no effect.")

    options: list[Text] | None = Field(
        None,
        description=f"2 to {MAX_OPTIONS} distinct answers to choose from; as in `POST /generate`, and so the others.",
        examples=[None],
    )
    draws: int | Literal["auto"] = Field("auto", description=described(GenerateRequest, "draws"))
    tolerance: float = Field(TOLERANCE, ge=0, le=1, description=described(GenerateRequest, "tolerance"))
    abstain_below: float | None = Field(None, ge=0, le=1, description=described(GenerateRequest, "abstain_below"))
    target_risk: float | None = Field(
        None, gt=0, lt=1, description=described(GenerateRequest, "target_risk"), examples=[None]
    )
    samples: int = Field(0, ge=0, le=32, description=described(GenerateRequest, "samples"))
    meaning: Literal["normalized", "entailment"] = Field(
        "normalized", description=described(GenerateRequest, "meaning")
    )


class CompletionRequest(OpenAIRequest):
    """A request of `POST /v1/completions`."""

    prompt: Text | list[Any] = Field(
        description=f"The question, or up to {MAX_CHOICES} of them; text, not token ids.", examples=["Sentiment?"]
    )
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS, description=f"null: {_COMPLETION_TOKENS}.")
    logprobs: int | None = Field(
        None, ge=0, le=5, description="Whether log-probabilities are told, and of how many tokens in each place."
    )
    echo: bool | None = Field(None, description="false alone is possible.")
    suffix: str | None = Field(None, description="Must be null.")
    best_of: int | None = Field(None, description="As `n`, or null.")

    @property
    def most_tokens(self) -> int:
        """Longest answer, in tokens."""
        return self.max_tokens or _COMPLETION_TOKENS

    @property
    def top(self) -> int | None:
        """Tokens whose log-probabilities are told in each place; None: none, nor the answer's own."""
        return self.logprobs


class ChatMessage(BaseModel):
    """A message of a conversation."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant"] = Field(description="Who says it.")
    content: Text | list[dict[str, Any]] | None = Field(
        description='Text, or parts of it: `{"type": "text", "text": ...}`.',
        examples=["The film was a delight. Sentiment?"],
    )
    name: str | None = Field(None, description="Has no effect.")
    refusal: str | None = Field(None, description="Of an assistant's message, that of an earlier reply.")

    @property
    def text(self) -> str:
        """The message's text.

        Raises:
            InvalidRequest: A part of it is no text.
        """
        if isinstance(self.content, list):
            texts = [part.get("text") for part in self.content if part.get("type") == "text"]
            found = [text for text in texts if isinstance(text, str)]
            if len(found) < len(self.content):
                raise InvalidRequest("a message has a part that is no text; this model reads text alone", "messages")
            return "".join(found)
        return self.content or self.refusal or ""


class ResponseFormat(BaseModel):
    """The form of the answer."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(description="`text` alone is possible; to choose among answers give `options`.")


class ChatRequest(OpenAIRequest):
    """A request of `POST /v1/chat/completions`."""

    messages: list[ChatMessage] = Field(
        min_length=1, max_length=256, description="The conversation, in its order; its texts are the question."
    )
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS, description=f"null: {_CHAT_TOKENS}.")
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS, description="In place of `max_tokens`.")
    logprobs: bool | None = Field(None, description="Whether log-probabilities are told; they are predictive ones.")
    top_logprobs: int | None = Field(None, ge=0, le=5, description="Of how many tokens in each place.")
    response_format: ResponseFormat | None = Field(None, description="The form of the answer: text alone.")
    tools: list[Any] | None = Field(None, description="Must be empty.")
    metadata: dict[str, str] | None = Field(None, description="Has no effect.")
    store: bool | None = Field(None, description="Has no effect.")

    @property
    def most_tokens(self) -> int:
        """Longest answer, in tokens."""
        return self.max_completion_tokens or self.max_tokens or _CHAT_TOKENS

    @property
    def top(self) -> int | None:
        """Tokens whose log-probabilities are told in each place; None: none, nor the answer's own."""
        return (self.top_logprobs or 0) if self.logprobs else None
