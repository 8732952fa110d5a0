"""The log: text or JSON lines with the request's id, one line a request, and the audit."""

from __future__ import annotations

import logging
import os
import time
import uuid
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pythonjsonlogger.json import JsonFormatter
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from transformers.utils.logging import disable_progress_bar

from server.settings import Settings

_access = logging.getLogger("abmll.access")
_audit = logging.getLogger("abmll.audit")
# Asked every few seconds by machines: their lines would hide the others.
QUIET = ("/healthz", "/readyz", "/metrics")
_HEADER = "X-Request-ID"


@dataclass
class RequestContext:
    """What the log tells of the request at hand.

    Attributes:
        id: Its id, unique.
        key: The name of its API key; None without one.
    """

    id: str = field(default_factory=lambda: uuid.uuid4().hex[:16])
    key: str | None = None


_CURRENT: ContextVar[RequestContext | None] = ContextVar("abmll_request", default=None)


def current_request() -> RequestContext | None:
    """The request at hand; None outside of one."""
    return _CURRENT.get()


class _Context(logging.Filter):
    """Adds the request's id and key to each line."""

    def filter(self, record: logging.LogRecord) -> bool:
        context = current_request()
        if context is not None:
            record.request_id = context.id
            if context.key is not None:
                record.key = context.key
        return True


def json_formatter() -> logging.Formatter:
    """One JSON object a line; vLLM's processes use it too, see ``vllm_logging.json``."""
    return JsonFormatter(
        ["asctime", "levelname", "name", "message"],
        rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
        datefmt="%Y-%m-%dT%H:%M:%S%z",
    )


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        context = getattr(record, "request_id", None)
        key = getattr(record, "key", None)
        return line if context is None else f"{line} [{context}{'' if key is None else f' {key}'}]"


def configure(settings: Settings) -> None:
    """Sets the log of this process up."""
    handler = logging.StreamHandler()
    if settings.log_format == "json":
        handler.setFormatter(json_formatter())
        os.environ.setdefault("VLLM_LOGGING_CONFIG_PATH", str(Path(__file__).with_name("vllm_logging.json")))
        os.environ.setdefault("TQDM_DISABLE", "1")  # for the processes that follow
        disable_progress_bar()  # for this one, which has read that variable
    else:
        handler.setFormatter(_TextFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.addFilter(_Context())
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler], force=True)
    for chatty in ("httpx", "httpx2", "httpcore", "filelock", "urllib3"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def audit(action: str, **what: Any) -> None:
    """Writes who changed what: the key's name and the request's id come by themselves."""
    told = " ".join(f"{name}={value}" for name, value in what.items())
    _audit.info("%s %s", action, told, extra={"action": action, **what})


def shown_path(scope: Scope) -> str:
    """A request's path as the log has it: on one line."""
    return scope["path"][:200].encode("unicode_escape").decode()


class Logged:
    """Middleware that gives each request an id, tells it in ``X-Request-ID``, and writes its line.

    The line holds no query string and no body: what people ask is not for the log.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        context = RequestContext()
        token = _CURRENT.set(context)
        begun, status = time.perf_counter(), 500

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[_HEADER] = context.id
            await send(message)

        try:
            await self.app(scope, receive, sent)
        finally:
            path, ms = shown_path(scope), round(1000 * (time.perf_counter() - begun), 1)
            _access.log(
                logging.DEBUG if scope["path"] in QUIET else logging.INFO,
                "%s %s %d %.1f ms", scope["method"], path, status, ms,
                extra={"method": scope["method"], "path": path, "status": status, "ms": ms},
            )  # fmt: skip
            _CURRENT.reset(token)
