"""Traces: a span for each request, its stages and each adaptation job, sent to an OpenTelemetry collector.

Off unless ``otlp_endpoint`` is set; then, and only then, OpenTelemetry is imported. No span holds what people ask.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from abmll.errors import AbmllError
from server.jobs import Job
from server.logs import QUIET, current_request
from server.schemas import GenerateReply
from server.settings import Settings

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span, Tracer
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

_PROTOCOL = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"
_GENERAL_PROTOCOL = "OTEL_EXPORTER_OTLP_PROTOCOL"  # of metrics and logs too; vLLM does not look at it
# What OpenTelemetry, and vLLM with it, reads from the environment; what the user has set stays.
_DEFAULTS = {
    "OTEL_SERVICE_NAME": "abmll",
    "OTEL_BSP_SCHEDULE_DELAY": "1000",  # milliseconds: a span can be looked at soon, and few are lost with a process
    "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT": "3",  # seconds that a collector which hangs may hold the server's end up
}


@dataclass(frozen=True)
class _Here:
    """The trace at hand: its first span, and the innermost one."""

    tracer: Tracer
    root: Span
    inner: Span


_CURRENT: ContextVar[_Here | None] = ContextVar("abmll_trace", default=None)


def tell(**what: str | float | None) -> None:
    """Adds attributes to the span of the request or job at hand; does nothing without one."""
    here = _CURRENT.get()
    if here is not None:
        here.root.set_attributes({f"abmll.{name}": value for name, value in what.items() if value is not None})


def tell_answer(reply: GenerateReply) -> None:
    """Adds what is known of an answer, none of its words."""
    tell(
        task=reply.task,
        version=reply.posterior.version,
        draws=reply.draws,
        confidence=reply.confidence,
        epistemic_nats=reply.uncertainty.epistemic,
        abstained=reply.abstained is not None,
    )


@contextmanager
def stage(name: str) -> Generator[None]:
    """Makes a span of what is done within, below the one at hand; does nothing without one."""
    here = _CURRENT.get()
    if here is None:
        yield
        return
    from opentelemetry.trace import set_span_in_context

    span = here.tracer.start_span(name, set_span_in_context(here.inner))
    with _within(_Here(here.tracer, here.root, span)):
        yield


def trace_headers() -> dict[str, str] | None:
    """The span at hand as W3C headers, for an engine that traces too; None without one."""
    here = _CURRENT.get()
    if here is None:
        return None
    from opentelemetry.trace import set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    headers: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(headers, set_span_in_context(here.inner))
    return headers


def vllm_arguments(settings: Settings) -> dict[str, Any]:
    """Arguments that have vLLM's engine send its own spans to the same collector."""
    return {} if settings.otlp_endpoint is None else {"otlp_traces_endpoint": settings.otlp_endpoint}


@contextmanager
def _within(here: _Here) -> Generator[None]:
    """Makes a trace's span the one at hand, and ends it."""
    from opentelemetry.trace import StatusCode

    before = _CURRENT.get()
    _CURRENT.set(here)
    try:
        yield
    except BaseException as error:
        # The error's kind alone: its message may quote a question.
        here.inner.set_attribute("error.type", type(error).__name__)
        here.inner.set_status(StatusCode.ERROR)
        raise
    finally:
        _CURRENT.set(before)
        here.inner.end()


class Tracing:
    """Makes spans and sends them, in batches and in a thread of its own: full or failing, it drops them.

    Args:
        endpoint: The collector: with a path by HTTP, without by gRPC, unless the environment names the protocol.

    Raises:
        AbmllError: OpenTelemetry is not installed.
    """

    def __init__(self, endpoint: str) -> None:
        fitting = "http/protobuf" if urlsplit(endpoint).path.strip("/") else "grpc"
        protocol = os.environ.get(_GENERAL_PROTOCOL) or fitting
        for name, value in (_DEFAULTS | {_PROTOCOL: protocol}).items():
            os.environ.setdefault(name, value)
        try:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor

            exporter = _exporter(endpoint, os.environ[_PROTOCOL])
        except ImportError as error:
            raise AbmllError(
                f"traces need OpenTelemetry ({error}); install opentelemetry-sdk and opentelemetry-exporter-otlp, or "
                "leave otlp_endpoint out"
            ) from error
        # It tells of every attempt that failed, `_Told` of the first.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        version = metadata.version("abmll")
        # Not set as the process's provider: that is vLLM's to set.
        self._provider = TracerProvider(resource=Resource.create({"service.version": version}), shutdown_on_exit=False)
        self._exporter = _Told(exporter, endpoint, os.environ[_PROTOCOL])
        self._provider.add_span_processor(BatchSpanProcessor(cast(Any, self._exporter)))
        self._tracer = self._provider.get_tracer("abmll", version)

    @classmethod
    def of(cls, settings: Settings) -> Tracing | None:
        """The traces that settings ask for; None without an endpoint."""
        return None if settings.otlp_endpoint is None else cls(settings.otlp_endpoint)

    @contextmanager
    def request(self, method: str, headers: Sequence[tuple[bytes, bytes]]) -> Generator[Span]:
        """A request's span, below the one that its ``traceparent`` names."""
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier = {
            name.decode("latin-1"): value.decode("latin-1")
            for name, value in headers
            if name in (b"traceparent", b"tracestate")
        }
        parent = TraceContextTextMapPropagator().extract(carrier)
        span = self._tracer.start_span(method, parent, SpanKind.SERVER, {"http.request.method": method})
        with _within(_Here(self._tracer, span, span)):
            yield span

    @contextmanager
    def job(self, job: Job) -> Generator[None]:
        """An adaptation job's span, a trace of its own; ``abmll.job`` is on the request's that asked for it too."""
        span = self._tracer.start_span("adaptation job")
        with _within(_Here(self._tracer, span, span)):
            tell(job=job.id, task=job.task, attempt=job.attempts + 1)
            yield

    def close(self) -> None:
        """Sends what is left; waits a few seconds for it at most."""
        self._exporter.closing = True
        self._provider.shutdown()


def of_job(tracing: Tracing | None, job: Job) -> AbstractContextManager[None]:
    """The span of a job while it is done; nothing without traces."""
    return nullcontext() if tracing is None else tracing.job(job)


class Traced:
    """Middleware that makes each request's span, named by the route's template, not by the path asked."""

    def __init__(self, app: ASGIApp, tracing: Tracing) -> None:
        self.app, self.tracing = app, tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on."""
        if scope["type"] != "http" or scope["path"] in QUIET:
            await self.app(scope, receive, send)
            return
        from opentelemetry.trace import StatusCode

        with self.tracing.request(scope["method"], scope["headers"]) as span:
            status = 500

            async def sent(message: Message) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                await send(message)

            try:
                await self.app(scope, receive, sent)
            finally:
                context, route = current_request(), getattr(scope.get("route"), "path", None)
                tell(request_id=None if context is None else context.id)
                span.set_attribute("http.response.status_code", status)
                if route is not None:
                    span.update_name(f"{scope['method']} {route}")
                    span.set_attribute("http.route", route)
                if status >= 500:
                    span.set_status(StatusCode.ERROR)


def _exporter(endpoint: str, protocol: str) -> SpanExporter:
    if protocol == "http/protobuf":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as ByHttp

        return ByHttp(endpoint=endpoint)
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as ByGrpc

        return ByGrpc(endpoint=endpoint)
    names = f"{_PROTOCOL} (or {_GENERAL_PROTOCOL})"
    raise AbmllError(f"{names} is {protocol!r}; give grpc or http/protobuf, or leave it out")


class _Told:
    """An exporter that says once that the collector does not take spans, and once that it does again."""

    def __init__(self, exporter: SpanExporter, endpoint: str, protocol: str) -> None:
        self._exporter, self._where = exporter, f"{endpoint} ({protocol})"
        self._failing = self.closing = False

    def export(self, spans: Sequence[ReadableSpan]) -> Any:
        from opentelemetry.sdk.trace.export import SpanExportResult

        result = SpanExportResult.FAILURE
        if self.closing and self._failing:
            return result
        try:
            result = self._exporter.export(spans)
        except Exception as error:
            logger.debug("spans were not sent: %s", error)
        failed = result is not SpanExportResult.SUCCESS
        if failed and not self._failing:
            logger.warning("traces do not reach %s; they are dropped until it takes them", self._where)
        if self._failing and not failed:
            logger.info("traces reach %s again", self._where)
        self._failing = failed
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return self._exporter.force_flush(timeout_millis)
