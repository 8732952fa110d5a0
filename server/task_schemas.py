"""The HTTP contract, of tasks: how they are taught, listed, served, judged and calibrated anew."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from abmll.calibration import Calibration
from abmll.curves import Curves
from server.jobs import Job, Status
from server.schemas import MAX_EXAMPLES, PosteriorId, Request, Text
from training.settings import MAX_STEPS, SEED_LIMIT


class ExampleIn(Request):
    """A labelled example."""

    prompt: Text = Field(description="The question.", examples=["Two hours I will not get back. Sentiment?"])
    options: list[Text] | None = Field(
        None,
        description="At least two distinct answers; null: the answer is free text. All examples of a task have "
        "options, or none has.",
        examples=[["positive", "negative"]],
    )
    answer: Text | int = Field(
        description="The right option: its text, or its index. Without options, the right text.", examples=["negative"]
    )


class AdaptRequest(Request):
    """Labelled examples of a task."""

    task: str = Field(description="Name of the task to make, or to make anew.", examples=["film-reviews"])
    examples: list[ExampleIn] = Field(description=f"1 to {MAX_EXAMPLES} labelled examples.")
    steps: int | None = Field(
        None, ge=1, le=MAX_STEPS, description="Gradient steps; null: as in meta-training, more for many examples."
    )
    seed: int = Field(0, ge=0, lt=SEED_LIMIT, description="The same seed and examples give the same posterior.")


class JobReply(BaseModel):
    """An adaptation job."""

    job: str = Field(description="Id of the job.", examples=["9c1185a5c5e9fc54"])
    task: str = Field(description="The task that it makes.", examples=["film-reviews"])
    status: Status = Field(description="queued, running, done, failed or cancelled.")
    progress: float = Field(description="0 to 1.", examples=[0.4])
    error: str | None = Field(description="Why it failed.")
    posterior: PosteriorId | None = Field(description="What it made, when done.")
    created: str = Field(description="UTC, ISO 8601.", examples=["2026-01-01T12:00:00.000+00:00"])
    started: str | None = Field(description="UTC, ISO 8601.")
    finished: str | None = Field(description="UTC, ISO 8601.")

    @classmethod
    def of(cls, job: Job) -> JobReply:
        """Returns a job as told over HTTP."""
        posterior = None
        if job.digest is not None and job.version is not None:
            posterior = PosteriorId(id=job.digest, version=job.version, task=job.task)
        fields = job.model_dump(include={"task", "status", "progress", "error", "created", "started", "finished"})
        return cls(job=job.id, posterior=posterior, **fields)


class TaskSummary(BaseModel):
    """A task in the list."""

    task: str = Field(description="Its name.", examples=["film-reviews"])
    status: Literal["ready", "damaged"] = Field(description="damaged: no version that may answer can be used.")
    error: str | None = Field(description="What is wrong with its newest version, or the one that it is pinned to.")
    version: int | None = Field(
        description="The version that answers; of a damaged task the one that is pinned, or the newest; null: it "
        "cannot be read.",
        examples=[2],
    )
    posterior: PosteriorId | None = Field(description="Which posterior answers; null: none can.")
    shots: int | None = Field(description="Labelled examples that it was adapted with.", examples=[16])
    created: str | None = Field(description="UTC, ISO 8601.")
    calibrated: bool = Field(description="Whether its confidence is calibrated.")


class VersionReply(BaseModel):
    """One version of a task."""

    version: int = Field(description="Its number, from 1.")
    status: Literal["ready", "damaged"] = Field(description="damaged: it cannot be used.")
    error: str | None = Field(description="What is wrong with it.")
    id: str | None = Field(description="Hash of the parameters.")
    parent: str | None = Field(description="Id of the posterior that it was adapted from.")
    shots: int | None = Field(description="Labelled examples that it was adapted with.")
    seed: int | None = Field(description="Seed that it was adapted with.")
    created: str | None = Field(description="UTC, ISO 8601.")


class TaskReply(TaskSummary):
    """One task, with its history."""

    base_model: str | None = Field(description="Base model that the posterior is over.")
    calibration: Calibration | None = Field(description="How its confidence is made; null: it is not calibrated.")
    versions: list[VersionReply] = Field(description="Oldest first.")
    serving: dict[str, float] | None = Field(
        description="Share of the questions by version; null: the newest answers.", examples=[{"1": 0.9, "2": 0.1}]
    )


class ServingRequest(Request):
    """Which versions of a task answer."""

    versions: dict[str, float] | None = Field(
        description="Share of the questions by version: one to roll back to, or several for an A/B test, in which "
        "the same question always goes to the same version. null: always the newest.",
        examples=[{"1": 0.9, "2": 0.1}],
    )


class FeedbackRequest(Request):
    """What is said of an answer: the right one, or whether it was right."""

    request_id: str = Field(
        max_length=64, description="As in the reply to `POST /generate` or `/score`.", examples=["a1b2c3d4e5f60718"]
    )
    answer: Text | int | None = Field(None, description="The right option: its text, or its index.")
    correct: bool | None = Field(
        None,
        description="Whether the answer was right; the only way for free text, none for an answer that was withheld.",
    )


class FeedbackReply(BaseModel):
    """Feedback that is stored."""

    request_id: str = Field(description="Of the answer.")
    task: str = Field(description="The task that had answered.")
    version: int = Field(description="The version that had answered.")
    correct: bool = Field(description="Whether the answer was right.")


class RecalibrateRequest(Request):
    """Which version's temperature to fit to its feedback."""

    version: int | None = Field(None, ge=1, description="null: the version that answers (most).")
    apply: bool = Field(False, description="Whether to make a new version with it; else it is only shown.")


class Measured(BaseModel):
    """Measures of judged answers."""

    accuracy: float = Field(description="Share of right answers.")
    ece: float = Field(description="Expected calibration error, 15 bins.")
    nll: float = Field(description="Mean negative log-likelihood of the right option, in nats.")
    brier: float = Field(description="Mean Brier score, 0 to 2.")


class ReliabilityReply(BaseModel):
    """How far a version's confidence held."""

    task: str = Field(description="The task.")
    version: int = Field(description="Its version.")
    validation: Curves | None = Field(
        description="On validation tasks taught with about as many examples, each family calibrated on the others; "
        "null: not known."
    )
    feedback: Curves | None = Field(
        description="On the version's own answers that were judged, with options and calibrated free texts, the newest "
        "thousand; null: none was."
    )


class RecalibrationReply(BaseModel):
    """A temperature fitted to feedback, beside the present one."""

    task: str = Field(description="The task.")
    version: int = Field(description="The version whose answers were judged.")
    answers: int = Field(description="Judged answers that it was fitted to.")
    temperature_before: float = Field(description="The present one.")
    temperature_after: float = Field(description="The one that was fitted.")
    before: Measured = Field(description="On these answers, with the present temperature.")
    after: Measured = Field(description="On answers that the temperature was not fitted on (five folds).")
    applied: int | None = Field(
        description="The new version, same weights with the new temperature; null: nothing was changed. It answers "
        "unless the task is pinned to others; `PUT /tasks/{name}/serving` rolls back."
    )
