"""Adaptation in a cluster: each job a task of Ray, placed by the resources that it takes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import queue
import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

from abmll.calibration import Calibration
from abmll.errors import AbmllError, StoreFailure
from abmll.examples import Example
from abmll.posterior import Posterior
from abmll.store import StoredPosterior
from server.adapting import NICENESS, POLL_SECONDS, STORE_SECONDS, Adapting, finish, reason
from server.background import in_background
from server.cluster.ray_process import adaptation_resources, by_name, told
from server.jobs import Job, JobCancelled, JobRegistry
from server.settings import Settings
from server.store import TaskStore
from server.tracing import Tracing, of_job, tell

logger = logging.getLogger(__name__)

# After these Ray is said to have no room for a job.
_WAIT_SECONDS = 15.0
_T = TypeVar("_T")
_Made = tuple[Posterior, Calibration | None]


class ClusterAdaptation:
    """Takes queued jobs, several at a time, and has them done by Ray; stands where ``Supervisor`` does without Ray.

    Args:
        settings: The server's.
        prior: The global posterior.
        store: Where versions go.
        registry: Where jobs come from.
        tracing: Makes each job a span.
    """

    def __init__(
        self,
        settings: Settings,
        prior: StoredPosterior,
        store: TaskStore,
        registry: JobRegistry,
        tracing: Tracing | None,
    ) -> None:
        self.settings, self.prior, self.store, self.registry = settings, prior, store, registry
        self.tracing = tracing
        self.restarts = 0
        self._woken = asyncio.Event()
        self._running = set[asyncio.Task[None]]()
        self._taking: asyncio.Task[None] | None = None
        self._task: Any = None

    def start(self) -> None:
        """Begins to take jobs; those that an earlier server had under way are queued again."""
        self._taking = in_background(self._take(), "the taking of jobs")

    def wake(self) -> None:
        """Tells that a job waits."""
        self._woken.set()

    async def close(self) -> None:
        """Ends the jobs under way; they are taken up again by the next server."""
        ending = [task for task in (self._taking, *self._running) if task is not None]
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)
        with contextlib.suppress(StoreFailure):
            await asyncio.to_thread(self.registry.give_back)

    async def _take(self) -> None:
        import ray

        # Said here, not with ``options``: a process that has a GPU then ends with its task, and gives the memory back.
        self._task = ray.remote(num_returns="streaming", max_retries=0, **adaptation_resources(self.settings))(_adapt)
        await _persist(self.registry.recover_after_server)
        free = asyncio.Semaphore(self.settings.adapt_jobs)
        while True:
            await free.acquire()
            while not ray.is_initialized():  # it is begun again with the engine
                await asyncio.sleep(POLL_SECONDS)
            self._woken.clear()
            job = await _persist(self.registry.claim)
            if job is None:
                free.release()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._woken.wait(), POLL_SECONDS)
                continue
            task = asyncio.create_task(self._run(job), name=f"adaptation-{job.id}")
            self._running.add(task)
            task.add_done_callback(lambda done: (self._running.discard(done), free.release()))

    async def _run(self, job: Job) -> None:
        with of_job(self.tracing, job):
            await self._end(job)

    async def _end(self, job: Job) -> None:
        """Takes a job to its end, whatever that is."""
        from ray.exceptions import RayTaskError

        logger.info("job %s for task %s begins", job.id, job.task)
        try:
            await self._adapt(job)
        except JobCancelled:
            logger.info("job %s was cancelled", job.id)
            tell(status="cancelled")
        except (AbmllError, RayTaskError) as error:
            cause = error.cause if isinstance(error, RayTaskError) else error
            logger.warning("job %s failed: %s", job.id, cause.message if isinstance(cause, AbmllError) else error)
            await _persist(lambda: self.registry.fail(job.id, reason(cause)))
            tell(status="failed")
        except Exception as error:  # what Ray raises when the process, or its machine, is gone
            logger.error("the process of job %s died: %s", job.id, type(error).__name__)
            self.restarts += 1
            await _persist(lambda: self.registry.recover(job.id))
            self.wake()
        else:
            logger.info("job %s is done", job.id)
            tell(status="done")

    async def _adapt(self, job: Job) -> None:
        import ray

        examples = await _persist(lambda: self.registry.examples(job.id))
        prior = await asyncio.to_thread(ray.put, self.prior)
        results = self._task.remote(self.settings.model_dump_json(), prior, job, examples)
        made: _Made | None = None
        waiting = in_background(self._tell_of_waiting(job), f"the watch over job {job.id}")
        try:
            async for reference in results:
                item: float | _Made = await reference
                waiting.cancel()
                if isinstance(item, tuple):
                    made = item
                else:
                    await self._report(job, item)
        except BaseException:
            ray.cancel(results)
            raise
        finally:
            waiting.cancel()
        assert made is not None
        done = made
        await _persist(lambda: finish(job, done, len(examples), self.prior, self.store, self.registry))

    async def _tell_of_waiting(self, job: Job) -> None:
        await asyncio.sleep(_WAIT_SECONDS)
        logger.warning(
            "job %s waits in Ray for %s; `ray status` tells what is taken, `abmll doctor` what the cluster has",
            job.id,
            told(by_name(adaptation_resources(self.settings))),
        )

    async def _report(self, job: Job, progress: float) -> None:
        try:
            await asyncio.to_thread(self.registry.report, job.id, progress)
        except StoreFailure as error:  # the disk may be well again before the job has a result to write
            logger.warning("progress of job %s is not written: %s", job.id, error.message)


async def _persist(write: Callable[[], _T]) -> _T:
    """Writes to the registry; where the disk does not take it, again until it does."""
    while True:
        try:
            return await asyncio.to_thread(write)
        except StoreFailure as error:
            logger.error("%s; trying again", error.message)
            await asyncio.sleep(STORE_SECONDS)


# In Ray's process: kept from one job to the next, so that the base model is loaded once.
_kept: dict[tuple[str, str], Adapting] = {}


def _adapting(settings: str, prior: StoredPosterior) -> Adapting:
    import torch

    key = settings, prior.digest
    if key not in _kept:
        if hasattr(os, "setpriority"):
            os.setpriority(os.PRIO_PROCESS, 0, NICENESS)  # engines on the same machine go first
        told = Settings.model_validate_json(settings)
        torch.set_num_threads(told.adapt_threads)
        _kept.clear()
        _kept[key] = Adapting(told, prior)
    return _kept[key]


def _adapt(settings: str, prior: StoredPosterior, job: Job, examples: Sequence[Example]) -> Generator[float | _Made]:
    """The task of Ray: gives progress, 0 to 1, and at last what the job has made."""
    yield 0.0  # it has begun, though the base model may have to be loaded
    adapting = _adapting(settings, prior)
    made: queue.Queue[float | _Made | BaseException] = queue.Queue()
    cancelled = threading.Event()

    def report(progress: float) -> None:
        if cancelled.is_set():
            raise JobCancelled(job.id)
        made.put(progress)

    def work() -> None:
        try:
            made.put(adapting.run(job, examples, report))
        except BaseException as error:
            made.put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item = made.get()
            if isinstance(item, BaseException):
                raise item
            yield item
            if isinstance(item, tuple):
                return
    finally:
        cancelled.set()
        thread.join()
