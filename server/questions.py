"""Questions over HTTP: ``POST /generate`` and ``POST /score``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.sse import EventSourceResponse

from server.access import Access
from server.connection import while_connected
from server.logs import current_request
from server.metrics import Metrics
from server.openapi import EVENTS, errors
from server.schemas import GenerateReply, GenerateRequest, ScoreRequest
from server.service import Service
from server.streaming import Events, TokenEvents, WholeText, stream
from server.tracing import tell_answer

logger = logging.getLogger(__name__)

_Asked = TypeVar("_Asked", GenerateRequest, ScoreRequest)


class Questions:
    """Answers questions on behalf of a client that may go away, and counts what was answered.

    Args:
        service: Answers them.
        metrics: Counts them.
    """

    def __init__(self, service: Service, metrics: Metrics) -> None:
        self.service, self.metrics = service, metrics

    def begin(self, asked: GenerateRequest | ScoreRequest) -> str:
        """Returns the id of the request at hand, which brought the question."""
        context = current_request()
        assert context is not None
        if self.service.settings.log_prompts:
            logger.info("task %r is asked %r", asked.task, asked.prompt)
        return context.id

    def observe(self, asked: GenerateRequest | ScoreRequest, reply: GenerateReply) -> None:
        """Counts an answer."""
        kind = "score" if isinstance(asked, ScoreRequest) else "text" if asked.options is None else "options"
        self.metrics.observe(reply, kind)
        tell_answer(reply)

    async def told(
        self, asked: _Asked, request: Request, answer: Callable[[_Asked, str], Coroutine[Any, Any, GenerateReply]]
    ) -> GenerateReply:
        """Answers a question, unless its client goes away first."""
        reply = await while_connected(request, answer(asked, self.begin(asked)))
        self.observe(asked, reply)
        return reply

    async def streamed(self, question: GenerateRequest, request: Request, events: Events) -> EventSourceResponse:
        """Answers a question with a stream of events."""
        answerer, id = self.service.answerer, self.begin(question)
        return await stream(
            lambda tell: answerer.answer(question, id, tell),
            WholeText(answerer.tokenizer, question.stop),
            events,
            lambda first: while_connected(request, first),
            lambda reply: self.observe(question, reply),
            self.metrics.streams_broken.inc,
        )


def add_questions(app: FastAPI, questions: Questions, access: Access) -> None:
    """Adds the routes to an app."""

    @app.post(
        "/generate",
        tags=["questions"],
        response_model=GenerateReply,
        responses={200: EVENTS} | errors(400, 404, 413, 422, 429, 500, 503, 504, *access.statuses),
        dependencies=access.needs("query"),
    )
    async def generate(question: GenerateRequest, request: Request) -> GenerateReply | EventSourceResponse:  # pyright: ignore[reportUnusedFunction] -- a route
        """Answers a question under draws from a task's posterior."""
        if question.stream:
            return await questions.streamed(question, request, TokenEvents())
        return await questions.told(question, request, questions.service.answerer.answer)

    @app.post(
        "/score",
        tags=["questions"],
        responses=errors(400, 404, 413, 422, 429, 500, 503, 504, *access.statuses),
        dependencies=access.needs("query"),
    )
    async def score(finished: ScoreRequest, request: Request) -> GenerateReply:  # pyright: ignore[reportUnusedFunction] -- a route
        """Scores a finished answer, of another model or a person, under the draws: whole and token by token."""
        return await questions.told(finished, request, questions.service.answerer.score)
