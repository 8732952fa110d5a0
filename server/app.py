"""The FastAPI app."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, RedirectResponse
from fastapi.sse import EventSourceResponse
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST

from abmll.errors import EngineFailure, TaskConflict, TaskNotFound
from server.access import ANY, Access
from server.body_limit import BodyLimit
from server.connection import while_connected
from server.errors import install
from server.inputs import read_examples
from server.keys import Keys
from server.logs import Logged, audit, current_request
from server.metrics import Measured, Metrics
from server.schemas import ErrorReply, GenerateReply, GenerateRequest, Health, ScoreRequest
from server.service import Service
from server.settings import Settings
from server.store import GLOBAL, check_name
from server.streaming import WholeText, stream
from server.task_schemas import (
    AdaptRequest,
    FeedbackReply,
    FeedbackRequest,
    JobReply,
    RecalibrateRequest,
    RecalibrationReply,
    ServingRequest,
    TaskReply,
    TaskSummary,
)
from server.tasks import describe, read_shares, summarize

logger = logging.getLogger(__name__)

Asked = TypeVar("Asked", GenerateRequest, ScoreRequest)

_DESCRIPTION = """
Answers of a language model with a calibrated confidence, and with its doubt split into what more data
would remove (*epistemic*) and what it would not (*aleatoric*). A task is taught with a few labelled
examples: `POST /adapt`, then `POST /generate` with its name.
"""
_REASONS = {
    400: "The body is not JSON.",
    401: "No API key, or one that is unknown or revoked.",
    403: "The API key lacks the right.",
    404: "No such task, version, job or answer.",
    409: "The task is reserved, or a job for it is under way.",
    413: "Prompt and answer exceed the model's context, or the body the server's limit.",
    422: "A field is missing, unknown, of the wrong type, or out of range.",
    429: "Too much waits already, or the API key has asked too often; ask again after the seconds in `Retry-After`.",
    500: "The server failed, or a stored posterior is damaged.",
    503: "The engine cannot answer, or the store cannot be written, at present; ask again after `Retry-After`.",
    504: "No answer within the time that the request or the server gives.",
}


# What else the reply to a question may be.
_EVENTS: dict[str, Any] = {
    "description": "The reply; with `stream`, server-sent events: `token` (a `StreamedToken`), then `answer` (the "
    "reply) or `error` (an `ErrorReply`).",
    "content": {
        "text/event-stream": {
            "schema": {
                "type": "object",
                "properties": {"event": {"enum": ["token", "answer", "error"]}, "data": {"type": "string"}},
                "required": ["event", "data"],
            }
        }
    },
}


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorReply, "description": _REASONS[status]} for status in statuses}


def create_app(settings: Settings, on_failure: Callable[[Exception], None] = lambda _: None) -> FastAPI:
    """Builds the app; its lifespan starts the engine and the adaptation process.

    Args:
        settings: The settings.
        on_failure: Called with the error if the engine's start fails.

    Raises:
        AbmllError: The global posterior or the store cannot be used.
    """
    service, metrics = Service(settings, on_failure), Metrics()
    access = Access(None if settings.keys is None else Keys(settings.keys))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.close()

    # The page's scripts come from here: where nothing can be downloaded, /docs would else stay blank.
    app = FastAPIOffline(title="abmll", summary="Answers with a calibrated confidence", description=_DESCRIPTION,
                         lifespan=lifespan)  # fmt: skip
    app.add_middleware(BodyLimit, limit=settings.max_body)
    app.add_middleware(Measured, metrics=metrics)
    app.add_middleware(Logged)
    app.router.route_class = access.route_class()
    install(app)
    metrics.watch(service.snapshot, settings.engine)
    app.state.service = service
    _add_questions(app, service, access, metrics)
    _add_feedback(app, service, access)
    _add_adaptation(app, service, access)
    _add_tasks(app, service, access)
    _add_operation(app, service, access, metrics)
    return app


def _add_questions(app: FastAPI, service: Service, access: Access, metrics: Metrics) -> None:
    async def told(
        asked: Asked, request: Request, answer: Callable[[Asked, str], Coroutine[Any, Any, GenerateReply]]
    ) -> GenerateReply:
        reply = await while_connected(request, answer(asked, begin(asked)))
        observe(asked, reply)
        return reply

    def begin(asked: GenerateRequest | ScoreRequest) -> str:
        context = current_request()
        assert context is not None
        if service.settings.log_prompts:
            logger.info("task %r is asked %r", asked.task, asked.prompt)
        return context.id

    def observe(asked: GenerateRequest | ScoreRequest, reply: GenerateReply) -> None:
        kind = "score" if isinstance(asked, ScoreRequest) else "text" if asked.options is None else "options"
        metrics.observe(reply, kind)

    @app.post(
        "/generate",
        tags=["questions"],
        response_model=GenerateReply,
        responses={200: _EVENTS} | _errors(400, 404, 413, 422, 429, 500, 503, 504, *access.statuses),
        dependencies=access.needs("query"),
    )
    async def generate(question: GenerateRequest, request: Request) -> GenerateReply | EventSourceResponse:  # pyright: ignore[reportUnusedFunction] -- a route
        """Answers a question under draws from a task's posterior."""
        answerer = service.answerer
        if not question.stream:
            return await told(question, request, answerer.answer)
        id = begin(question)
        return await stream(
            lambda tell: answerer.answer(question, id, tell),
            WholeText(answerer.tokenizer, question.stop),
            lambda first: while_connected(request, first),
            lambda reply: observe(question, reply),
        )

    @app.post(
        "/score",
        tags=["questions"],
        responses=_errors(400, 404, 413, 422, 429, 500, 503, 504, *access.statuses),
        dependencies=access.needs("query"),
    )
    async def score(finished: ScoreRequest, request: Request) -> GenerateReply:  # pyright: ignore[reportUnusedFunction] -- a route
        """Scores a finished answer, of another model or a person, under the draws: whole and token by token."""
        return await told(finished, request, service.answerer.score)


def _add_feedback(app: FastAPI, service: Service, access: Access) -> None:
    @app.post(
        "/feedback",
        tags=["questions"],
        responses=_errors(400, 404, 413, 422, 503, *access.statuses),
        dependencies=access.needs("query"),
    )
    def feedback(said: FeedbackRequest) -> FeedbackReply:  # pyright: ignore[reportUnusedFunction] -- a route
        """Stores the right answer to a question that was answered, or whether the answer was right."""
        judged = service.feedback.judge(said.request_id, said.answer, said.correct)
        return FeedbackReply(
            request_id=said.request_id, task=judged.task, version=judged.version, correct=judged.correct
        )

    @app.post(
        "/tasks/{name}/recalibrate",
        tags=["tasks"],
        responses=_errors(400, 404, 409, 413, 422, 500, 503, *access.statuses),
        dependencies=access.needs("adapt"),
    )
    def recalibrate(name: str, wanted: RecalibrateRequest) -> RecalibrationReply:  # pyright: ignore[reportUnusedFunction] -- a route
        """Fits a task's temperature to its feedback; shows before and after, and makes a new version if asked to."""
        reply = service.recalibrate(name, wanted.version, wanted.apply)
        if reply.applied is not None:
            audit("recalibrate", task=name, version=reply.applied)
        return reply


def _add_adaptation(app: FastAPI, service: Service, access: Access) -> None:
    @app.post(
        "/adapt",
        status_code=202,
        tags=["adaptation"],
        responses=_errors(400, 409, 413, 422, 429, 503, *access.statuses),
        dependencies=access.needs("adapt"),
    )
    async def adapt(task: AdaptRequest) -> JobReply:  # pyright: ignore[reportUnusedFunction] -- a route
        """Queues a job that makes a task's posterior from labelled examples."""
        check_name(task.task)
        answerer = service.answerer
        template = service.prior.posterior.config.template
        job = await run_in_threadpool(
            lambda: service.registry.submit(
                task.task,
                read_examples(task.examples, answerer.tokenizer, template, answerer.engine.context),
                task.steps,
                task.seed,
                service.settings.job_queue,
            )
        )
        audit("adapt", task=job.task, job=job.id, examples=len(task.examples))
        if service.supervisor is not None:
            service.supervisor.wake()
        return JobReply.of(job)

    @app.get(
        "/adapt", tags=["adaptation"], responses=_errors(503, *access.statuses), dependencies=access.needs("adapt")
    )
    def list_jobs() -> Sequence[JobReply]:  # pyright: ignore[reportUnusedFunction] -- a route
        """Lists the newest hundred jobs, newest first."""
        return [JobReply.of(job) for job in service.registry.list()]

    @app.get(
        "/adapt/{job}",
        tags=["adaptation"],
        responses=_errors(404, 503, *access.statuses),
        dependencies=access.needs("adapt"),
    )
    def get_job(job: str) -> JobReply:  # pyright: ignore[reportUnusedFunction] -- a route
        """Tells a job's status and progress."""
        return JobReply.of(service.registry.get(job))

    @app.delete(
        "/adapt/{job}",
        tags=["adaptation"],
        responses=_errors(404, 503, *access.statuses),
        dependencies=access.needs("adapt"),
    )
    def cancel_job(job: str) -> JobReply:  # pyright: ignore[reportUnusedFunction] -- a route
        """Cancels a job that is queued or running; one that has ended stays as it is."""
        cancelled = service.registry.cancel(job)
        audit("cancel", task=cancelled.task, job=job)
        return JobReply.of(cancelled)


def _add_tasks(app: FastAPI, service: Service, access: Access) -> None:
    @app.get("/tasks", tags=["tasks"], responses=_errors(*access.statuses), dependencies=access.needs("query"))
    def list_tasks() -> Sequence[TaskSummary]:  # pyright: ignore[reportUnusedFunction] -- a route
        """Lists all tasks, `global` first."""
        store, found = service.store, list[TaskSummary]()
        for name in store.names():
            with contextlib.suppress(TaskNotFound):  # deleted meanwhile
                found.append(summarize(name, store.versions(name), store.serving(name)))
        return found

    @app.get(
        "/tasks/{name}", tags=["tasks"], responses=_errors(404, *access.statuses), dependencies=access.needs("query")
    )
    def get_task(name: str) -> TaskReply:  # pyright: ignore[reportUnusedFunction] -- a route
        """Tells a task's calibration and history."""
        return describe(name, service.store.versions(name), service.store.serving(name))

    @app.put(
        "/tasks/{name}/serving",
        tags=["tasks"],
        responses=_errors(400, 404, 409, 422, 500, 503, *access.statuses),
        dependencies=access.needs("adapt"),
    )
    async def serve_versions(name: str, wanted: ServingRequest) -> TaskReply:  # pyright: ignore[reportUnusedFunction] -- a route
        """Says which versions of a task answer: one, several that share the questions, or the newest."""
        shares = None if wanted.versions is None else read_shares(wanted.versions)
        await run_in_threadpool(lambda: service.store.serve(name, shares))
        audit("serve", task=name, versions=wanted.versions)
        return await run_in_threadpool(
            lambda: describe(name, service.store.versions(name), service.store.serving(name))
        )

    @app.delete(
        "/tasks/{name}",
        status_code=204,
        tags=["tasks"],
        responses=_errors(404, 409, 422, 503, *access.statuses),
        dependencies=access.needs("admin"),
    )
    async def delete_task(name: str) -> None:  # pyright: ignore[reportUnusedFunction] -- a route
        """Removes a task with all its versions."""
        if name == GLOBAL:
            raise TaskConflict("the global posterior cannot be deleted", field="name")
        if await run_in_threadpool(lambda: service.registry.active(name)):
            raise TaskConflict(f"a job for task {name!r} is under way; cancel it first", field="name")
        await service.delete(name)
        audit("delete", task=name)


def _add_operation(app: FastAPI, service: Service, access: Access, metrics: Metrics) -> None:
    @app.get("/healthz", tags=["operation"])
    async def healthz() -> Health:  # pyright: ignore[reportUnusedFunction] -- a route
        """Says 200 while the process lives."""
        return Health(status="ok")

    @app.get("/readyz", tags=["operation"], response_model=Health, responses=_errors(503))
    async def readyz(_: Request) -> Response:  # pyright: ignore[reportUnusedFunction] -- a route
        """Says 200 while questions are answered, else 503."""
        if service.ready:
            return JSONResponse({"status": "ready"})
        service.answerer  # noqa: B018 -- raises while the engine starts
        raise EngineFailure("the engine is not healthy; see the server's log")

    @app.get(
        "/metrics",
        tags=["operation"],
        response_class=Response,
        responses=_errors(*access.statuses),
        dependencies=access.needs(ANY),
    )
    def read_metrics() -> Response:  # pyright: ignore[reportUnusedFunction] -- a route
        """Gives Prometheus metrics, vLLM's own included."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    async def root() -> RedirectResponse:  # pyright: ignore[reportUnusedFunction] -- a route
        return RedirectResponse("/docs")
