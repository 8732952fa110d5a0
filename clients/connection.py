"""What both clients know of a connection: address, times, what to try again, and whose fault an error is."""

from __future__ import annotations

import math
import os
import time
from typing import Any

import httpx

from clients.calls import Call, request_of
from clients.errors import ApiError, ClientError, JobTimeout, ReplyTimeout, ServerUnavailable, ServerUnreachable
from clients.replies import Job

DEFAULT_URL = "http://127.0.0.1:8000"
# More than the server's own, so that it is the server that says what took too long.
DEFAULT_TIMEOUT = 70.0
_MORE_SECONDS = 10.0
_CONNECT_SECONDS = 5.0
_LEAST_SECONDS = 1.0  # that a reply may take, however little is left of a waiting
_LONGEST_SECONDS = (2**31 - 1) / 1000  # that a socket can wait; with more it raises OverflowError
_PAUSES = (0.2, 0.8)  # seconds before a GET whose connection failed is sent again
BROKEN = (httpx.NetworkError, httpx.RemoteProtocolError, httpx.ConnectTimeout)
# A job goes on through these.
PASSING = (ServerUnreachable, ServerUnavailable, ReplyTimeout)
_PATIENCE_SECONDS = 120.0


def settings_of(url: str | None, timeout: float, key: str | None) -> dict[str, Any]:
    """Returns what httpx's clients take: address, times and headers.

    Raises:
        ServerUnreachable: The address is none.
        ClientError: The key holds characters that no key has, or the time is no number above 0.
    """
    if not (isinstance(timeout, int | float) and timeout > 0) or isinstance(timeout, bool):
        raise ClientError(f"timeout is {timeout!r}; give seconds above 0")
    base = (url or os.environ.get("ABMLL_URL") or DEFAULT_URL).rstrip("/")
    try:
        parsed = httpx.URL(base)
    except httpx.InvalidURL as error:
        raise ServerUnreachable(f"{base!r} is not a URL ({error}); give one such as {DEFAULT_URL}") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ServerUnreachable(f"{base!r} is not a server's URL; give one such as {DEFAULT_URL}")
    key = key or os.environ.get("ABMLL_KEY")
    if key is not None and not (key.isascii() and key.isprintable()):
        raise ClientError("the API key holds characters that no key has; give it as `abmll keys add` printed it")
    return {
        "base_url": base,
        "timeout": httpx.Timeout(_limit(timeout), connect=min(timeout, _CONNECT_SECONDS)),
        "headers": {"Accept": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {}),
    }


def sent(call: Call[Any], usual: httpx.Timeout, deadline: float | None = None) -> dict[str, Any]:
    """Returns what httpx takes for a call: a question with a time of its own may take that, and be replied to.

    Args:
        call: The call.
        usual: The connection's times.
        deadline: Until when the caller waits, by ``time.monotonic``.

    Raises:
        InvalidArgument: Something in the body has no form in JSON.
    """
    wanted = request_of(call)
    usually = math.inf if usual.read is None else usual.read
    if deadline is not None:
        seconds = min(usually, max(_LEAST_SECONDS, rest(deadline)))
    elif call.timeout is not None:
        seconds = max(usually, call.timeout + _MORE_SECONDS)
    else:
        return wanted
    return wanted | {"timeout": httpx.Timeout(_limit(seconds), connect=min(usual.connect or math.inf, seconds))}


def rest(deadline: float | None) -> float:
    """Returns the seconds until a time by ``time.monotonic``; infinite for None."""
    return math.inf if deadline is None else max(0.0, deadline - time.monotonic())


def _limit(seconds: float) -> float | None:
    return seconds if seconds <= _LONGEST_SECONDS else None


def pauses(call: Call[Any]) -> tuple[float | None, ...]:
    """Seconds to wait after each failed attempt; None: give up."""
    return (*_PAUSES, None) if call.method == "GET" else (None,)


def translate(error: httpx.HTTPError, url: httpx.URL) -> ClientError:
    """Returns our error for one of httpx."""
    if isinstance(error, BROKEN):
        return ServerUnreachable(f"no server answers at {url} ({error or type(error).__name__})")
    if isinstance(error, httpx.TimeoutException):
        return ReplyTimeout(f"{url} did not reply in time; give a longer timeout, or ask again later")
    return ClientError(f"the request to {url} failed: {error or type(error).__name__}")


def check_deadline(job: Job, deadline: float | None) -> None:
    """Checks that the waiting for a job may go on.

    Raises:
        JobTimeout: Its time is up.
    """
    if deadline is not None and time.monotonic() >= deadline:
        raise JobTimeout(f"job {job.job} was still {job.status} when the waiting ended; it runs on", job)


class Patience:
    """How long a server is asked again that does not answer: it may be starting anew, or overloaded.

    A pause that the server asks for is made in full, be it longer than the patience; what follows it may end it.

    Args:
        poll: Seconds between attempts, where the server does not say them.
        deadline: Until when the caller waits, by ``time.monotonic``; None for as long as it takes.
    """

    def __init__(self, poll: float, deadline: float | None = None) -> None:
        self._poll, self._deadline = poll, deadline
        self._end = time.monotonic() + _PATIENCE_SECONDS

    def pause(self, error: ClientError) -> float:
        """Returns the seconds until the next attempt, after one that ended with an error.

        Raises:
            ClientError: The error itself: it does not pass.
        """
        if time.monotonic() >= self._end:
            raise error
        asked = error.retry_after if isinstance(error, ApiError) else None
        return min(asked or self._poll, rest(self._deadline), _LONGEST_SECONDS)
