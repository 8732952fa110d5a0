"""The FastAPI app."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version as installed_version
from typing import Annotated

from fastapi import FastAPI, Query, Request, Response
from fastapi import Path as PathParameter
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST

from abmll.errors import EngineFailure, StoreFailure, TaskConflict, TaskNotFound
from abmll.names import GLOBAL, check_name
from server.access import ANY, Access
from server.bodies import BodyLimit
from server.errors import Told, install
from server.inputs import read_examples
from server.keys import Keys
from server.logs import Logged, audit
from server.metrics import Measured, Metrics
from server.openai_api.routes import add_openai
from server.openapi import errors
from server.questions import Questions, add_questions
from server.schemas import Health
from server.service import Service
from server.settings import Settings
from server.task_schemas import (
    AdaptRequest,
    FeedbackReply,
    FeedbackRequest,
    JobReply,
    RecalibrateRequest,
    RecalibrationReply,
    ReliabilityReply,
    ServingRequest,
    TaskReply,
    TaskSummary,
)
from server.tasks import damaged, describe, read_shares, summarize
from server.tracing import Traced, Tracing, tell
from server.web import add_page

_DESCRIPTION = """
Answers of a language model with a calibrated confidence, and with its doubt split into what more data
would remove (*epistemic*) and what it would not (*aleatoric*). A task is taught with a few labelled
examples: `POST /adapt`, then `POST /generate` with its name.
"""


def create_app(settings: Settings, on_failure: Callable[[Exception], None] = lambda _: None) -> FastAPI:
    """Builds the app; its lifespan starts the engine and the adaptation process.

    Args:
        settings: The settings.
        on_failure: Called with the error if the engine's start fails.

    Raises:
        AbmllError: The global posterior or the store cannot be used, or OpenTelemetry is not there for traces.
    """
    tracing = Tracing.of(settings)
    service, metrics = Service(settings, on_failure, tracing), Metrics()
    access = Access(None if settings.keys is None else Keys(settings.keys))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.close()
            if tracing is not None:
                await run_in_threadpool(tracing.close)

    # The page's scripts come from here: where nothing can be downloaded, /docs would else stay blank.
    app = FastAPIOffline(title="abmll", version=installed_version("abmll"), description=_DESCRIPTION,
                         summary="Answers with a calibrated confidence", lifespan=lifespan)  # fmt: skip
    app.add_middleware(Told)
    app.add_middleware(BodyLimit, limit=settings.max_body)
    app.add_middleware(Measured, metrics=metrics)
    if tracing is not None:
        app.add_middleware(Traced, tracing=tracing)
    app.add_middleware(Logged)
    app.router.route_class = access.route_class()
    install(app)
    metrics.watch(service.snapshot, settings.engine)
    app.state.service = service
    questions = Questions(service, metrics)
    add_questions(app, questions, access)
    add_openai(app, questions, access)
    _add_feedback(app, service, access)
    _add_adaptation(app, service, access)
    _add_tasks(app, service, access)
    _add_operation(app, service, access, metrics)
    add_page(app)
    return app


def _add_feedback(app: FastAPI, service: Service, access: Access) -> None:
    @app.post(
        "/feedback",
        tags=["questions"],
        responses=errors(400, 404, 413, 422, 503, *access.statuses),
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
        responses=errors(400, 404, 409, 413, 422, 500, 503, *access.statuses),
        dependencies=access.needs("adapt"),
    )
    async def recalibrate(name: str, wanted: RecalibrateRequest) -> RecalibrationReply:  # pyright: ignore[reportUnusedFunction] -- a route
        """Fits a task's temperature to its feedback; shows before and after, and makes a new version if asked to."""
        reply = await service.recalibrate(name, wanted.version, wanted.apply)
        if reply.applied is not None:
            audit("recalibrate", task=name, version=reply.applied)
        return reply


def _add_adaptation(app: FastAPI, service: Service, access: Access) -> None:
    @app.post(
        "/adapt",
        status_code=202,
        tags=["adaptation"],
        responses=errors(400, 409, 413, 422, 429, 503, *access.statuses),
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
        tell(task=job.task, job=job.id)
        audit("adapt", task=job.task, job=job.id, examples=len(task.examples))
        if service.supervisor is not None:
            service.supervisor.wake()
        return JobReply.of(job)

    @app.get("/adapt", tags=["adaptation"], responses=errors(503, *access.statuses), dependencies=access.needs("adapt"))
    def list_jobs() -> Sequence[JobReply]:  # pyright: ignore[reportUnusedFunction] -- a route
        """Lists the newest hundred jobs, newest first."""
        return [JobReply.of(job) for job in service.registry.list()]

    @app.get(
        "/adapt/{job}",
        tags=["adaptation"],
        responses=errors(404, 422, 503, *access.statuses),
        dependencies=access.needs("adapt"),
    )
    def get_job(job: str) -> JobReply:  # pyright: ignore[reportUnusedFunction] -- a route
        """Tells a job's status and progress."""
        return JobReply.of(service.registry.get(job))

    @app.delete(
        "/adapt/{job}",
        tags=["adaptation"],
        responses=errors(404, 422, 503, *access.statuses),
        dependencies=access.needs("adapt"),
    )
    def cancel_job(job: str) -> JobReply:  # pyright: ignore[reportUnusedFunction] -- a route
        """Cancels a job that is queued or running; one that has ended stays as it is."""
        cancelled = service.registry.cancel(job)
        audit("cancel", task=cancelled.task, job=job)
        return JobReply.of(cancelled)


def _add_tasks(app: FastAPI, service: Service, access: Access) -> None:
    @app.get("/tasks", tags=["tasks"], responses=errors(503, *access.statuses), dependencies=access.needs("query"))
    def list_tasks() -> Sequence[TaskSummary]:  # pyright: ignore[reportUnusedFunction] -- a route
        """Lists all tasks, `global` first."""
        store, found = service.store, list[TaskSummary]()
        for name in store.names():
            try:
                found.append(summarize(name, *store.answering(name)))
            except TaskNotFound:  # deleted meanwhile
                continue
            except StoreFailure as error:
                found.append(damaged(name, None, error.message))
        return found

    @app.get(
        "/tasks/{name}",
        tags=["tasks"],
        responses=errors(404, 422, 503, *access.statuses),
        dependencies=access.needs("query"),
    )
    def get_task(name: str) -> TaskReply:  # pyright: ignore[reportUnusedFunction] -- a route
        """Tells a task's calibration and history."""
        return describe(name, service.store.versions(name), service.store.serving(name))

    @app.get(
        "/tasks/{name}/reliability",
        tags=["tasks"],
        responses=errors(404, 422, 500, 503, *access.statuses),
        dependencies=access.needs("query"),
    )
    def get_reliability(  # pyright: ignore[reportUnusedFunction] -- a route
        name: str,
        version: Annotated[int | None, Query(ge=1, description="null: the version that answers (most).")] = None,
    ) -> ReliabilityReply:
        """Tells how far a version's confidence held: reliability diagram and risk-coverage curve."""
        return service.reliability(name, version)

    @app.put(
        "/tasks/{name}/serving",
        tags=["tasks"],
        responses=errors(400, 404, 409, 422, 500, 503, *access.statuses),
        dependencies=access.needs("adapt"),
    )
    async def serve_versions(name: str, wanted: ServingRequest) -> TaskReply:  # pyright: ignore[reportUnusedFunction] -- a route
        """Says which versions of a task answer: one, several that share the questions, or the newest."""
        shares = None if wanted.versions is None else read_shares(wanted.versions)
        await service.serve(name, shares)
        audit("serve", task=name, versions=wanted.versions)
        return await run_in_threadpool(
            lambda: describe(name, service.store.versions(name), service.store.serving(name))
        )

    @app.delete(
        "/tasks/{name}",
        status_code=204,
        tags=["tasks"],
        responses=errors(404, 409, 422, 503, *access.statuses),
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

    @app.delete(
        "/tasks/{name}/versions/{version}",
        status_code=204,
        tags=["tasks"],
        responses=errors(404, 409, 422, 503, *access.statuses),
        dependencies=access.needs("admin"),
    )
    async def delete_version(  # pyright: ignore[reportUnusedFunction] -- a route
        name: str, version: Annotated[int, PathParameter(ge=1, description="Its number.")]
    ) -> None:
        """Removes a version that does not answer and is not the newest, with what was said of its answers."""
        await service.delete_version(name, version)
        audit("delete_version", task=name, version=version)


def _add_operation(app: FastAPI, service: Service, access: Access, metrics: Metrics) -> None:
    @app.get("/healthz", tags=["operation"])
    async def healthz() -> Health:  # pyright: ignore[reportUnusedFunction] -- a route
        """Says 200 while the process lives."""
        return Health(status="ok")

    @app.get("/readyz", tags=["operation"], response_model=Health, responses=errors(503))
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
        responses=errors(*access.statuses),
        dependencies=access.needs(ANY),
    )
    def read_metrics() -> Response:  # pyright: ignore[reportUnusedFunction] -- a route
        """Gives Prometheus metrics, vLLM's own included."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)
