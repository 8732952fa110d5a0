"""A free text as it comes: the events of a streamed reply."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from clients.errors import ClientError, InvalidReply, api_error
from clients.replies import Answer, StreamedToken

if TYPE_CHECKING:
    from httpx_sse import ServerSentEvent

_KINDS: dict[str, TypeAdapter[Any]] = {"token": TypeAdapter(StreamedToken), "answer": TypeAdapter(Answer)}
# An error within a stream comes after the status; this is the one that it would have had.
_STATUS = {"PromptTooLong": 413, "EngineFailure": 503, "StoreFailure": 503, "DeadlineExceeded": 504}


def read_event(event: ServerSentEvent) -> StreamedToken | Answer | None:
    """Reads an event; None for one of a kind that is not known, as a newer server may send.

    Raises:
        ApiError: It tells of an error.
        InvalidReply: It does not keep the contract.
    """
    try:
        if event.event == "error":
            body = event.json()
            raise api_error(_STATUS.get(body["error"]["type"], 500), body)
        kind = _KINDS.get(event.event)
        return None if kind is None else kind.validate_json(event.data)
    except (ValidationError, ValueError, KeyError, TypeError) as error:
        raise InvalidReply(
            f"POST /generate: an event {event.event!r} is malformed; another version's server?"
        ) from error


def cut_off() -> ClientError:
    """The error of a stream that ended without its answer."""
    return InvalidReply("POST /generate: the stream ended without an answer; has the server been stopped?")
