"""The adaptation process: takes queued jobs one after another, at low priority, beside the server.

Run by the server as ``python -m server.worker``; its settings come as JSON in the first line of stdin. A
further line means that a job may wait; the end of stdin means that the server ends, or is gone.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from abmll.errors import AbmllError, StoreFailure
from abmll.store import StoredPosterior, load_posterior
from server.adapting import NICENESS, POLL_SECONDS, STORE_SECONDS, Adapting, finish, reason
from server.jobs import Job, JobCancelled, JobRegistry
from server.logs import configure
from server.objects import Objects
from server.settings import Settings
from server.store import TaskStore
from server.tracing import Tracing, of_job, tell

logger = logging.getLogger("abmll.worker")

_T = TypeVar("_T")


class Worker:
    """Takes jobs to their end.

    Args:
        settings: The server's.
        prior: The global posterior.
        store: Where versions go.
        registry: Where jobs come from.
    """

    def __init__(self, settings: Settings, prior: StoredPosterior, store: TaskStore, registry: JobRegistry) -> None:
        self.prior, self.store, self.registry = prior, store, registry
        self.adapting = Adapting(settings, prior)

    def run(self, job: Job) -> None:
        """Runs a claimed job to its end, whatever that is."""
        logger.info("job %s for task %s begins", job.id, job.task)
        try:
            self._adapt(job)
        except JobCancelled:
            logger.info("job %s was cancelled", job.id)
            tell(status="cancelled")
        except AbmllError as error:
            logger.warning("job %s failed: %s", job.id, error.message)
            self._fail(job, error)
        except Exception as error:
            logger.exception("job %s failed", job.id)
            self._fail(job, error)
        else:
            logger.info("job %s is done", job.id)
            tell(status="done")

    def _fail(self, job: Job, error: Exception) -> None:
        persist(lambda: self.registry.fail(job.id, reason(error)))
        tell(status="failed")

    def _report(self, job: Job, progress: float) -> None:
        try:
            self.registry.report(job.id, progress)
        except StoreFailure as error:  # the disk may be well again before the job has a result to write
            logger.warning("progress of job %s is not written: %s", job.id, error.message)

    def _adapt(self, job: Job) -> None:
        examples = persist(lambda: self.registry.examples(job.id))
        made = self.adapting.run(job, examples, lambda progress: self._report(job, progress))
        persist(lambda: finish(job, made, len(examples), self.prior, self.store, self.registry))


def persist(write: Callable[[], _T]) -> _T:
    """Writes to the registry; where the disk does not take it, again until it does."""
    while True:
        try:
            return write()
        except StoreFailure as error:
            logger.error("%s; trying again", error.message)
            time.sleep(STORE_SECONDS)


def _watch_server(wake: threading.Event) -> None:
    for _ in sys.stdin:
        wake.set()
    os._exit(0)  # the job under way is queued again by the server, or by the next one


def main() -> None:
    """Works until the server ends."""
    settings = Settings.model_validate_json(sys.stdin.readline())
    configure(settings)
    tracing = Tracing.of(settings)
    # Watched from the first moment on: what is imported here takes seconds.
    wake = threading.Event()
    threading.Thread(target=_watch_server, args=(wake,), daemon=True).start()
    if hasattr(os, "nice"):
        os.nice(NICENESS)
    gc.disable()  # it would look over and over through what is imported, and find nothing

    import torch

    import training.task_calibration  # noqa: F401 # pyright: ignore[reportUnusedImport] -- spends its seconds before a job comes
    from training.allocator import keep_freed_memory

    gc.freeze()
    gc.enable()
    torch.set_num_threads(settings.adapt_threads)
    keep_freed_memory()
    prior = load_posterior(settings.global_posterior)
    registry = JobRegistry(settings.store / "jobs.sqlite3")
    objects = None if settings.objects is None else Objects(settings.objects)
    worker = Worker(settings, prior, TaskStore(settings.store, prior, objects=objects), registry)
    while True:
        job = persist(registry.claim)
        if job is None:
            wake.wait(POLL_SECONDS)
            wake.clear()
        else:
            with of_job(tracing, job):
                worker.run(job)


if __name__ == "__main__":
    main()
