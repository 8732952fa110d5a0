"""What a request's body may be: how large, how slow, and of how many values."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Values in a body, at most. A wrong one costs far more than its bytes: an error that describes it.
MAX_VALUES = 20_000
# Between two parts of a body.
BODY_SECONDS = 30.0
_SHORT = 100_000


class BodyLimit:
    """Middleware that refuses bodies of more than ``limit`` bytes with 413, whatever length the client declares.

    One that does not come to its end is given up with 408.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        read = int(declared) if declared.isdigit() else 0
        counting, whole = read == 0, False

        async def received() -> Message:
            nonlocal read, whole
            if read <= self.limit:
                message = await (receive() if whole else _soon(receive))
                whole = not message.get("more_body", False)
                if counting:
                    read += len(message.get("body", b""))
                if read <= self.limit:
                    return message
            # Raised where the body is read, so that the reply is made as all others.
            raise HTTPException(413, f"the body is larger than {self.limit} bytes; send less at a time")

        await self.app(scope, received, send)


async def _soon(receive: Receive) -> Message:
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await receive()
    except TimeoutError as error:
        raise HTTPException(
            408, f"no part of the body came in {BODY_SECONDS:.0f} s; send it whole", {"Connection": "close"}
        ) from error


class BoundedRequest(Request):
    """A request whose JSON, where it is long, is read apart from the event loop, and holds no endless list."""

    async def json(self) -> Any:
        """Returns the body as JSON.

        Raises:
            HTTPException: It holds too many values.
            ValueError: It is not JSON.
        """
        body = await self.body()
        value = json.loads(body) if len(body) < _SHORT else await run_in_threadpool(json.loads, body)
        count, left = 1, [value]
        while left:
            each = left.pop()
            inside = each.values() if isinstance(each, dict) else each if isinstance(each, list) else ()
            count += len(inside)
            if count > MAX_VALUES:
                raise HTTPException(413, f"the body holds more than {MAX_VALUES} values; send less at a time")
            left += inside
        return value
