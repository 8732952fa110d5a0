"""Traces as a collector gets them, from a real server over OTLP."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from pydantic import ValidationError

from abmll.errors import AbmllError
from server.settings import Settings
from server.tracing import Tracing, vllm_arguments
from tests.server.collector import Collector, told
from tests.server.conftest import Server, free_port, wait_for
from tests.server.test_http import EXAMPLES, QUESTION

SECRET = "whoever reads this in a trace has read a question"
PROTOCOL, GENERAL = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with closing(Collector()) as made:
        yield made


@pytest.fixture(scope="module")
def traced(collector: Collector, start_server: Callable[..., Server]) -> Server:
    return start_server(otlp_endpoint=collector.endpoint)


def test_an_answer_is_a_span_below_the_callers_with_its_stages_and_doubt(traced: Server, collector: Collector) -> None:
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    question = QUESTION | {"prompt": SECRET, "draws": 2}
    reply = traced.http.post("/generate", json=question, headers=headers)
    answer = reply.json()
    span = collector.wait("POST /generate", **{"abmll.request_id": reply.headers["X-Request-ID"]})
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert told(span) == {
        "http.request.method": "POST",
        "http.route": "/generate",
        "http.response.status_code": 200,
        "abmll.request_id": answer["request_id"],
        "abmll.task": "global",
        "abmll.version": 1,
        "abmll.draws": 2,
        "abmll.confidence": answer["confidence"],
        "abmll.epistemic_nats": answer["uncertainty"]["epistemic"],
        "abmll.abstained": False,
    }
    stages = {each.name: each for each in collector.spans() if each.parent_span_id == span.span_id}
    assert stages.keys() == {"queue", "engine"}
    assert span.start_time_unix_nano <= stages["queue"].end_time_unix_nano <= stages["engine"].start_time_unix_nano
    took = (stages["engine"].end_time_unix_nano - stages["engine"].start_time_unix_nano) / 1e6
    assert 0 < took <= answer["timing"]["engine_ms"]
    (resource,) = ExportTraceServiceRequest.FromString(collector.bodies[0]).resource_spans
    assert told(resource.resource)["service.name"] == "abmll"


def test_a_stream_is_one_span_with_its_answer(traced: Server, collector: Collector) -> None:
    asked = {"prompt": SECRET, "max_tokens": 4, "draws": 2, "stream": True}
    reply = traced.http.post("/generate", json=asked)
    span = collector.wait("POST /generate", **{"abmll.request_id": reply.headers["X-Request-ID"]})
    assert 0 <= told(span)["abmll.confidence"] <= 1
    assert {each.name for each in collector.spans() if each.parent_span_id == span.span_id} == {"queue", "engine"}


def test_spans_are_named_by_templates_and_hold_no_path_and_no_words(traced: Server, collector: Collector) -> None:
    wanted = {path: traced.http.get(path).headers["X-Request-ID"] for path in ("/tasks/no-such-one", "/nowhere?q=1")}
    refused = traced.http.post("/generate", json=QUESTION | {"prompt": SECRET, "task": SECRET})
    assert refused.status_code in (404, 422)
    known = collector.wait("GET /tasks/{name}", **{"abmll.request_id": wanted["/tasks/no-such-one"]})
    assert told(known)["http.response.status_code"] == 404
    unknown = collector.wait("GET", **{"abmll.request_id": wanted["/nowhere?q=1"]})
    assert "http.route" not in told(unknown)
    collector.wait("POST /generate", **{"abmll.request_id": refused.headers["X-Request-ID"]})
    sent = b"".join(collector.bodies)
    assert not [word for word in (SECRET, "no-such-one", "nowhere", "readyz") if word.encode() in sent]


def test_an_adaptation_job_is_a_span_that_names_its_job(traced: Server, collector: Collector) -> None:
    job = traced.http.post("/adapt", json={"task": "traced", "examples": EXAMPLES[:4], "steps": 1}).json()["job"]
    assert traced.wait_job(job)["status"] == "done"
    asked = collector.wait("POST /adapt", **{"abmll.job": job})
    assert told(asked)["abmll.task"] == "traced"
    span = collector.wait("adaptation job", **{"abmll.job": job})
    assert told(span) == {"abmll.job": job, "abmll.task": "traced", "abmll.attempt": 1, "abmll.status": "done"}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment that says nothing of traces, and is as before afterwards."""
    for name in (PROTOCOL, GENERAL, "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "OTEL_SERVICE_NAME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    return monkeypatch


@pytest.mark.parametrize(("protocol", "path"), [("grpc", ""), ("http/protobuf", "/v1/traces")])
def test_a_collector_that_is_down_is_told_once_and_slows_nothing(
    environment: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, protocol: str, path: str
) -> None:
    environment.setenv("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "1")
    endpoint = f"http://127.0.0.1:{free_port()}{path}"
    tracing = Tracing(endpoint)
    times: list[float] = []
    for _ in range(3):
        begun = time.perf_counter()
        with tracing.request("GET", []):
            pass
        times.append(time.perf_counter() - begun)
        time.sleep(0.1)
    wait_for(lambda: bool(caplog.records))
    tracing.close()
    assert sorted(times)[1] < 0.5  # half of what it waits for the collector
    warned = [record.getMessage() for record in caplog.records]
    assert warned == [f"traces do not reach {endpoint} ({protocol}); they are dropped until it takes them"]


def test_an_endpoint_without_a_path_is_spoken_to_by_grpc(environment: pytest.MonkeyPatch) -> None:
    got: list[Any] = []

    class Service(trace_service_pb2_grpc.TraceServiceServicer):
        def Export(self, request: Any, context: Any) -> ExportTraceServiceResponse:  # noqa: N802 -- gRPC's name
            got.append(request)
            return ExportTraceServiceResponse()

    receiver = grpc.server(ThreadPoolExecutor(1))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Service(), receiver)
    port = receiver.add_insecure_port("127.0.0.1:0")
    receiver.start()
    tracing = Tracing(f"http://127.0.0.1:{port}")
    with tracing.request("GET", []):
        pass
    tracing.close()
    receiver.stop(None)
    (request,) = got
    assert request.resource_spans[0].scope_spans[0].spans[0].name == "GET"


def test_a_protocol_that_is_not_spoken_is_refused_with_those_that_are(environment: pytest.MonkeyPatch) -> None:
    environment.setenv(GENERAL, "http/json")
    with pytest.raises(AbmllError, match="'http/json'; give grpc or http/protobuf"):
        Tracing("http://127.0.0.1:4317")
    environment.setenv(PROTOCOL, "grpc")  # of traces alone: it comes first
    Tracing("http://127.0.0.1:4317").close()


def test_nothing_of_it_is_loaded_unless_asked_for(server: Server, traced: Server) -> None:
    def loaded(which: Server) -> bool:
        return "google/_upb/" in Path(f"/proc/{which.process.pid}/maps").read_text()

    if not sys.platform.startswith("linux"):
        pytest.skip("a process's libraries are read from /proc")
    assert loaded(traced)
    assert not loaded(server)


def test_without_its_packages_the_error_names_them(environment: pytest.MonkeyPatch) -> None:
    environment.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(AbmllError, match="install opentelemetry-sdk and opentelemetry-exporter-otlp"):
        Tracing("http://127.0.0.1:4317")


@pytest.mark.parametrize("wrong", ["localhost:4317", "grpc://localhost:4317", "http://", "http://a b:4317"])
def test_an_endpoint_that_is_no_url_is_refused_with_what_would_be_right(wrong: str) -> None:
    with pytest.raises(ValidationError, match="give http://HOST:4317"):
        Settings(otlp_endpoint=wrong)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM exists for Linux only")
@pytest.mark.filterwarnings("ignore")
def test_vllm_takes_what_it_is_given_for_its_own_spans() -> None:
    from vllm.config.observability import ObservabilityConfig
    from vllm.engine.arg_utils import AsyncEngineArgs

    given = vllm_arguments(Settings(otlp_endpoint="http://127.0.0.1:4317"))
    assert given.keys() <= {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    assert ObservabilityConfig(**given).otlp_traces_endpoint == "http://127.0.0.1:4317"
    assert vllm_arguments(Settings()) == {}
