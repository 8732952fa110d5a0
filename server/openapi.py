"""What the OpenAPI page says of replies, besides their schemas."""

from __future__ import annotations

from typing import Any

from server.schemas import ErrorReply

_REASONS = {
    400: "The body is not JSON.",
    401: "No API key, or one that is unknown or revoked.",
    403: "The API key lacks the right.",
    404: "No such task, version, job or answer.",
    409: "The task is reserved, or a job for it is under way.",
    413: "Prompt and answer exceed the model's context, or the body the server's limit.",
    422: "A field is missing, unknown, of the wrong type, or out of range.",
    429: "Too much waits already, or the API key has asked too often; ask again after the seconds in `Retry-After`.",
    500: "The server failed, or a stored posterior is damaged.",
    503: "The engine cannot answer, or the store cannot be written, at present; ask again after `Retry-After`.",
    504: "No answer within the time that the request or the server gives.",
}

# What else the reply to a question may be.
EVENTS: dict[str, Any] = {
    "description": "The reply; with `stream`, server-sent events: `token` (a `StreamedToken`), then `answer` (the "
    "reply) or `error` (an `ErrorReply`).",
    "content": {
        "text/event-stream": {
            "schema": {
                "type": "object",
                "properties": {"event": {"enum": ["token", "answer", "error"]}, "data": {"type": "string"}},
                "required": ["event", "data"],
            }
        }
    },
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What a route may reply besides, by status."""
    return {status: {"model": ErrorReply, "description": _REASONS[status]} for status in statuses}
