"""How long and how much a connection may take to say what it wants, before anything is known of who it is."""

from __future__ import annotations

import asyncio
import resource
from typing import Any, cast

from uvicorn.protocols.http.h11_impl import H11Protocol

# Until the head of a request is there, from the connection's begin or the head's first byte on.
HEAD_SECONDS = 15.0


class ImpatientProtocol(H11Protocol):
    """uvicorn's protocol that bounds a request's head (64 KiB); it closes connections that never send one, too.

    Its other protocol, httptools, has a head of any length put together in memory.
    """

    _late: asyncio.TimerHandle | None = None

    def connection_made(  # pyright: ignore[reportIncompatibleMethodOverride] -- uvicorn names its transport more narrowly
        self, transport: asyncio.Transport
    ) -> None:
        """Begins to wait for a head."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Takes a part of a request."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Waits no more."""
        super().connection_lost(exc)
        self._forget()

    @property
    def _waits(self) -> bool:
        # uvicorn's annotation does not say that there is none before the first request.
        cycle = cast(Any, self.cycle)
        return cycle is None or cycle.response_complete

    def _watch(self) -> None:
        if not self._waits:
            self._forget()
        elif self._late is None:
            self._late = asyncio.get_running_loop().call_later(HEAD_SECONDS, self._close)

    def _forget(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _close(self) -> None:
        self._late = None
        if self._waits:
            self.transport.close()


def allow_connections() -> None:
    """Raises this process's limit of open files, which connections are, to what the system lets it have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
