"""Evaluation: adapt to each task at several numbers of shots, predict its other items, count."""

from __future__ import annotations

import math
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, TypeVar

import torch
from joblib import Parallel, delayed, parallel_config
from pydantic import BaseModel, Field
from torch import Tensor

from abmll import metrics
from abmll.adaptive import TOLERANCE, Scatter, draws_needed, fit_scatter
from abmll.calibration import (
    Calibration,
    HeldOut,
    ShotCalibration,
    TemperaturePrior,
    conformal_scores,
    conformal_threshold,
    fit_temperature_prior,
    prediction_set,
    task_temperature,
)
from abmll.components import Known
from abmll.curves import curves
from abmll.draw_scores import score_draws
from abmll.errors import InvalidExamples
from abmll.examples import Example
from abmll.layers import Attached
from abmll.posterior import Posterior
from abmll.predictive import Predictive, predictive
from abmll.risk import risk_thresholds
from abmll.text_calibration import TextCalibration
from training.adaptation import AdaptConfig, task_posterior
from training.base_model import BaseModel as Base
from training.episodes import draw_support, label, relabelled, without_twins
from training.progress import Progress, silent
from training.task_calibration import held_out_scores
from training.tasks import Task

# Of each training family so many tasks calibrate, with so many queries of at most so many characters.
FAMILIAR_TASKS = 2
FAMILIAR_QUERIES = 60
FAMILIAR_CHARACTERS = 500


class OfTask(Protocol):
    """Predictions on one task."""

    @property
    def task(self) -> Task:
        """The task."""
        ...

    @property
    def shots(self) -> int:
        """Size of the support set."""
        ...


_Predictions = TypeVar("_Predictions")
_OfTask = TypeVar("_OfTask", bound=OfTask)


class EvalConfig(BaseModel, frozen=True, allow_inf_nan=False):
    """Settings of an evaluation."""

    shots: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        default=(0, 4, 16),
        description="sizes of support sets; a task with fewer than twice as many examples is left out",
    )
    queries: int = Field(default=100, ge=1, description="items predicted in each task, at most")
    supports: int = Field(default=1, ge=1, description="support sets drawn for each task and number of shots")
    draws: int = Field(default=8, ge=1)
    seed: int = 0
    coverage: tuple[float, ...] = (0.8, 0.9, 0.95)


@dataclass(frozen=True)
class TaskPredictions:
    """Predictions on one task with one support set.

    Attributes:
        task: The task.
        shots: Size of the support set.
        scores: Option scores under each draw in nats, shape (draws, queries, options).
        answers: The right options, shape (queries,).
        chance: Share of the most frequent answer of the task.
        support: Scores and answers of the support set, held out; None where it is too small.
    """

    task: Task
    shots: int
    scores: Tensor
    answers: Tensor
    chance: float
    support: HeldOut | None = None


def has_enough(task: Task, shots: int) -> bool:
    """Whether a task has so many examples to give, and as many to ask: no fewer are given under that number's name."""
    return shots <= len(task.examples) // 2


def support_and_query(
    task: Task, shots: int, config: EvalConfig, repeat: int = 0
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Draws a support set of a task and its queries, which are the same for every number of shots.

    Raises:
        InvalidExamples: All that is left to ask has been taught: the task has the same questions again and again.
    """
    rng = random.Random(f"{config.seed}:{repeat}:{task.name}")
    largest = min(max(config.shots), len(task.examples) // 2)
    pool, rest = draw_support(task, largest, rng)
    asked = without_twins(rest, pool)
    if not asked:
        raise InvalidExamples(f"task {task.name} asks the same questions again and again; give it different ones")
    return pool[:shots], asked[: config.queries]


def predict_task(
    base: Base,
    attached: Attached,
    theta: Posterior,
    task: Task,
    shots: int,
    inner: AdaptConfig,
    config: EvalConfig,
    repeat: int = 0,
) -> TaskPredictions:
    """Adapts to a random support set of a task and predicts other items of it."""
    theta = theta.unfamiliar_with(task.family)
    some, others = support_and_query(task, shots, config, repeat)
    support, query = (label(base, theta.config.template, part) for part in (some, others))
    generator = torch.Generator().manual_seed(config.seed)
    known: Known = {}
    phi = task_posterior(attached, theta, support, inner, generator, known=known)
    questions = [item.question for item in query]
    scores = score_draws(attached, phi, questions, range(config.draws), config.seed)
    answers = torch.tensor([item.answer for item in query])
    held_out = held_out_scores(attached, theta, support, inner, draws=config.draws, seed=config.seed, known=known)
    return TaskPredictions(task, shots, scores, answers, task.majority_share, held_out)


def predict_tasks(
    base: Base,
    attached: Attached,
    theta: Posterior,
    tasks: Sequence[Task],
    inner: AdaptConfig,
    config: EvalConfig,
    progress: Progress = silent,
    jobs: int = 1,
) -> list[TaskPredictions]:
    """Runs ``predict_task`` for every task, number of shots that it has enough for, and support set, in their order.

    Args:
        base: Model and tokenizer.
        attached: The same model, attached.
        theta: The global posterior.
        tasks: The tasks.
        inner: Inner-loop settings.
        config: Settings.
        progress: Shows progress.
        jobs: Processes that share the work, each with its own copy of the model. On a CPU a small model gains
            more from them than from threads.
    """
    return each_task(predict_task, base, attached, theta, tasks, inner, config, progress, jobs)


def each_task(
    predict: Callable[[Base, Attached, Posterior, Task, int, AdaptConfig, EvalConfig, int], _Predictions],
    base: Base,
    attached: Attached,
    theta: Posterior,
    tasks: Sequence[Task],
    inner: AdaptConfig,
    config: EvalConfig,
    progress: Progress,
    jobs: int,
) -> list[_Predictions]:
    """Runs ``predict`` as ``predict_tasks`` runs ``predict_task``."""
    calls = [
        (place, task, shots, repeat)
        for place, task in enumerate(tasks, start=1)
        for shots in config.shots
        if has_enough(task, shots)
        for repeat in range(config.supports)
    ]
    results: list[_Predictions] = []
    with parallel_config(backend="loky", inner_max_num_threads=max(1, (os.cpu_count() or 1) // jobs)):
        run: Any = Parallel(n_jobs=jobs, return_as="generator")
    found: Iterable[_Predictions] = run(
        delayed(predict)(base, attached, theta, task, shots, inner, config, repeat) for _, task, shots, repeat in calls
    )
    with progress("evaluate", total=len(calls)) as bar:
        for number, predictions in enumerate(found, start=1):
            results.append(predictions)
            bar.update(number, {"tasks": calls[number - 1][0]})
    return results


def calibrate_anew(
    base: Base,
    attached: Attached,
    theta: Posterior,
    validation: Sequence[Task],
    training: Sequence[Task],
    inner: AdaptConfig,
    config: EvalConfig,
    progress: Progress = silent,
    jobs: int = 1,
) -> tuple[Calibration, list[TaskPredictions]]:
    """Predicts validation tasks and tasks of the training families, and calibrates on them.

    Args:
        base: Model and tokenizer.
        attached: The same model, attached.
        theta: The global posterior.
        validation: Tasks that meta-training has not seen.
        training: Tasks of the training families, best items that the base model has not read.
        inner: Inner-loop settings.
        config: Settings.
        progress: Shows progress.
        jobs: Processes, see ``predict_tasks``.

    Returns:
        The calibration, and the predictions on the validation tasks.
    """
    predictions = predict_tasks(base, attached, theta, validation, inner, config, progress, jobs)
    tasks, fewer = familiar_tasks(training, config)
    familiar = predict_tasks(base, attached, theta, tasks, inner, fewer, progress, jobs) if tasks else []
    return calibrate(predictions, config, familiar, mixtures=inner.members > 1), predictions


def familiar_tasks(training: Sequence[Task], config: EvalConfig) -> tuple[list[Task], EvalConfig]:
    """Tasks of the training families, see ``relabelled``, and the settings to evaluate them with."""
    some = tuple(shots for shots in config.shots if shots > 0)  # with none, new labels cannot be known
    if not some:
        return [], config
    fewer = config.model_copy(update={"shots": some, "queries": min(config.queries, FAMILIAR_QUERIES)})
    return relabelled(training, FAMILIAR_TASKS, FAMILIAR_QUERIES, FAMILIAR_CHARACTERS, config.seed), fewer


class Scores(BaseModel, frozen=True):
    """Measures of a set of predictions, each a mean over tasks.

    ``answered_10`` and ``wrong_10`` are the shares of questions that get an answer, and a wrong one, where at most 10 %
    may (``risk_thresholds``); ``draws`` is how many draws settle a question (``settled``), ``ece_auto`` ECE with these.
    """

    accuracy: float
    chance: float
    ece: float
    nll: float
    brier: float
    auroc: float
    coverage_90: float | None = None
    set_size_90: float | None = None
    answered_10: float | None = None
    wrong_10: float | None = None
    draws: float | None = None
    ece_auto: float | None = None
    epistemic: float
    tasks: int


def at_risk(entry: ShotCalibration | TextCalibration | None, confidence: Tensor, correct: Tensor) -> dict[str, float]:
    """``answered_10`` and ``wrong_10`` of one task's answers; nothing where no threshold is known."""
    threshold = None if entry is None else entry.risk_threshold(0.1)
    if threshold is None:
        return {}
    told = confidence > threshold
    return {
        "answered_10": told.double().mean().item(),
        "wrong_10": (told & ~correct).double().mean().item(),
    }


def mean_of_known(values: Sequence[float]) -> float:
    """The mean of the values that are not NaN; NaN where all are."""
    kept = [value for value in values if not math.isnan(value)]
    return sum(kept) / len(kept) if kept else float("nan")


def score(predictions: Sequence[TaskPredictions], calibration: Calibration | None) -> Scores:
    """Measures predictions, tempered by ``calibration`` where given.

    ECE is taken over the pooled answers of the predictions (a task's hundred answers are too few for 15
    bins: their noise alone would show as miscalibration); all other measures are means over tasks.
    """
    rows: list[dict[str, float]] = []
    confidences: list[Tensor] = []
    corrects: list[Tensor] = []
    adaptive: list[Predictive] = []
    for item in predictions:
        usual = None if calibration is None else calibration.nearest(item.shots)
        entry = None if usual is None else usual.for_task(item.support)
        result = predictive(item.scores, 1.0 if entry is None else entry.temperature)
        probabilities, sets = result.probabilities, None
        if entry is not None and "0.9" in entry.conformal:
            sets = prediction_set(probabilities, entry.conformal["0.9"])
            sets &= item.scores[0].isfinite()  # an option that pads a row is none
        confidence, correct = result.confidence, result.answer == item.answers
        confidences.append(confidence)
        corrects.append(correct)
        row = {
            "accuracy": metrics.accuracy(probabilities, item.answers),
            "chance": item.chance,
            "nll": metrics.negative_log_likelihood(probabilities, item.answers),
            "brier": metrics.brier(probabilities, item.answers),
            "auroc": metrics.confidence_auroc(confidence, correct),
            "epistemic": result.epistemic.mean().item(),
        }
        if sets is not None:
            row["coverage_90"] = sets.gather(-1, item.answers[:, None]).double().mean().item()
            row["set_size_90"] = sets.sum(-1).double().mean().item()
        row |= at_risk(entry, confidence, correct)
        if entry is not None and entry.scatter is not None:
            few = [_with_few_draws(item.scores[:, n], entry.temperature, entry.scatter) for n in range(len(correct))]
            row["draws"] = sum(part.draws for part in few) / len(few)
            adaptive += few
        rows.append(row)
    means = {key: mean_of_known([row[key] for row in rows if key in row]) for key in rows[0]}
    right = torch.cat(corrects)
    ece = metrics.expected_calibration_error(torch.cat(confidences), right)
    ece_auto: float | None = None
    if len(adaptive) == len(right):
        answers = torch.cat([item.answers for item in predictions])
        confidence = torch.stack([part.confidence for part in adaptive])
        ece_auto = metrics.expected_calibration_error(
            confidence, torch.stack([part.answer for part in adaptive]) == answers
        )
    return Scores(**means, ece=ece, ece_auto=ece_auto, tasks=len({item.task.name for item in predictions}))


def _with_few_draws(scores: Tensor, temperature: float, scatter: Scatter) -> Predictive:
    """The predictive distribution of one question with as many draws as settle it, shape (draws, options)."""
    return predictive(scores[: draws_needed(scores, temperature, TOLERANCE, scatter)], temperature)


def calibrate(
    predictions: Sequence[TaskPredictions],
    config: EvalConfig,
    familiar: Sequence[TaskPredictions] = (),
    *,
    mixtures: bool = False,
) -> Calibration:
    """Fits how temperatures are spread, and conformal thresholds, for each number of shots.

    Tasks to come lie between those of a kind that meta-training knew and those that are like none of them: the
    two kinds count the same in the spread of temperatures. Thresholds come from the validation tasks alone.
    They were tempered with the spread that was fitted to their answers, two numbers for all of them, so that what split
    conformal prediction and risk control promise holds nearly, not exactly; and questions of one task are alike, so
    that for a new task the sets, whose threshold pools questions, hold a point or two less. ``ece_after`` is of answers
    that were not fitted to: each family's are tempered by a fit to the other families (of a single family, see
    ``held_out_families``).

    Args:
        predictions: On validation tasks.
        config: Their settings.
        familiar: On tasks of the training families; for numbers of shots without any, validation tasks count alone.
        mixtures: Whether task posteriors are mixtures. What scatters between their pairs of draws are members, which
            few draws cannot stand for: no scatter is told, and automatic draws are all.
    """
    entries: list[ShotCalibration] = []
    for shots in sorted({item.shots for item in predictions}):
        group = [item for item in predictions if item.shots == shots]
        known = [item for item in familiar if item.shots == shots]
        prior = _fit_prior(group, known)
        temperatures = [task_temperature(prior, item.support) for item in group]
        tempered = [predictive(i.scores, t) for i, t in zip(group, temperatures, strict=True)]
        nonconformity = torch.cat(
            [conformal_scores(p.probabilities, i.answers) for p, i in zip(tempered, group, strict=True)]
        )
        held_out = _held_out_answers(group, known)
        entries.append(
            ShotCalibration(
                shots=shots,
                temperature=prior.median,
                spread=prior.spread,
                conformal={str(level): conformal_threshold(nonconformity, level) for level in config.coverage},
                risk=_risk(group, tempered),
                ece_before=score(group, None).ece,
                ece_after=metrics.expected_calibration_error(*held_out),
                questions=len(nonconformity),
                scatter=None if mixtures and shots else fit_scatter([item.scores for item in group], temperatures),
                confidence=torch.cat([p.confidence for p in tempered]).mean().item(),
                epistemic=torch.cat([p.epistemic for p in tempered]).mean().item(),
                curves=curves(*held_out),
            )
        )
    return Calibration(by_shots=entries, fitted_on=sorted({item.task.name for item in predictions}), draws=config.draws)


def _risk(group: Sequence[TaskPredictions], tempered: Sequence[Predictive]) -> dict[str, float]:
    correct = [result.answer == item.answers for item, result in zip(group, tempered, strict=True)]
    return task_risk([item.task for item in group], [result.confidence for result in tempered], correct)


def task_risk(tasks: Sequence[Task], confidence: Sequence[Tensor], correct: Sequence[Tensor]) -> dict[str, float]:
    """Returns ``risk_thresholds``; a task counts once, whatever the number of its support sets.

    Args:
        tasks: One a support set.
        confidence: Of the answers with each support set, shape (queries,).
        correct: Whether they were right.
    """
    of: dict[str, list[int]] = {}
    for at, task in enumerate(tasks):
        of.setdefault(task.name, []).append(at)

    def joined(parts: Sequence[Tensor]) -> list[Tensor]:
        return [torch.cat([parts[at] for at in places]) for places in of.values()]

    return risk_thresholds(joined(confidence), joined(correct))


def family_weights(parts: Sequence[Sequence[Task]]) -> list[float]:
    """What each task counts in a fit, part after part: parts count the same, and so do the families of a part."""
    weights: list[float] = []
    for part in parts:
        # New tasks come from new families: a family counts once, not once for each of its tasks.
        tasks = Counter(task.family for task in part)
        weights += [1 / (len(tasks) * tasks[task.family]) for task in part]
    return weights


def _fit_prior(group: Sequence[TaskPredictions], familiar: Sequence[TaskPredictions]) -> TemperaturePrior:
    weights = family_weights([[item.task for item in part] for part in (group, familiar)])
    items = [*group, *familiar]
    return fit_temperature_prior([i.support for i in items], [(i.scores, i.answers) for i in items], weights)


def held_out_families(group: Sequence[_OfTask]) -> Iterator[tuple[list[_OfTask], list[_OfTask]]]:
    """Gives each family's predictions, and those of all other families.

    Of a single family it is each task's, and those of the others; of a single task its own.
    """
    several = len({item.task.family for item in group}) > 1
    parts = [item.task.family if several else item.task.name for item in group]
    for part in sorted(set(parts)):
        inside = [item for item, own in zip(group, parts, strict=True) if own == part]
        yield inside, [item for item, own in zip(group, parts, strict=True) if own != part] or inside


def _held_out_answers(group: Sequence[TaskPredictions], familiar: Sequence[TaskPredictions]) -> tuple[Tensor, Tensor]:
    """Confidence of all answers, each family's tempered by a fit to the others, and whether they were right."""
    confidences: list[Tensor] = []
    corrects: list[Tensor] = []
    for inside, others in held_out_families(group):
        prior = _fit_prior(others, familiar)
        for item in inside:
            result = predictive(item.scores, task_temperature(prior, item.support))
            confidences.append(result.confidence)
            corrects.append(result.answer == item.answers)
    return torch.cat(confidences), torch.cat(corrects)
