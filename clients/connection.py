"""What both clients know of a connection: address, times, what to try again, and whose fault an error is."""

from __future__ import annotations

import os
import time
from typing import Any

import httpx

from clients.calls import Call
from clients.errors import ClientError, JobTimeout, ReplyTimeout, ServerUnreachable
from clients.replies import Job

DEFAULT_URL = "http://127.0.0.1:8000"
_CONNECT_SECONDS = 5.0
_PAUSES = (0.2, 0.8)  # seconds before a GET whose connection failed is sent again
BROKEN = (httpx.NetworkError, httpx.RemoteProtocolError, httpx.ConnectTimeout)


def settings_of(url: str | None, timeout: float, key: str | None) -> dict[str, Any]:
    """Returns what httpx's clients take: address, times and headers.

    Raises:
        ServerUnreachable: The address is none.
        ClientError: The key holds characters that no key has.
    """
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
        "timeout": httpx.Timeout(timeout, connect=min(timeout, _CONNECT_SECONDS)),
        "headers": {"Accept": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {}),
    }


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
