"""Prometheus metrics: what the server counts, and what is read off at each scrape."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from importlib import metadata

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.engine import EngineState
from server.schemas import GenerateReply

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SHARES = tuple(i / 20 for i in range(1, 21))
_NATS = (0.001, 0.003, 0.01, 0.03, 0.06, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0)


class Metrics:
    """The metrics of one app, in a registry of its own; names begin with ``abmll_``."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("abmll_requests", "HTTP requests.", ["route", "method", "status"], registry=registry)
        self.request_seconds = Histogram(
            "abmll_request_seconds", "Time to reply.", ["route"], buckets=_SECONDS, registry=registry
        )
        self.engine_seconds = Histogram(
            "abmll_engine_seconds", "Time of a question in the engine.", buckets=_SECONDS, registry=registry
        )
        self.queue_seconds = Histogram(
            "abmll_queue_seconds", "Of that, time in the engine's queue.", buckets=_SECONDS, registry=registry
        )
        self.draws = Histogram(
            "abmll_draws", "Draws of a question.", buckets=(1, 2, 4, 8, 16, 32, 64), registry=registry
        )
        self.confidence = Histogram(
            "abmll_confidence", "Confidence of answers.", ["kind"], buckets=_SHARES, registry=registry
        )
        self.epistemic = Histogram(
            "abmll_epistemic_nats", "Epistemic uncertainty of answers.", ["kind"], buckets=_NATS, registry=registry
        )

    def observe(self, reply: GenerateReply) -> None:
        """Counts an answer."""
        kind = "text" if reply.probabilities is None else "options"
        self.engine_seconds.observe(reply.timing.engine_ms / 1e3)
        self.queue_seconds.observe(reply.timing.queue_ms / 1e3)
        self.draws.observe(reply.draws)
        self.confidence.labels(kind).observe(reply.confidence)
        self.epistemic.labels(kind).observe(reply.uncertainty.epistemic)

    def watch(
        self,
        engine: Callable[[], EngineState | None],
        jobs: Callable[[], tuple[dict[str, int], tuple[int, float]]],
        tasks: Callable[[], int],
        name: str,
    ) -> None:
        """Reads engine, jobs and tasks off at each scrape.

        Args:
            engine: Gives the engine's state; None before it has started.
            jobs: Gives the number of jobs by status, and number and summed seconds of those done.
            tasks: Gives the number of tasks.
            name: The engine's name.
        """
        self.registry.register(_Scraped(engine, jobs, tasks, name))

    def text(self) -> bytes:
        """Returns all metrics, and those that others (vLLM, the process) keep in the default registry."""
        return generate_latest(self.registry) + generate_latest(REGISTRY)


class _Scraped(Collector):
    def __init__(
        self,
        engine: Callable[[], EngineState | None],
        jobs: Callable[[], tuple[dict[str, int], tuple[int, float]]],
        tasks: Callable[[], int],
        name: str,
    ) -> None:
        self.engine, self.jobs, self.tasks, self.name = engine, jobs, tasks, name

    def collect(self) -> Iterable[Metric]:
        yield InfoMetricFamily(
            "abmll_build", "What runs.", value={"version": metadata.version("abmll"), "engine": self.name}
        )
        state = self.engine() or EngineState(False, 0, 0, 0, 0, 0)
        yield GaugeMetricFamily("abmll_engine_up", "Whether the engine answers.", value=float(state.healthy))
        yield GaugeMetricFamily("abmll_engine_queued", "Questions in the engine's queue.", value=state.queued)
        yield GaugeMetricFamily("abmll_adapters_resident", "Draws resident in the engine.", value=state.adapters)
        yield CounterMetricFamily("abmll_adapter_loads", "Draws made and loaded.", value=state.loads)
        yield CounterMetricFamily("abmll_adapter_hits", "Draws needed and resident.", value=state.hits)
        yield CounterMetricFamily("abmll_adapter_evictions", "Draws given up for others.", value=state.evictions)
        counts, (done, seconds) = self.jobs()
        ended = CounterMetricFamily("abmll_adaptation_jobs", "Adaptation jobs that ended.", labels=["status"])
        for status in ("done", "failed", "cancelled"):
            ended.add_metric([status], counts.get(status, 0))
        yield ended
        for status in ("queued", "running"):
            yield GaugeMetricFamily(
                f"abmll_adaptation_{status}", f"Adaptation jobs {status}.", value=counts.get(status, 0)
            )
        yield CounterMetricFamily("abmll_adaptation_seconds", "Run time of adaptation jobs done.", value=seconds)
        yield CounterMetricFamily("abmll_adaptation_done", "Adaptation jobs that this time was spent on.", value=done)
        yield GaugeMetricFamily("abmll_tasks", "Tasks in the store.", value=self.tasks())


class Measured:
    """Middleware that counts and times requests, by the route's template, not by the path asked."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, status = time.perf_counter(), 500

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, sent)
        finally:
            route = getattr(scope.get("route"), "path", "unmatched")
            self.metrics.requests.labels(route, scope["method"], str(status)).inc()
            self.metrics.request_seconds.labels(route).observe(time.perf_counter() - begun)
