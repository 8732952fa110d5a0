"""Middleware that refuses a body that is too large before it is read into memory."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class BodyLimit:
    """Refuses bodies of more than ``limit`` bytes with 413, whatever length the client declares."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        read = int(declared) if declared.isdigit() else 0
        counting = read == 0

        async def received() -> Message:
            nonlocal read
            if read <= self.limit:
                message = await receive()
                if counting:
                    read += len(message.get("body", b""))
                if read <= self.limit:
                    return message
            # Raised where the body is read, so that the reply is made as all others.
            raise HTTPException(413, f"the body is larger than {self.limit} bytes; send less at a time")

        await self.app(scope, received, send)
