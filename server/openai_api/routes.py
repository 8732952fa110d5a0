"""OpenAI's API over the server's tasks: ``/v1/models``, ``/v1/completions`` and ``/v1/chat/completions``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.sse import EventSourceResponse

from abmll.errors import AbmllError, TaskNotFound
from server.access import Access
from server.connection import while_connected
from server.openai_api.answers import chat_choice, completion_choice, usage_of
from server.openai_api.models import find_model, list_models
from server.openai_api.questions import questions_of
from server.openai_api.replies import ChatCompletion, Completion, Model, ModelList
from server.openai_api.requests import ChatRequest, CompletionRequest
from server.openai_api.streaming import Chunks
from server.openapi import errors
from server.questions import Questions
from server.schemas import GenerateReply, GenerateRequest

_STATUSES = (400, 404, 413, 422, 429, 500, 503, 504)
_STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The reply; with `stream`, server-sent events whose data is a `Chunk`, the last one `[DONE]`.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}


def add_openai(app: FastAPI, questions: Questions, access: Access) -> None:
    """Adds the routes to an app."""
    answer = _Answering(questions)

    @app.post(
        "/v1/completions",
        tags=["openai"],
        response_model=Completion,
        responses=_STREAM | errors(*_STATUSES, *access.statuses),
        dependencies=access.needs("query"),
    )
    async def complete(asked: CompletionRequest, request: Request) -> Completion | EventSourceResponse:  # pyright: ignore[reportUnusedFunction] -- a route
        """Answers prompts, as OpenAI's API does."""
        wanted = questions_of(asked)
        if asked.stream:
            return await answer.streamed(asked, wanted[0], request)
        replies = await answer.all(asked, wanted, request)
        choices = [completion_choice(index, reply, asked.top) for index, reply in enumerate(replies)]
        return Completion(choices=choices, **_told_of("cmpl", asked, replies))

    @app.post(
        "/v1/chat/completions",
        tags=["openai"],
        response_model=ChatCompletion,
        responses=_STREAM | errors(*_STATUSES, *access.statuses),
        dependencies=access.needs("query"),
    )
    async def chat(asked: ChatRequest, request: Request) -> ChatCompletion | EventSourceResponse:  # pyright: ignore[reportUnusedFunction] -- a route
        """Answers the last message of a conversation, as OpenAI's API does."""
        wanted = questions_of(asked)
        if asked.stream:
            return await answer.streamed(asked, wanted[0], request)
        replies = await answer.all(asked, wanted, request)
        choices = [chat_choice(index, reply, asked.top) for index, reply in enumerate(replies)]
        return ChatCompletion(choices=choices, **_told_of("chatcmpl", asked, replies))

    @app.get("/v1/models", tags=["openai"], responses=errors(503, *access.statuses), dependencies=access.needs("query"))
    def get_models() -> ModelList:  # pyright: ignore[reportUnusedFunction] -- a route
        """Lists tasks, and their versions where there are several, as models."""
        return ModelList(data=list_models(questions.service.store))

    @app.get(
        "/v1/models/{model}",
        tags=["openai"],
        responses=errors(404, 422, *access.statuses),
        dependencies=access.needs("query"),
    )
    def get_model(model: str) -> Model:  # pyright: ignore[reportUnusedFunction] -- a route
        """Tells one of them."""
        try:
            return find_model(questions.service.store, model)
        except TaskNotFound as error:
            raise _renamed(error) from error


class _Answering:
    """Answers the questions of one request."""

    def __init__(self, questions: Questions) -> None:
        self.questions = questions

    async def all(
        self, asked: ChatRequest | CompletionRequest, wanted: Sequence[GenerateRequest], request: Request
    ) -> list[GenerateReply]:
        """Answers all questions, or none."""
        id, answerer = self.questions.begin(wanted[0]), self.questions.service.answerer
        # Feedback is given on one answer: each of several has an id of its own.
        ids = [id if at == 0 else f"{id}-{at}" for at in range(len(wanted))]

        async def together() -> list[GenerateReply]:
            async with asyncio.TaskGroup() as group:
                work = [group.create_task(answerer.answer(*pair)) for pair in zip(wanted, ids, strict=True)]
            return [task.result() for task in work]

        try:
            replies = await while_connected(request, together())
        except ExceptionGroup as failed:
            raise _renamed(failed.exceptions[0], asked) from failed
        for question, reply in zip(wanted, replies, strict=True):
            self.questions.observe(question, reply)
        return replies

    async def streamed(
        self, asked: ChatRequest | CompletionRequest, question: GenerateRequest, request: Request
    ) -> EventSourceResponse:
        """Answers one question with a stream of chunks."""
        kind = "chatcmpl" if isinstance(asked, ChatRequest) else "cmpl"
        events = Chunks(asked, f"{kind}-{self.questions.begin(question)}")
        try:
            return await self.questions.streamed(question, request, events)
        except AbmllError as error:
            raise _renamed(error, asked) from error


def _renamed(error: Exception, asked: ChatRequest | CompletionRequest | None = None) -> Exception:
    """The same error, told of the field that the client gave."""
    if isinstance(error, AbmllError):
        if error.field in ("task", "version"):
            error.field = "model"
        elif error.field == "prompt" and isinstance(asked, ChatRequest):
            error.field = "messages"
    return error


def _told_of(prefix: str, asked: ChatRequest | CompletionRequest, replies: Sequence[GenerateReply]) -> dict[str, Any]:
    """What is told of all choices together."""
    return {
        "id": f"{prefix}-{replies[0].request_id}",
        "created": int(time.time()),
        "model": asked.model,
        "system_fingerprint": replies[0].posterior.id,
        "usage": usage_of(replies, len(replies) // (asked.n or 1)),
    }
