"""Who may call what: API keys and their rates, checked before a request's body is read."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import Request, Response, Security
from fastapi.params import Depends
from fastapi.params import Security as SecurityParam
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from abmll.errors import Forbidden, RateLimited, Unauthorized
from server.bodies import BoundedRequest
from server.keys import Key, Keys, parse_rate
from server.logs import current_request

_BEARER = HTTPBearer(auto_error=False, scheme_name="key", description="A key that `abmll keys add` made.")
# Any key will do.
ANY = "any"


class Access:
    """Checks keys, rights and rates.

    Args:
        keys: The keys; None where everybody may do everything.
    """

    def __init__(self, keys: Keys | None) -> None:
        self.keys = keys
        self._limiter = MovingWindowRateLimiter(MemoryStorage())
        # The keys' file may be locked, or its volume hang: threads that nothing else needs.
        self._readers = ThreadPoolExecutor(2, thread_name_prefix="keys")

    def needs(self, right: str) -> list[Depends]:
        """Dependencies of a route that only keys with a right may call; the documentation shows them."""
        return [] if self.keys is None else [Security(_BEARER, scopes=[right])]

    @property
    def statuses(self) -> tuple[int, ...]:
        """Statuses that a refused request gets."""
        return () if self.keys is None else (401, 403, 429, 503)

    async def check(self, request: Request, right: str) -> None:
        """Lets a request pass, or not.

        Raises:
            Unauthorized: No key, or one that is unknown.
            Forbidden: The key lacks the right.
            RateLimited: The key has asked too often.
            StoreFailure: The keys cannot be read.
        """
        assert self.keys is not None
        scheme, _, secret = request.headers.get("Authorization", "").partition(" ")
        key = None
        if scheme.lower() == "bearer":
            key = await asyncio.get_running_loop().run_in_executor(self._readers, self.keys.find, secret.strip())
        if key is None:
            wrong = "this key is unknown or revoked" if secret else "a key is needed"
            raise Unauthorized(f"{wrong}; send one as `Authorization: Bearer KEY`")
        context = current_request()
        if context is not None:
            context.key = key.name
        if right != ANY and right not in key.rights:
            raise Forbidden(f"the key {key.name!r} lacks the right {right!r}; it has {', '.join(sorted(key.rights))}")
        self._check_rate(key)

    def _check_rate(self, key: Key) -> None:
        if key.rate is None:
            return
        item = parse_rate(key.rate)
        if not self._limiter.hit(item, key.name):
            seconds = max(1, math.ceil(self._limiter.get_window_stats(item, key.name).reset_time - time.time()))
            raise RateLimited(f"the key {key.name!r} may ask {key.rate}; ask again in {seconds} s", seconds)

    def route_class(self) -> type[APIRoute]:
        """The class of routes that check before the body is read, and what it may be."""
        check = self.check

        class Guarded(APIRoute):
            def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
                handler = super().get_route_handler()
                scopes = [
                    scope
                    for need in self.dependencies
                    if isinstance(need, SecurityParam)
                    for scope in need.scopes or ()
                ]

                async def checked(request: Request) -> Response:
                    for scope in scopes:
                        await check(request, scope)
                    return await handler(BoundedRequest(request.scope, request.receive))

                return checked

        return Guarded
