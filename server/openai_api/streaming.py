"""A stream in the form of OpenAI's API: chunks, then ``[DONE]``."""

from __future__ import annotations

import time

from fastapi.sse import format_sse_event
from pydantic import BaseModel

from server.openai_api.answers import (
    chat_logprobs,
    completion_logprobs,
    confidence_of,
    finish_of,
    refusal_of,
    usage_of,
)
from server.openai_api.replies import ChatChunkChoice, Chunk, CompletionChunkChoice, Delta
from server.openai_api.requests import ChatRequest, CompletionRequest
from server.schemas import ErrorReply, GenerateReply, StreamedToken
from server.streaming import data_of


class Chunks:
    """Writes a stream; the text of all chunks together is the answer, without white space around it.

    Log-probabilities are predictive ones, known when the text is: they come together, with its end.

    Args:
        request: What was asked.
        id: Id of the reply.
    """

    def __init__(self, request: ChatRequest | CompletionRequest, id: str) -> None:
        self.request, self.id = request, id
        self.created = int(time.time())
        self.begun = False
        self.space = ""

    def token(self, token: StreamedToken) -> bytes:
        """A token; nothing where it only may be the white space at the end."""
        text = self.space + token.text if self.begun else token.text.lstrip()
        shown = text.rstrip()
        self.space = text[len(shown) :]
        return self._text(shown) if shown else b""

    def answer(self, reply: GenerateReply) -> bytes:
        """What ends the stream: the answer where it was not told yet, how sure it is, and its tokens."""
        whole = b"" if self.begun else self._text(reply.answer or "", refusal_of(reply))
        choice = self._choice("")
        choice.finish_reason, choice.abmll = finish_of(reply), confidence_of(reply)
        if isinstance(choice, ChatChunkChoice):
            choice.logprobs = chat_logprobs(reply, self.request.top)
        else:
            choice.logprobs = completion_logprobs(reply, self.request.top)
        last = self._chunk([choice])
        last.system_fingerprint = reply.posterior.id
        told = whole + _data(last)
        if self.request.stream_options is not None and self.request.stream_options.include_usage:
            usage = self._chunk([])
            usage.usage = usage_of([reply], 1)
            told += _data(usage)
        return told + format_sse_event(data_str="[DONE]")

    def error(self, error: ErrorReply) -> bytes:
        """What ended the stream before its answer."""
        return _data(error)

    def _text(self, text: str, refusal: str | None = None) -> bytes:
        choice = self._choice(text)
        if isinstance(choice, ChatChunkChoice) and not self.begun:
            choice.delta.role = "assistant"
        if isinstance(choice, ChatChunkChoice) and refusal is not None:
            choice.delta.content, choice.delta.refusal = None, refusal
        self.begun = True
        return _data(self._chunk([choice]))

    def _choice(self, text: str) -> ChatChunkChoice | CompletionChunkChoice:
        chat = isinstance(self.request, ChatRequest)
        return ChatChunkChoice(delta=Delta(content=text)) if chat else CompletionChunkChoice(text=text)

    def _chunk(self, choices: list[ChatChunkChoice | CompletionChunkChoice]) -> Chunk:
        kind = "chat.completion.chunk" if isinstance(self.request, ChatRequest) else "text_completion"
        return Chunk(id=self.id, object=kind, created=self.created, model=self.request.model, choices=choices)


def _data(content: BaseModel) -> bytes:
    return format_sse_event(data_str=data_of(content))
