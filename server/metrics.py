"""Prometheus metrics: what the server counts, and what is read off at each scrape."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.engine import EngineState
from server.feedback import FIRST, WINDOW
from server.schemas import GenerateReply

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SHARES = tuple(i / 20 for i in range(1, 21))
_NATS = (0.001, 0.003, 0.01, 0.03, 0.06, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0)


@dataclass(frozen=True)
class Snapshot:
    """What is read off at a scrape.

    Attributes:
        engine: The engine's state; None while it starts.
        waiting: Questions that wait for the engine.
        inside: Questions in the engine.
        refused: Questions refused because too many waited.
        disk: Size of the store's disk and what is free there, in bytes; None where it cannot be read.
        tasks: Tasks in the store; None where it cannot be read.
        jobs: Jobs by status; None where the registry cannot be read.
        done: Jobs done.
        seconds: Their run times' sum.
        questions_again: Questions (or their parts) whose scores were there already.
        windows: Task, version and rolling measures of each version that has answered.
        promised: Expected calibration error on the validation set, by task and version.
        engine_restarts: Times that the engine has died.
        worker_restarts: Times that the adaptation process has died.
    """

    engine: EngineState | None
    waiting: int
    inside: int
    refused: int
    disk: tuple[int, int] | None
    tasks: int | None
    jobs: dict[str, int] | None
    done: int
    seconds: float
    questions_again: int
    windows: Sequence[tuple[str, int, dict[str, float]]]
    promised: Mapping[tuple[str, int], float]
    engine_restarts: int
    worker_restarts: int


class Metrics:
    """The metrics of one app, in a registry of its own; names begin with ``abmll_``."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("abmll_requests", "HTTP requests.", ["route", "method", "status"], registry=registry)
        self.streams_broken = Counter(
            "abmll_streams_broken", "Streams that ended with an error after they had begun.", registry=registry
        )
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
        self.abstained = Counter("abmll_abstained", "Answers withheld, not sure enough.", ["kind"], registry=registry)
        self.confidence = Histogram(
            "abmll_confidence", "Confidence of answers.", ["kind"], buckets=_SHARES, registry=registry
        )
        self.epistemic = Histogram(
            "abmll_epistemic_nats", "Epistemic uncertainty of answers.", ["kind"], buckets=_NATS, registry=registry
        )

    def observe(self, reply: GenerateReply, kind: Literal["options", "text", "score"]) -> None:
        """Counts an answer, of our own or of others (``score``)."""
        self.engine_seconds.observe(reply.timing.engine_ms / 1e3)
        self.queue_seconds.observe(reply.timing.queue_ms / 1e3)
        self.draws.observe(reply.draws)
        self.confidence.labels(kind).observe(reply.confidence)
        if reply.abstained is not None:
            self.abstained.labels(kind).inc()
        self.epistemic.labels(kind).observe(reply.uncertainty.epistemic)

    def watch(self, read: Callable[[], Snapshot], name: str) -> None:
        """Reads the server's parts off at each scrape.

        Args:
            read: Gives their state.
            name: The engine's name.
        """
        self.registry.register(_Scraped(read, name))

    def text(self) -> bytes:
        """Returns all metrics, and those that others (vLLM, the process) keep in the default registry."""
        return generate_latest(self.registry) + generate_latest(REGISTRY)


class _Scraped(Collector):
    def __init__(self, read: Callable[[], Snapshot], name: str) -> None:
        self.read, self.name = read, name

    def collect(self) -> Iterable[Metric]:
        seen = self.read()
        yield InfoMetricFamily(
            "abmll_build", "What runs.", value={"version": metadata.version("abmll"), "engine": self.name}
        )
        state = seen.engine or EngineState(False, 0, 0, 0, 0, 0)
        yield GaugeMetricFamily("abmll_engine_up", "Whether the engine answers.", value=float(state.healthy))
        running = int(state.healthy) if state.running is None else state.running
        yield GaugeMetricFamily("abmll_engines_running", "Engines that answer.", value=running)
        yield GaugeMetricFamily("abmll_engines_wanted", "Engines that there are to be at least.", value=state.wanted)
        yield CounterMetricFamily("abmll_engine_restarts", "Times the engine has died.", value=seen.engine_restarts)
        yield GaugeMetricFamily("abmll_waiting", "Questions that wait for the engine.", value=seen.waiting)
        yield GaugeMetricFamily("abmll_inside", "Questions in the engine.", value=seen.inside)
        yield CounterMetricFamily("abmll_refused", "Questions refused, too many waiting.", value=seen.refused)
        yield GaugeMetricFamily("abmll_engine_queued", "Of those inside, in the engine's own queue.",
                                value=state.queued)  # fmt: skip
        yield GaugeMetricFamily("abmll_adapters_resident", "Draws resident in the engine.", value=state.adapters)
        yield CounterMetricFamily("abmll_adapter_loads", "Draws made and loaded.", value=state.loads)
        yield CounterMetricFamily("abmll_adapter_hits", "Draws needed and resident.", value=state.hits)
        yield CounterMetricFamily("abmll_adapter_evictions", "Draws given up for others.", value=state.evictions)
        yield CounterMetricFamily(
            "abmll_worker_restarts", "Times the adaptation process has died.", value=seen.worker_restarts
        )
        yield from self._store(seen)
        yield CounterMetricFamily(
            "abmll_questions_again", "Stages of draws whose scores were there already.", value=seen.questions_again
        )
        yield from _feedback(seen)

    def _store(self, seen: Snapshot) -> Iterable[Metric]:
        usable = seen.jobs is not None and seen.tasks is not None
        yield GaugeMetricFamily("abmll_store_up", "Whether the store can be read.", value=float(usable))
        if seen.disk is not None:
            size, free = seen.disk
            yield GaugeMetricFamily("abmll_store_size_bytes", "Size of the store's disk.", value=size)
            yield GaugeMetricFamily("abmll_store_free_bytes", "Free on the store's disk.", value=free)
        if seen.tasks is not None:
            yield GaugeMetricFamily("abmll_tasks", "Tasks in the store.", value=seen.tasks)
        if seen.jobs is None:
            return
        ended = CounterMetricFamily("abmll_adaptation_jobs", "Adaptation jobs that ended.", labels=["status"])
        for status in ("done", "failed", "cancelled"):
            ended.add_metric([status], seen.jobs.get(status, 0))
        yield ended
        for status in ("queued", "running"):
            yield GaugeMetricFamily(
                f"abmll_adaptation_{status}", f"Adaptation jobs {status}.", value=seen.jobs.get(status, 0)
            )
        yield CounterMetricFamily("abmll_adaptation_seconds", "Run time of adaptation jobs done.", value=seen.seconds)
        yield CounterMetricFamily(
            "abmll_adaptation_done", "Adaptation jobs that this time was spent on.", value=seen.done
        )


_ROLLING = {
    "feedback_count": f"Judged answers among those that the measures look back on, {WINDOW} at most.",
    "feedback_accuracy": "Share of judged answers that were right.",
    "feedback_ece": "Expected calibration error of judged answers, 15 bins.",
    "promised_ece": "Expected calibration error on the posterior's validation set, after calibration.",
    "feedback_brier": "Brier score of judged answers whose right option is known.",
    "feedback_nll": "Negative log-likelihood of the right option in nats, where it is known.",
    "recent_count": f"Answers with options that the next measures look back on, {WINDOW} at most.",
    "recent_confidence": f"Mean confidence of the newest {WINDOW} answers with options.",
    "recent_epistemic_nats": f"Mean epistemic uncertainty of the newest {WINDOW} answers with options.",
    "confidence_drift": f"Recent confidence less that of the version's first {FIRST} answers with options.",
    "epistemic_drift_nats": f"Recent epistemic uncertainty less that of its first {FIRST} answers with options.",
}


def _feedback(seen: Snapshot) -> Iterable[Metric]:
    families = {
        name: GaugeMetricFamily(f"abmll_{name}", text, labels=["task", "version"]) for name, text in _ROLLING.items()
    }
    for task, version, told in seen.windows:
        values = dict(told)
        if (promised := seen.promised.get((task, version))) is not None:
            values["promised_ece"] = promised
        for name, value in values.items():
            families[name].add_metric([task, str(version)], value)
    yield from families.values()


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
