"""The parts of a running server, started and stopped together."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import logging
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, TypeVar

from abmll.errors import AbmllError, EngineFailure, StoreFailure, TaskConflict
from abmll.names import GLOBAL
from abmll.store import Record, StoredPosterior
from server.admission import Admission
from server.answers import Answerer
from server.background import in_background
from server.cluster.adaptation import ClusterAdaptation
from server.cluster.engine import ClusterEngine
from server.engine import Engine
from server.feedback import Feedback
from server.jobs import JobRegistry
from server.loading import base_check, load_global, load_tokenizer, make_engine, with_revision
from server.logs import audit
from server.metrics import Snapshot
from server.objects import Objects
from server.recalibration import refit
from server.reliability import reliability
from server.settings import Settings
from server.store import TaskStore
from server.supervisor import Supervisor
from server.task_schemas import RecalibrationReply, ReliabilityReply
from server.tracing import Tracing

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

# How often the engine is looked at, and the longest wait between attempts to start it again; in seconds.
_LOOK_SECONDS = 0.5
_LONGEST_DELAY = 60.0
# How often answers are written down for feedback, in seconds.
_WRITE_SECONDS = 1.0
# How often object storage is looked at for what other servers have made, in seconds.
REFRESH_SECONDS = 5.0
_PRUNE_SECONDS = 30.0


def _lock(store: Path) -> IO[str]:
    """Takes a store for this process: two servers would take each other's jobs for a dead worker's.

    Raises:
        AbmllError: Another server uses it.
    """
    path = store / ".lock"
    try:
        if not path.exists():  # a store that has become read-only is served all the same
            path.touch()
        file = path.open()
    except OSError as error:
        raise AbmllError(f"the store {store} cannot be written: {error}; choose another with --store") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise AbmllError(f"another server uses the store {store}; stop it, or choose another with --store") from error
    return file


class Service:
    """Store, jobs, engine and adaptation process of one server.

    The engine starts in the background, so that the port answers at once: until then ``answerer`` raises.
    The adaptation process starts after it, so that it takes nothing from the start. An engine that dies is
    started anew.

    Args:
        settings: The settings.
        on_failure: Called with the error if the start fails.
        tracing: Makes spans of adaptation jobs that this process has done by others.

    Raises:
        AbmllError: Global posterior or store cannot be used, or another server uses the store.
    """

    def __init__(
        self,
        settings: Settings,
        on_failure: Callable[[Exception], None] = lambda _: None,
        tracing: Tracing | None = None,
    ) -> None:
        self.prior = load_global(settings)
        settings = with_revision(settings, self.prior.posterior.config)
        self.settings, self.on_failure, self.tracing = settings, on_failure, tracing
        objects = None if settings.objects is None else Objects(settings.objects)
        self.store = TaskStore(
            settings.store,
            self.prior,
            base_check(settings, self.prior.posterior),
            settings.cache,
            objects,
        )
        if Path(settings.base_model).is_dir():  # else when the engine has fetched it
            self.store.check(self.prior.posterior)
        self.registry = JobRegistry(settings.store / "jobs.sqlite3")
        self._lock = _lock(settings.store)
        self.store.sweep()
        self.up_to_date = True
        if objects is not None:
            objects.listing()  # an address that is wrong ends the start
        try:
            self.store.refresh()
        except StoreFailure as error:
            logger.error("the store is not brought up to date, what is there is served: %s", error.message)
            self.up_to_date = False
        self.feedback = Feedback(settings.store / "feedback.sqlite3", settings.feedback_kept)
        engines = settings.max_replicas or settings.replicas or 1
        self.admission = Admission(settings.concurrency * engines, settings.queue)
        self.engine: Engine | None = None
        self.engine_restarts = 0
        self.supervisor: Supervisor | ClusterAdaptation | None = None
        self.failure: Exception | None = None
        self.tokenizer: Any = None
        self._answerer: Answerer | None = None
        self._running: asyncio.Task[None] | None = None
        self._writing: asyncio.Task[None] | None = None
        self._refreshing: asyncio.Task[None] | None = None
        self._pruning: asyncio.Task[None] | None = None
        self._recalibrating = threading.Lock()
        # Apart from the threads that questions need: who changes the store may wait for object storage.
        self._changers = ThreadPoolExecutor(2, thread_name_prefix="store")
        self._promises: dict[tuple[str, int, str | None], float | None] = {}

    @property
    def answerer(self) -> Answerer:
        """What answers questions.

        Raises:
            EngineFailure: The engine is not ready.
        """
        if self._answerer is None or self.engine is None:
            raise EngineFailure("the engine is starting; wait until GET /readyz says 200")
        return self._answerer

    @property
    def ready(self) -> bool:
        """Whether questions are answered."""
        return self._answerer is not None and self.engine is not None and self.engine.state().healthy

    async def start(self) -> None:
        """Begins the start."""
        self._writing = in_background(self._write_answers(), "the writing of answers")
        if self.settings.objects is not None:
            self._refreshing = in_background(self._refresh_store(), "the reading of the object storage")
        self._running = in_background(self._run(), "the watch over the engine")

    async def _run(self) -> None:
        try:
            engine = await self._start_engine()
            await asyncio.to_thread(self.store.check, self.prior.posterior)
            self.tokenizer = await asyncio.to_thread(load_tokenizer, self.settings)
            damaged = await asyncio.to_thread(self.store.damaged)
            self._answerer = Answerer(
                self.settings, engine, self.tokenizer, self.store, self.admission, self.feedback.note
            )
        except Exception as error:
            self.failure = error
            self.on_failure(error)
            return
        logger.info(
            "ready: engine %s, base model %s, %d tasks%s",
            engine.name,
            self.settings.base_model,
            len(self.store.names()),
            f", {len(damaged)} damaged: {', '.join(damaged)}" if damaged else "",
        )
        self.supervisor = self._make_supervisor()
        self.supervisor.start()
        if self.settings.versions_kept is not None:
            self._pruning = in_background(self._prune(self.settings.versions_kept), "the deletion of old versions")
        await self._keep_engine(self._answerer)

    async def _write_answers(self) -> None:
        """Writes the answers down that feedback may come to, a second's at a time."""
        failing = False
        try:
            await asyncio.to_thread(lambda: self.feedback.load(self.store.names(), self.store.has))
        except (StoreFailure, OSError) as error:
            logger.warning("measures of earlier answers are not known: %s", error)
        while True:
            await asyncio.sleep(_WRITE_SECONDS)
            try:
                await asyncio.to_thread(self.feedback.flush)
                failing = False
            except StoreFailure as error:
                if not failing:
                    logger.error("answers are not written down, the newest are kept in memory: %s", error.message)
                failing = True
            except Exception:
                logger.exception("answers could not be written down; trying again")

    async def _refresh_store(self) -> None:
        """Sees what other servers have made and deleted; what is here is served while that cannot be seen."""
        while True:
            await asyncio.sleep(REFRESH_SECONDS)
            try:
                before = time.monotonic()
                gone = await self._changing(self.store.refresh)
                self.up_to_date = True
            except Exception as error:
                if self.up_to_date:
                    logger.error("the store is not brought up to date, trying again: %s", error)
                self.up_to_date = False
                continue
            for (task, version), digests in gone.items():
                try:
                    await self._forget(task, digests, before, version)
                except Exception:
                    logger.exception("what is left of task %s, which was deleted elsewhere, is not removed", task)

    async def _prune(self, kept: int) -> None:
        """Deletes old versions that do not answer."""
        failing: set[str] = set()
        while True:
            try:
                names = (await asyncio.to_thread(self.store.names))[1:]
            except StoreFailure:
                names = []  # the next round may see them; what uses the store tells of it
            for task in names:
                try:
                    gone = await self._changing(functools.partial(self.store.prune, task, kept))
                    for version, digests in gone.items():
                        audit("delete_version", task=task, version=version, by="--versions-kept")
                        await self._forget(task, digests, time.monotonic(), version)
                    failing.discard(task)
                except Exception as error:
                    if task not in failing:
                        logger.error("old versions of task %s are not deleted, trying again: %s", task, error)
                    failing.add(task)
            await asyncio.sleep(_PRUNE_SECONDS)

    def _make_engine(self) -> Engine:
        config = self.prior.posterior.config
        return (
            make_engine(self.settings, config)
            if self.settings.replicas is None
            else ClusterEngine(self.settings, config)
        )

    def _make_supervisor(self) -> Supervisor | ClusterAdaptation:
        if self.settings.replicas is None:
            return Supervisor(self.settings, self.registry)
        return ClusterAdaptation(self.settings, self.prior, self.store, self.registry, self.tracing)

    async def _start_engine(self) -> Engine:
        engine = self._make_engine()
        try:
            await engine.start()
        except BaseException:
            await engine.close()
            raise
        self.engine = engine
        return engine

    async def _keep_engine(self, answerer: Answerer) -> None:
        """Starts the engine anew whenever it has died; questions are refused with 503 meanwhile."""
        mending = False
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            state = None if self.engine is None else self.engine.state()
            if state is not None and (state.healthy or state.mending):
                if not state.healthy and not mending:
                    logger.error("no replica answers; Ray starts them again")
                    self.engine_restarts += 1
                mending = not state.healthy
                continue
            logger.error("the engine has died; it is started again")
            self.engine_restarts += not mending
            mending = False
            dead, self.engine = self.engine, None
            if dead is not None:
                await self._bury(dead)
            delay = 1.0
            while self.engine is None:
                try:
                    answerer.engine = await self._start_engine()
                except Exception:
                    logger.exception("the engine could not be started again; trying again in %g s", delay)
                    await asyncio.sleep(delay)
                    delay = min(_LONGEST_DELAY, 2 * delay)
            logger.info("the engine answers again")

    @staticmethod
    async def _bury(engine: Engine) -> None:
        try:
            await engine.close()
        except Exception:
            logger.exception("what was left of the engine could not be closed")

    def snapshot(self) -> Snapshot:
        """Reads the state of all parts off, for the metrics; works without the store too."""
        try:
            jobs, (done, seconds) = self.registry.counts(), self.registry.time_spent()
        except StoreFailure:
            jobs, done, seconds = None, 0, 0.0
        try:
            tasks = len(self.store.names()) if self.up_to_date else None
        except StoreFailure:
            tasks = None
        try:
            space = shutil.disk_usage(self.settings.store)
            disk = space.total, space.free
        except OSError:
            disk = None
        windows = self.feedback.windows()
        return Snapshot(
            engine=None if self.engine is None else self.engine.state(),
            waiting=self.admission.waiting,
            inside=self.admission.inside,
            refused=self.admission.refused,
            disk=disk,
            tasks=tasks,
            jobs=jobs,
            done=done,
            seconds=seconds,
            questions_again=0 if self._answerer is None else self._answerer.scored.hits,
            windows=windows,
            promised=self._promised(self.feedback.answering()),
            engine_restarts=self.engine_restarts,
            worker_restarts=0 if self.supervisor is None else self.supervisor.restarts,
        )

    def _promised(self, answering: dict[tuple[str, int], str | None]) -> dict[tuple[str, int], float]:
        """ECE that calibration promised each version that has answered."""
        for (task, version), posterior in answering.items():
            key = task, version, posterior
            if key not in self._promises:
                with contextlib.suppress(AbmllError, OSError):
                    stored = self.store.choose(task, version, 0.0)
                    self._promises[key] = None
                    if posterior not in (None, stored.answering):
                        continue  # another task had the name
                    entry = None if stored.calibration is None else stored.calibration.nearest(stored.record.shots)
                    self._promises[key] = None if entry is None else entry.ece_after
        # Copied: another scrape, or a task's end, may change it meanwhile.
        known = self._promises.copy()
        found = {(task, version): known.get((task, version, by)) for (task, version), by in answering.items()}
        return {key: value for key, value in found.items() if value is not None}

    async def recalibrate(self, task: str, version: int | None, apply: bool) -> RecalibrationReply:
        """Fits the temperature of a task's version to its feedback; with ``apply``, makes a new version with it.

        Raises:
            TaskConflict: The task is ``global``, a job for it is under way, or another recalibration.
            TaskNotFound: There is no such task or version.
            InvalidRequest: Too few answers have been judged.
            StoreFailure: The disk is full or not writable.
        """
        if task == GLOBAL:
            raise TaskConflict("the global posterior stays as it is; `abmll calibrate` calibrates it anew", "name")
        if not self._recalibrating.acquire(blocking=False):
            raise TaskConflict("another recalibration is under way; ask again in a moment", "name")
        try:
            run = self._changing if apply else asyncio.to_thread
            return await run(lambda: self._recalibrate(task, version, apply))
        finally:
            self._recalibrating.release()

    async def serve(self, task: str, shares: dict[int, float] | None) -> None:
        """Says which versions of a task answer, see ``TaskStore.serve``."""
        await self._changing(lambda: self.store.serve(task, shares))

    def reliability(self, task: str, version: int | None) -> ReliabilityReply:
        """Tells how far the confidence of a task's version held; of the one that answers (most) by default.

        Raises:
            TaskNotFound: There is no such task or version.
        """
        return reliability(self._version(task, version), self.feedback)

    def _version(self, task: str, version: int | None) -> StoredPosterior:
        serving = self.store.serving(task)
        if version is None and serving:
            version = max(serving, key=lambda number: serving[number])
        return self.store.choose(task, version, 0.0)

    def _recalibrate(self, task: str, version: int | None, apply: bool) -> RecalibrationReply:
        stored = self._version(task, version)
        labelled = self.feedback.labelled(task, stored.record.version, stored.answering)
        calibration, reply = refit(stored, labelled, self.prior.calibration)
        if not apply:
            return reply
        if self.registry.active(task):
            raise TaskConflict(f"a job for task {task!r} is under way; wait for it", field="task")
        what = reply.model_dump(mode="json", exclude={"applied"})

        def record(number: int) -> Record:
            return Record(
                task=task,
                version=number,
                parent=stored.digest,
                seed=stored.record.seed,
                shots=stored.record.shots,
                training=stored.record.training | {"recalibration": what},
                results=stored.record.results,
            )

        made = self.store.add(task, stored.posterior, calibration, record, source=stored)
        return reply.model_copy(update={"applied": made.record.version})

    async def _changing(self, change: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._changers, change)

    async def delete(self, task: str) -> None:
        """Removes a task: its versions, what the engine keeps of them, and what was said of its answers.

        Raises:
            TaskNotFound: There is no such task.
            InvalidRequest: The task is reserved.
            StoreFailure: The disk is full or not writable.
        """
        before = time.monotonic()
        await self._forget(task, await self._changing(lambda: self.store.delete(task)), before)

    async def delete_version(self, task: str, version: int) -> None:
        """Removes a version that does not answer, as ``delete`` does a task.

        Raises:
            TaskNotFound: There is no such task or version.
            TaskConflict: The version answers, or is the newest; or the task is ``global``.
            StoreFailure: The disk is full or not writable, or object storage does not take it.
        """
        digests = await self._changing(lambda: self.store.delete_version(task, version))
        await self._forget(task, digests, time.monotonic(), version)

    async def _forget(self, task: str, digests: Sequence[str], before: float, version: int | None = None) -> None:
        """Ends what engine, measures and feedback have of a task that is gone, but for answers after ``before``.

        With ``version``, of that version alone.
        """
        gone = {key for key in self._promises.copy() if key[0] == task and version in (None, key[1])}
        self._promises = {key: value for key, value in self._promises.copy().items() if key not in gone}
        for digest in digests:
            if self.engine is not None:
                with contextlib.suppress(EngineFailure):  # a dead engine has forgotten already
                    await self.engine.release(digest)
        await asyncio.to_thread(self.feedback.forget, task, before, version)

    async def close(self) -> None:
        """Stops everything; jobs under way are taken up again at the next start."""
        for work in (self._running, self._writing, self._refreshing, self._pruning):
            if work is not None:
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)
        with contextlib.suppress(StoreFailure):
            await asyncio.to_thread(self.feedback.flush)
        if self.supervisor is not None:
            await self.supervisor.close()
        if self.engine is not None:
            await self.engine.close()
        self._changers.shutdown(wait=False)
        self._lock.close()
