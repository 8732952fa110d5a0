"""The HTTP contract, of questions: requests and replies; and its errors."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from abmll.adaptive import TOLERANCE
from abmll.examples import MAX_OPTIONS
from abmll.names import GLOBAL
from training.settings import SEED_LIMIT

MAX_EXAMPLES = 64
MAX_TOKENS = 512
MAX_CHARACTERS = 200_000

# What ended a free text: the model, a stop string, or `max_tokens`.
Finish = Literal["end", "stop", "length"]
Text = Annotated[str, Field(max_length=MAX_CHARACTERS)]


class Request(BaseModel):
    """A request's body: exact types, no unknown fields."""

    model_config = ConfigDict(strict=True, extra="forbid")


def described(model: type[BaseModel], field: str) -> str | None:
    """What a model says of a field, for another's that means the same."""
    return model.model_fields[field].description


class GenerateRequest(Request):
    """A question."""

    prompt: Text = Field(
        description="The question. Must not be blank.", examples=["The film was a delight. Sentiment?"]
    )
    task: str = Field(GLOBAL, description="Which posterior answers: `global`, or a task made by `POST /adapt`.")
    version: int | None = Field(
        None, ge=1, description="Which version of the task answers; null: as the task is served."
    )
    options: list[Text] | None = Field(
        None,
        description=f"2 to {MAX_OPTIONS} distinct answers to choose from; null for a free-text answer.",
        examples=[["positive", "negative"]],
    )
    draws: int | Literal["auto"] = Field(
        "auto",
        description="Draws from the posterior: more is slower and steadier. `auto`: with options, as many as settle "
        "the answer and its confidence to within `tolerance`, at most the server's default; else that default. Of a "
        "task that is a mixture there are as many pairs of each member: rounded up, and `auto` takes all.",
    )
    tolerance: float = Field(
        TOLERANCE,
        ge=0,
        le=1,
        description="With `draws: auto`: what further draws may move the confidence by, at 95 %. 0: all draws.",
    )
    seed: int = Field(
        0, ge=0, lt=SEED_LIMIT, description="Seed of draws and of free text: the same request gives the same reply."
    )
    timeout: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Seconds until the question is given up with 504; null, or more than the server allows: as the "
        "server is set.",
    )
    abstain_below: float | None = Field(
        None, ge=0, le=1, description="Least confidence: below it the reply has no answer, but a reason and candidates."
    )
    target_risk: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="In place of `abstain_below`: at most this share of questions has a wrong answer, on "
        "average over tasks like the validation tasks, which tell what confidence that takes (conformal risk control).",
        examples=[None],
    )
    max_tokens: int = Field(32, ge=1, le=MAX_TOKENS, description="Longest free-text answer, in tokens.")
    stop: list[Annotated[str, Field(min_length=1, max_length=64)]] = Field(
        default_factory=list,
        max_length=8,
        description="A free-text answer ends before the first of these strings.",
        examples=[["\n"]],
    )
    temperature: float = Field(
        0.0,
        ge=0,
        le=2,
        description="Of a free-text answer: 0 takes the likeliest token each time, 1 chooses as the model finds them "
        "likely. The same seed chooses the same.",
    )
    top_p: float = Field(
        1.0, gt=0, le=1, description="A free text is made of the likeliest tokens that together have this probability."
    )
    samples: int = Field(
        0,
        ge=0,
        le=32,
        description="As many further free-text answers, each under a draw of its own, tell how far the model agrees "
        "with itself (`semantics`); at `temperature`, or at 1 where that is 0. Each wording is scored under `draws`.",
    )
    meaning: Literal["normalized", "entailment"] = Field(
        "normalized",
        description="When two of the `samples` mean the same: where they are equal without case, punctuation and "
        "articles, or also where the model, asked with the global posterior, finds that each says all that the other "
        "says. A small model cannot judge that.",
    )
    tokens: bool = Field(False, description="Whether the reply tells a free-text answer token by token.")
    stream: bool = Field(
        False,
        description="Whether the reply is a stream of server-sent events: `token` for each token of a free text as it "
        "comes, then `answer` with the whole reply, or `error`.",
    )
    normalize: Literal["sum", "mean"] | None = Field(
        None,
        description="How options are scored: log-probability of the whole text (`sum`), or its mean per token "
        "(`mean`). null: as the posterior was trained. Calibration holds for that alone, and the reply says "
        "`calibrated: false` for the other.",
    )


class Uncertainty(BaseModel):
    """Entropies in nats, of the distribution that `probabilities` gives; of free text, in nats per token."""

    total: float = Field(description="Entropy of the predictive distribution.", examples=[0.47])
    aleatoric: float = Field(description="The question's own: mean entropy of the draws.", examples=[0.43])
    epistemic: float = Field(
        description="The model's ignorance: what more data would remove. 0 with one draw.", examples=[0.04]
    )


class ScoreRequest(Request):
    """A finished answer, from anywhere, to be scored."""

    prompt: Text = Field(description="The question. Must not be blank.", examples=["What is the capital of France?"])
    answer: Text = Field(
        description=f"The answer, of at most {MAX_TOKENS} tokens. Must not be blank. It is scored as an option is, "
        "with its end.",
        examples=["Paris"],
    )
    end: bool = Field(
        True,
        description="Whether the answer ends there: its end is scored too, as `POST /generate` does. false: as an "
        "option is scored, whatever follows it.",
    )
    task: str = Field(GLOBAL, description="Which posterior scores: `global`, or a task made by `POST /adapt`.")
    version: int | None = Field(None, ge=1, description="Which version of the task; null: as the task is served.")
    draws: int | Literal["auto"] = Field("auto", description="Draws from the posterior; `auto`: the server's default.")
    seed: int = Field(0, ge=0, lt=SEED_LIMIT, description="Seed of the draws: the same request gives the same reply.")
    timeout: float | None = Field(None, gt=0, allow_inf_nan=False, description="As for `POST /generate`.")


class PosteriorId(BaseModel):
    """Which posterior answered."""

    id: str = Field(description="Hash of the parameters.", examples=["5f0c6d7be2a91b34"])
    version: int = Field(description="Version of the task.", examples=[1])
    task: str = Field(description="The task.", examples=["global"])


class Usage(BaseModel):
    """Tokens of a question and its answer, each counted once whatever the number of draws."""

    prompt_tokens: int = Field(description="Of the question, as the model reads it.", examples=[17])
    answer_tokens: int = Field(description="Of the likeliest answer, given or withheld.", examples=[2])


class Timing(BaseModel):
    """Where the time went, in milliseconds."""

    total_ms: float = Field(description="From the request's arrival to its reply.", examples=[41.2])
    engine_ms: float = Field(description="In the engine, its queue included.", examples=[39.8])
    queue_ms: float = Field(description="Of that, waiting for the engine.", examples=[11.3])


class OtherToken(BaseModel):
    """A token that might stand in a place."""

    text: str = Field(description="Its text.", examples=[" Paris"])
    probability: float = Field(description="Predictive probability in this place.", examples=[0.71])


class TokenReply(BaseModel):
    """One token of a free-text answer, given those before it; draws that foresaw them count more."""

    text: str = Field(
        description="All tokens' texts together are the answer, with white space around it and the stop string that "
        "ended it. Empty: the end of the text, or part of a character.",
        examples=[" Paris"],
    )
    probability: float = Field(
        description="Predictive probability; all tokens' product is `raw_confidence`.", examples=[0.71]
    )
    uncertainty: Uncertainty = Field(
        description="Of the next token, in nats: entropies over the 64 likeliest, and the rest as one."
    )
    likeliest: list[OtherToken] = Field(description="The likeliest tokens in this place.")


class StreamedToken(BaseModel):
    """A token of a free text as it comes, the data of an event `token`."""

    text: str = Field(
        description="What of the answer can be shown with it. Empty: part of a character, or what may begin a stop "
        "string, which comes with a later token. All texts together are the answer, with white space around it.",
        examples=[" Paris"],
    )
    probability: float | None = Field(
        description="Under the posterior's mean, before `temperature`; the draws' comes with the `answer`. null: no "
        "token, but what had waited for one.",
        examples=[0.71],
    )


class Meaning(BaseModel):
    """Free-text answers that say the same, see `meaning` in the request."""

    answer: str = Field(description="Its likeliest wording.", examples=["Paris"])
    probability: float = Field(
        description="Predictive probability of the wordings that were found, together.", examples=[0.6]
    )
    samples: int = Field(description="How many samples mean this.", examples=[7])


class Semantics(BaseModel):
    """How far the model agrees with itself on what the answer is, however worded."""

    meanings: list[Meaning] = Field(description="Likeliest first.")
    unseen: float = Field(description="Probability of all that was not found.", examples=[0.3])
    answer_probability: float = Field(description="Of the answer's meaning.", examples=[0.6])
    consistency: float = Field(description="Share of the samples that mean what the answer means.", examples=[0.875])
    uncertainty: Uncertainty = Field(
        description="Semantic entropy, in nats, of the meanings found and all else as one: `aleatoric` within a draw, "
        "`epistemic` between draws. It is low, too, where `unseen` is nearly all: read it beside that."
    )


class Candidate(BaseModel):
    """What might have been the answer."""

    answer: str = Field(description="The option, or the text.", examples=["positive"])
    probability: float = Field(description="As in `probabilities`; of free text, `raw_confidence`.", examples=[0.55])


class Abstained(BaseModel):
    """Why there is no answer."""

    reason: str = Field(
        description="For a person to read.",
        examples=["the likeliest answer has a confidence of 55.0 %, below the 80.0 % asked for"],
    )
    threshold: float = Field(
        description="The confidence that an answer must reach; with `target_risk`, pass.", examples=[0.8]
    )
    candidates: list[Candidate] = Field(description="Likeliest first.")


class GenerateReply(BaseModel):
    """An answer with its confidence."""

    request_id: str = Field(description="Also in the header `X-Request-ID`.", examples=["a1b2c3d4e5f60718"])
    task: str = Field(description="The task that was asked.", examples=["global"])
    posterior: PosteriorId = Field(description="Which posterior answered.")
    answer: str | None = Field(
        description="The most probable option, or the free text; null where it is not sure enough (`abstained`).",
        examples=["positive"],
    )
    answer_index: int | None = Field(
        description="Index of the answer in `options`; null for free text or none.", examples=[0]
    )
    abstained: Abstained | None = Field(description="Why there is no answer; null where there is one.")
    options: list[str] | None = Field(description="The options asked.", examples=[["positive", "negative"]])
    probabilities: list[float] | None = Field(
        description="Of the options, in their order, calibrated where `calibrated` is true; null for free text.",
        examples=[[0.83, 0.17]],
    )
    confidence: float = Field(
        description="Probability of the likeliest answer, calibrated where `calibrated` is true. Of a free text that "
        "is not calibrated, the geometric mean per token of its predictive probability.",
        examples=[0.83],
    )
    raw_confidence: float = Field(
        description="Predictive probability of the answer before calibration; of free text, of the whole text.",
        examples=[0.87],
    )
    calibrated: bool = Field(
        description="Whether the posterior's calibration was applied. To free text it is where the likeliest text was "
        "decoded (`temperature` 0, no `stop`) and came to its end, or was scored with it.",
        examples=[True],
    )
    prediction_set: list[str] | None = Field(
        description="The likeliest options, until they hold the right one in at least 90 % of questions (split "
        "conformal); null for free text or without calibration.",
        examples=[["positive"]],
    )
    uncertainty: Uncertainty = Field(
        description="Entropies in nats, of what `probabilities` gives; of free text, in nats per token."
    )
    standard_error: float = Field(
        description="Monte Carlo standard error of `confidence`; of free text, of `raw_confidence`. 0 with one draw, "
        "which does not tell it.",
        examples=[0.02],
    )
    standard_errors: list[float] | None = Field(
        description="Monte Carlo standard errors of `probabilities`; null for free text.", examples=[[0.02, 0.02]]
    )
    draws: int = Field(description="Draws used.", examples=[8])
    finish: Finish | None = Field(
        description="What ended a free text: the model (`end`), a stop string (`stop`) or `max_tokens` (`length`); "
        "null with options, and for a text that was scored.",
        examples=[None],
    )
    usage: Usage = Field(description="Tokens of the question and its answer, each counted once.")
    tokens: list[TokenReply] | None = Field(description="Of a free text, where it was asked to tell them.")
    semantics: Semantics | None = Field(description="Of a free text, where `samples` were asked for.")
    timing: Timing = Field(description="Where the time went, in milliseconds.")


class Health(BaseModel):
    """Whether the server lives, or answers."""

    status: str = Field(description="`ok`, or what is wrong.", examples=["ok"])


class ErrorBody(BaseModel):
    """What was wrong and what would be right."""

    type: str = Field(description="Kind of error.", examples=["TaskNotFound"])
    message: str = Field(
        description="What was wrong and what would be right.",
        examples=["there is no task 'films'; known tasks: global, film-reviews"],
    )
    field: str | None = Field(description="The input at fault, where there is one.", examples=["task"])


class ErrorReply(BaseModel):
    """Every error has this form."""

    error: ErrorBody = Field(description="What was wrong and what would be right.")
