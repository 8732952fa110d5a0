"""The errors that the client raises; every message says what was wrong and what would help."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clients.replies import Job


class ClientError(Exception):
    """Base of all errors that the client raises on purpose."""


class InvalidArgument(ClientError):
    """An argument that no request can hold."""


class ServerUnreachable(ClientError):
    """No connection to the server, or one that broke before the reply."""


class ReplyTimeout(ClientError):
    """The server did not reply in time; it may still be at work on the request."""


class InvalidReply(ClientError):
    """A reply that does not keep the contract: another server, or another version of it."""


class InvalidFile(ClientError):
    """A file of examples that cannot be read."""


class ApiError(ClientError):
    """The server said no.

    Attributes:
        status: HTTP status.
        type: The server's kind of error, such as ``TaskNotFound``.
        message: What was wrong and what would be right.
        field: The input at fault, where there is one.
        retry_after: Seconds after which to ask again, where the server says them.
    """

    def __init__(
        self, status: int, type: str, message: str, field: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.type = type
        self.message = message
        self.field = field
        self.retry_after = retry_after


class RequestRejected(ApiError):
    """400, 413 or 422: the request cannot be served as it stands."""


class AccessDenied(ApiError):
    """401 or 403: no key, an unknown one, or one without the right."""


class NotFound(ApiError):
    """404: no such task or job."""


class Conflict(ApiError):
    """409: the task cannot be changed now."""


class ServerUnavailable(ApiError):
    """429, 502, 503 or 504: starting, overloaded or broken; later may help, see ``retry_after``."""


class JobError(ClientError):
    """An adaptation job that did not give a posterior.

    Attributes:
        job: The job as last seen.
    """

    def __init__(self, message: str, job: Job) -> None:
        super().__init__(message)
        self.job = job


class JobFailed(JobError):
    """The job ended with an error."""


class JobCancelled(JobError):
    """The job was cancelled."""


class JobTimeout(JobError):
    """The job was still under way when the waiting ended; it runs on."""


_KINDS: dict[int, type[ApiError]] = {
    400: RequestRejected,
    413: RequestRejected,
    422: RequestRejected,
    401: AccessDenied,
    403: AccessDenied,
    404: NotFound,
    409: Conflict,
    429: ServerUnavailable,
    502: ServerUnavailable,  # a proxy's word for a server that starts anew
    503: ServerUnavailable,
    504: ServerUnavailable,
}


def api_error(status: int, body: object, retry_after: str | None = None) -> ApiError:
    """Returns the error that a reply tells of.

    Args:
        status: The reply's.
        body: Its parsed JSON, or its text.
        retry_after: The header, where there is one.
    """
    kind = _KINDS.get(status, ApiError)
    seconds = int(retry_after) if retry_after is not None and retry_after.isascii() and retry_after.isdigit() else None
    match body:
        case {"error": {"type": str(name), "message": str(message), **rest}}:
            field = rest.get("field")
            return kind(status, name, message, field if isinstance(field, str) else None, seconds)
        case _:
            message = f"the server replied {status}: {str(body)[:200] or 'no text'}"
            return kind(status, "HTTPError", message, None, seconds)
