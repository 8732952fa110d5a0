"""What the server replies. Fields that a newer server adds are kept and do no harm."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Reply(BaseModel):
    """Base of all replies."""

    model_config = ConfigDict(extra="allow", frozen=True)


class Health(Reply):
    """That the server lives (ok), or answers questions (ready)."""

    status: Literal["ok", "ready"]


class PosteriorId(Reply):
    """Which posterior answered, or was made."""

    id: str
    version: int
    task: str | None = None


class Usage(Reply):
    """Tokens of a question and its answer, each counted once whatever the number of draws."""

    prompt_tokens: int
    answer_tokens: int


class Uncertainty(Reply):
    """Entropies in nats; of free text, in nats per token.

    Attributes:
        total: Entropy of the predictive distribution.
        aleatoric: The question's own doubt, which more data would not remove.
        epistemic: The model's ignorance, which more data would remove.
    """

    total: float
    aleatoric: float
    epistemic: float


class Timing(Reply):
    """Where the time went, in milliseconds."""

    total_ms: float
    engine_ms: float
    queue_ms: float


class OtherToken(Reply):
    """A token that might stand in a place, with its predictive probability."""

    text: str
    probability: float


class Token(Reply):
    """One token of a free text, given those before it.

    Attributes:
        text: All tokens' texts together are the answer, and the stop string that ended it; empty for the text's end,
            or part of a character.
        probability: Predictive probability; all tokens' product is the answer's ``raw_confidence``.
        uncertainty: Of the next token in this place.
        likeliest: The likeliest tokens in this place.
    """

    text: str
    probability: float
    uncertainty: Uncertainty
    likeliest: list[OtherToken]


class StreamedToken(Reply):
    """A token of a free text as it comes.

    Attributes:
        text: What can be shown with it; all of them together are the answer, with white space around it.
        probability: Under the posterior's mean; None: no token, but what had waited for one.
    """

    text: str
    probability: float | None


class Meaning(Reply):
    """Free-text answers that say the same: the likeliest wording, its probability, and how many samples mean it."""

    answer: str
    probability: float
    samples: int


class Semantics(Reply):
    """How far the model agrees with itself on what the answer is, however worded.

    Attributes:
        meanings: Likeliest first.
        unseen: Probability of all that was not found.
        answer_probability: Of the answer's meaning.
        consistency: Share of the samples that mean what the answer means.
        uncertainty: Semantic entropy in nats; aleatoric within a draw, epistemic between draws.
    """

    meanings: list[Meaning]
    unseen: float
    answer_probability: float
    consistency: float
    uncertainty: Uncertainty


class Candidate(Reply):
    """What might have been the answer, with its probability."""

    answer: str
    probability: float


class Abstained(Reply):
    """Why there is no answer; candidates are likeliest first."""

    reason: str
    threshold: float
    candidates: list[Candidate]


class Answer(Reply):
    """An answer with its confidence.

    Attributes:
        answer: None where it was not sure enough for what was asked, see ``abstained``.
        probabilities: Of the options, in their order; None for free text.
        confidence: Probability of the answer, calibrated where ``calibrated`` is true.
        raw_confidence: The same before calibration.
        standard_error: Monte Carlo standard error of the answer's probability.
        standard_errors: Those of ``probabilities``; None for free text.
        prediction_set: Options that together hold the right one at the server's coverage, if it says.
        finish: What ended a free text; ``length``: it was cut short.
        tokens: Of a free text, where they were asked for.
        semantics: Of a free text, where samples were asked for.
    """

    request_id: str
    task: str
    posterior: PosteriorId
    answer: str | None
    answer_index: int | None = None
    abstained: Abstained | None = None
    options: list[str] | None = None
    probabilities: list[float] | None = None
    confidence: float
    raw_confidence: float
    calibrated: bool | None = None
    prediction_set: list[str] | None = None
    uncertainty: Uncertainty
    standard_error: float
    standard_errors: list[float] | None = None
    draws: int
    finish: Literal["end", "stop", "length"] | None = None
    usage: Usage | None = None
    tokens: list[Token] | None = None
    semantics: Semantics | None = None
    timing: Timing


class Job(Reply):
    """An adaptation job; ``progress`` goes from 0 to 1, times are UTC in ISO 8601."""

    job: str
    task: str
    status: Literal["queued", "running", "done", "failed", "cancelled"]
    progress: float = 0.0
    error: str | None = None
    posterior: PosteriorId | None = None
    created: str | None = None
    started: str | None = None
    finished: str | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen."""
        return self.status in ("done", "failed", "cancelled")


class TaskVersion(Reply):
    """One version of a task."""

    version: int
    status: Literal["ready", "damaged"] = "ready"
    error: str | None = None
    id: str | None = None
    parent: str | None = None
    shots: int | None = None
    seed: int | None = None
    created: str | None = None


class TaskInfo(Reply):
    """A task; ``versions`` (oldest first) and ``calibration`` are told for one task, not in the list."""

    task: str
    status: str = "ready"
    error: str | None = None
    version: int | None = None
    posterior: PosteriorId | None = None
    shots: int | None = None
    created: str | None = None
    calibrated: bool | None = None
    base_model: str | None = None
    calibration: dict[str, object] | None = None
    versions: list[TaskVersion] | None = None
    serving: dict[str, float] | None = None


class Feedback(Reply):
    """Feedback that the server has stored."""

    request_id: str
    task: str
    version: int
    correct: bool


class Measured(Reply):
    """Measures of judged answers; ``nll`` in nats."""

    accuracy: float
    ece: float
    nll: float
    brier: float


class ReliabilityBin(Reply):
    """Answers with a confidence above ``low`` and up to ``high``: their number, mean confidence and share of right."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


class RiskPoint(Reply):
    """Where the surest ``coverage`` of the questions are answered, ``risk`` of the answers are wrong."""

    coverage: float
    risk: float


class Curves(Reply):
    """Reliability diagram (bins with answers) and risk-coverage curve (ascending) of judged answers."""

    answers: int
    bins: list[ReliabilityBin]
    risk_coverage: list[RiskPoint]


class Reliability(Reply):
    """How far a version's confidence held, on validation tasks and on its own judged answers; None: not known."""

    task: str
    version: int
    validation: Curves | None = None
    feedback: Curves | None = None


class Recalibration(Reply):
    """A temperature fitted to feedback; ``after`` is measured on answers that it was not fitted on.

    Attributes:
        applied: The new version of the task; None where nothing was changed.
    """

    task: str
    version: int
    answers: int
    temperature_before: float
    temperature_after: float
    before: Measured
    after: Measured
    applied: int | None
