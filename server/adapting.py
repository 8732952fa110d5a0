"""One adaptation job's work: the base model, loaded with the first job, and what a job makes of its examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from abmll.calibration import Calibration
from abmll.errors import AbmllError, InvalidPosterior, TaskNotFound
from abmll.examples import Example
from abmll.layers import Attached, attach
from abmll.posterior import Posterior
from abmll.store import Record, StoredPosterior
from server.jobs import Job, JobRegistry
from server.settings import Settings
from server.store import TaskStore

if TYPE_CHECKING:
    from training.adaptation import AdaptConfig
    from training.base_model import BaseModel

# Of a process that adapts: answers go first.
NICENESS = 10
# How often it is looked for a job that nobody has told of.
POLL_SECONDS = 1.0
# A disk that is full or failing is tried again after so long.
STORE_SECONDS = 2.0


def reason(error: BaseException) -> str:
    """What a job that ended by an error is said to have failed by."""
    told = isinstance(error, AbmllError)
    return error.message if told else f"adaptation failed: {type(error).__name__}; see the server's log"


class Adapting:
    """Adapts the global posterior to jobs' examples; loads the base model with the first job.

    Not before: a second copy of a large base model is memory that a server that only answers would pay
    for in vain.

    Args:
        settings: The server's.
        prior: The global posterior.
    """

    def __init__(self, settings: Settings, prior: StoredPosterior) -> None:
        self.settings, self.prior = settings, prior
        self._loaded: tuple[BaseModel, Attached] | None = None

    def run(
        self, job: Job, examples: Sequence[Example], report: Callable[[float], None]
    ) -> tuple[Posterior, Calibration | None]:
        """Makes a job's posterior and its calibration; ``report`` is told of progress, 0 to 1, and may raise.

        Raises:
            InvalidExamples: The adaptation diverged.
        """
        from training.base_model import load_base, weights_dtype  # these load transformers, which takes seconds
        from training.task_calibration import adapt_and_calibrate

        settings, posterior = self.settings, self.prior.posterior
        if self._loaded is None:
            base = load_base(
                settings.base_model,
                revision=settings.revision,
                dtype=weights_dtype(settings.dtype),
                device=settings.adapt_device,
                context=settings.context,
            )
            self._loaded = base, attach(base.model, posterior.config.targets, posterior.config.layers)
        base, attached = self._loaded
        return adapt_and_calibrate(
            base,
            attached,
            posterior.map(lambda tensor: tensor.to(settings.adapt_device)),
            examples,
            inner_settings(self.prior, job),
            self.prior.calibration,
            seed=job.seed,
            on_step=lambda step, steps: report(step / max(1, steps)),
        )


def inner_settings(prior: StoredPosterior, job: Job) -> AdaptConfig:
    """Settings of a job's inner loop: those of meta-training, with the steps that the job asks for."""
    from training.adaptation import AdaptConfig

    config = AdaptConfig.from_record(prior.record.training)
    return config if job.steps is None else config.with_steps(job.steps)


def finish(
    job: Job,
    made: tuple[Posterior, Calibration | None],
    shots: int,
    prior: StoredPosterior,
    store: TaskStore,
    registry: JobRegistry,
) -> None:
    """Saves what a job has made as its task's next version, and marks the job done.

    Raises:
        JobCancelled: The job is not running any more; nothing was saved.
        StoreFailure: Not now; called again, it goes on where it failed.
    """
    posterior, calibration = made

    def record(version: int) -> Record:
        return Record(
            task=job.task,
            version=version,
            parent=prior.digest,
            seed=job.seed,
            shots=shots,
            training={"inner": inner_settings(prior, job).model_dump(), "job": job.id},
        )

    def save() -> tuple[str, int]:
        stored = _made_by(job, store) or store.add(job.task, posterior, calibration, record)
        return stored.digest, stored.record.version

    registry.complete(job.id, save)


def _made_by(job: Job, store: TaskStore) -> StoredPosterior | None:
    """The version that the job has saved already, where what came after failed."""
    try:
        newest = store.current(job.task)
    except (TaskNotFound, InvalidPosterior):
        return None
    return newest if newest.record.training.get("job") == job.id else None
