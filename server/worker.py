"""The adaptation process: takes queued jobs one after another, at low priority, beside the server.

Run by the server as ``python -m server.worker``; its settings come as JSON in the first line of stdin. A
further line means that a job may wait; the end of stdin means that the server is gone.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import TypeVar

from abmll.errors import AbmllError, InvalidPosterior, StoreFailure, TaskNotFound
from abmll.layers import Attached, attach
from abmll.store import Record, StoredPosterior, load_posterior
from server.jobs import Job, JobCancelled, JobRegistry
from server.logs import configure
from server.objects import Objects
from server.settings import Settings
from server.store import TaskStore
from server.tracing import Tracing, tell

logger = logging.getLogger("abmll.worker")

_T = TypeVar("_T")

NICENESS = 10
POLL_SECONDS = 1.0
# A disk that is full or failing is tried again after so long.
STORE_SECONDS = 2.0


class Adapter:
    """Adapts the global posterior to jobs' examples; loads the base model with the first job.

    Not before: a second copy of a large base model is memory that a server that only answers would pay
    for in vain.
    """

    def __init__(self, settings: Settings, prior: StoredPosterior, store: TaskStore, registry: JobRegistry) -> None:
        self.settings, self.prior, self.store, self.registry = settings, prior, store, registry
        self._loaded: tuple[object, Attached] | None = None

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
            self._fail(job, error.message)
        except Exception as error:
            logger.exception("job %s failed", job.id)
            self._fail(job, f"adaptation failed: {type(error).__name__}; see the server's log")
        else:
            logger.info("job %s is done", job.id)
            tell(status="done")

    def _fail(self, job: Job, reason: str) -> None:
        persist(lambda: self.registry.fail(job.id, reason))
        tell(status="failed")

    def _report(self, job: Job, progress: float) -> None:
        try:
            self.registry.report(job.id, progress)
        except StoreFailure as error:  # the disk may be well again before the job has a result to write
            logger.warning("progress of job %s is not written: %s", job.id, error.message)

    def _adapt(self, job: Job) -> None:
        import torch

        from training.adaptation import AdaptConfig  # these load transformers, which takes seconds
        from training.base_model import BaseModel, load_base
        from training.task_calibration import adapt_and_calibrate

        settings, posterior = self.settings, self.prior.posterior
        if self._loaded is None:
            base = load_base(
                settings.base_model,
                revision=settings.revision,
                dtype=getattr(torch, settings.dtype),
                device=settings.adapt_device,
                context=settings.context,
            )
            self._loaded = base, attach(base.model, posterior.config.targets, posterior.config.layers)
        base, attached = self._loaded
        assert isinstance(base, BaseModel)
        config = AdaptConfig.from_record(self.prior.record.training)
        if job.steps is not None:
            config = config.with_steps(job.steps)
        examples = self.registry.examples(job.id)
        phi, calibration = adapt_and_calibrate(
            base,
            attached,
            posterior.map(lambda tensor: tensor.to(settings.adapt_device)),
            examples,
            config,
            self.prior.calibration,
            seed=job.seed,
            on_step=lambda step, steps: self._report(job, step / max(1, steps)),
        )

        def record(version: int) -> Record:
            return Record(
                task=job.task,
                version=version,
                parent=self.prior.digest,
                seed=job.seed,
                shots=len(examples),
                training={"inner": config.model_dump(), "job": job.id},
            )

        def save() -> tuple[str, int]:
            stored = self._made_by(job) or self.store.add(job.task, phi, calibration, record)
            return stored.digest, stored.record.version

        persist(lambda: self.registry.complete(job.id, save))

    def _made_by(self, job: Job) -> StoredPosterior | None:
        """The version that the job has saved already, where what came after failed."""
        try:
            newest = self.store.current(job.task)
        except (TaskNotFound, InvalidPosterior):
            return None
        return newest if newest.record.training.get("job") == job.id else None


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
    os._exit(0)  # the server is gone; what was under way is taken up again when it comes back


def main() -> None:
    """Works until the server ends."""
    settings = Settings.model_validate_json(sys.stdin.readline())
    configure(settings)
    tracing = Tracing.of(settings)
    wake = threading.Event()
    threading.Thread(target=_watch_server, args=(wake,), daemon=True).start()

    import torch

    import training.task_calibration  # noqa: F401 # pyright: ignore[reportUnusedImport] -- spends its seconds before a job comes
    from training.allocator import keep_freed_memory

    if hasattr(os, "nice"):
        os.nice(NICENESS)

    torch.set_num_threads(settings.adapt_threads)
    keep_freed_memory()
    prior = load_posterior(settings.global_posterior)
    registry = JobRegistry(settings.store / "jobs.sqlite3")
    objects = None if settings.objects is None else Objects(settings.objects)
    adapter = Adapter(settings, prior, TaskStore(settings.store, prior, objects=objects), registry)
    while True:
        job = persist(registry.claim)
        if job is None:
            wake.wait(POLL_SECONDS)
            wake.clear()
        else:
            with nullcontext() if tracing is None else tracing.job(job.id, job.task, job.attempts):
                adapter.run(job)


if __name__ == "__main__":
    main()
