"""From errors to HTTP replies, in one place."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from abmll.errors import (
    AbmllError,
    AnswerNotFound,
    ClientGone,
    DeadlineExceeded,
    EngineFailure,
    Forbidden,
    InvalidExamples,
    InvalidPosterior,
    InvalidRequest,
    JobNotFound,
    Overloaded,
    PromptTooLong,
    StoreFailure,
    TaskConflict,
    TaskNotFound,
    Unauthorized,
)
from server.logs import shown_path
from server.openai_api.requests import ChatMessage, ChatRequest, CompletionRequest
from server.schemas import ErrorBody, ErrorReply, GenerateRequest, ScoreRequest
from server.task_schemas import AdaptRequest, ExampleIn, FeedbackRequest, RecalibrateRequest, ServingRequest

logger = logging.getLogger(__name__)

# The first match counts, so that a kind stands before the kind it is derived from.
STATUS: Sequence[tuple[type[AbmllError], int]] = (
    (Unauthorized, 401),
    (Forbidden, 403),
    (PromptTooLong, 413),
    (InvalidRequest, 422),
    (InvalidExamples, 422),
    (TaskNotFound, 404),
    (JobNotFound, 404),
    (AnswerNotFound, 404),
    (TaskConflict, 409),
    (Overloaded, 429),
    (ClientGone, 499),  # as nginx logs it; nobody reads the reply
    (EngineFailure, 503),
    (StoreFailure, 503),
    (DeadlineExceeded, 504),
    (InvalidPosterior, 500),
    (AbmllError, 500),
)
_REQUESTS = (
    GenerateRequest, ScoreRequest, AdaptRequest, ExampleIn, ServingRequest, FeedbackRequest, RecalibrateRequest,
    CompletionRequest, ChatRequest, ChatMessage,
)  # fmt: skip
_FIELDS = {name for model in _REQUESTS for name in model.model_fields}
_NAMES = {400: "MalformedJSON", 404: "NotFound", 405: "MethodNotAllowed", 408: "BodyTooSlow", 413: "BodyTooLarge"}


def status_of(error: AbmllError) -> int:
    """Returns the HTTP status of an error."""
    return next(status for kind, status in STATUS if isinstance(error, kind))


def _reply(
    status: int, kind: str, message: str, field: str | None = None, headers: dict[str, str] | None = None
) -> JSONResponse:
    body = ErrorReply(error=ErrorBody(type=kind, message=message, field=field))
    return JSONResponse(body.model_dump(), status, headers)


def body_of(error: Exception, request: str) -> ErrorReply:
    """Returns what a reply says of an error; one that is none of ours is logged and told as the server's failure.

    Args:
        error: The error.
        request: Method and path, for the log.
    """
    if isinstance(error, AbmllError):
        return ErrorReply(error=ErrorBody(type=type(error).__name__, message=error.message, field=error.field))
    if isinstance(error, ValidationError):  # its own text has what people asked
        logger.error("%s failed: %s", request, error.errors(include_input=False, include_url=False))
    else:
        logger.error("%s failed", request, exc_info=error)
    message = "the server failed on this request; its log says why"
    return ErrorReply(error=ErrorBody(type="InternalError", message=message, field=None))


def _named(request: Request) -> str:
    return f"{request.method} {shown_path(request.scope)}"


def _field(error: dict[str, Any]) -> str | None:
    """Names the field at fault: ``examples[3].answer``.

    A location has pieces of pydantic's own besides (the members of a union); an unknown field's name is
    the last piece.
    """
    path = ""
    unknown = error["type"] == "extra_forbidden"
    pieces = error["loc"][1:]
    for position, piece in enumerate(pieces):
        if isinstance(piece, int):
            path += f"[{piece}]"
        elif piece in _FIELDS or (unknown and position == len(pieces) - 1):
            path += f"{'.' if path else ''}{piece}"
    return path or None


def _invalid(error: RequestValidationError) -> JSONResponse:
    first: dict[str, Any] = error.errors()[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "")
        return _reply(400, "MalformedJSON", f"the body is not JSON: {reason} at character {first['loc'][-1]}")
    field = _field(first)
    message = "unknown field; remove it" if first["type"] == "extra_forbidden" else first["msg"]
    if field is None:
        return _reply(422, "InvalidRequest", f"the body must be a JSON object sent as application/json: {message}")
    # One field of a union type has an error for each member: tell them together.
    messages = {e["msg"] for e in error.errors() if _field(e) == field} if first["type"] != "extra_forbidden" else set()
    message = "; or ".join(sorted(messages)) or message
    kind = "InvalidExamples" if field.startswith("examples") else "InvalidRequest"
    return _reply(422, kind, f"{field}: {message}", field)


def install(app: FastAPI) -> None:
    """Has an app reply to every error with ``{"error": {"type", "message", "field"}}``."""

    async def abmll_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, AbmllError)
        status = status_of(error)
        if status == 500:
            logger.error("%s: %s: %s", _named(request), type(error).__name__, error.message)
        headers = {"Retry-After": "5"} if status == 503 else None
        if isinstance(error, Unauthorized):
            headers = {"WWW-Authenticate": "Bearer"}
        if isinstance(error, Overloaded):
            headers = {"Retry-After": str(error.retry_after)}
        return JSONResponse(body_of(error, _named(request)).model_dump(), status, headers)

    async def invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return _invalid(error)

    async def http_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        message = str(error.detail)
        if error.status_code == 400 and error.__cause__ is not None:
            message = f"the body cannot be read as JSON: {error.__cause__}"
        elif error.status_code == 404:
            message = f"there is no {request.url.path[:200]}; GET /docs shows what there is"
        elif error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "another method")
            message = f"{request.method} is not possible here; use {allowed}"
        kind = _NAMES.get(error.status_code, "HTTPError")
        return _reply(error.status_code, kind, message, headers=dict(error.headers or {}) or None)

    app.add_exception_handler(AbmllError, abmll_error)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http_error)


class Told:
    """Innermost middleware: an error that is none of ours is a reply too, which the others count, name and log.

    Starlette has a place for such a handler outside of all middleware, where the request's id is not known any more.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = False

        async def sent(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, receive, sent)
        except Exception as error:
            if begun:
                raise
            body = body_of(error, f"{scope['method']} {shown_path(scope)}").model_dump()
            await JSONResponse(body, 500)(scope, receive, send)
