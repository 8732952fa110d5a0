"""Evaluation in free text: the right option's text is the right answer, and no options are given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pydantic import BaseModel
from torch import Tensor

from abmll import metrics
from abmll.calibration import Calibration
from abmll.curves import curves
from abmll.examples import Example
from abmll.layers import Attached
from abmll.posterior import Posterior
from abmll.text_calibration import TextCalibration, TextConfidence, fit_texts
from training.adaptation import AdaptConfig, task_posterior
from training.base_model import BaseModel as Base
from training.decoded_texts import DecodedTexts, decode_texts
from training.episodes import label
from training.evaluation import (
    EvalConfig,
    at_risk,
    each_task,
    familiar_tasks,
    family_weights,
    held_out_families,
    mean_of_known,
    support_and_query,
    task_risk,
)
from training.progress import Progress, silent
from training.tasks import Task


@dataclass(frozen=True)
class TextPredictions:
    """Free-text answers on one task with one support set.

    Attributes:
        task: The task.
        shots: Size of the support set.
        answers: To the queries.
    """

    task: Task
    shots: int
    answers: DecodedTexts


def adapt_without_options(
    base: Base,
    attached: Attached,
    theta: Posterior,
    task: Task,
    shots: int,
    inner: AdaptConfig,
    config: EvalConfig,
    repeat: int,
) -> tuple[Posterior, list[Example]]:
    """Adapts to a random support set of a task, without options; gives the posterior and other items of the task."""
    some, others = support_and_query(task, shots, config, repeat)
    support, query = ([example.as_free_text() for example in part] for part in (some, others))
    generator = torch.Generator().manual_seed(config.seed)
    return task_posterior(attached, theta, label(base, theta.config.template, support), inner, generator), query


def predict_text_task(
    base: Base,
    attached: Attached,
    theta: Posterior,
    task: Task,
    shots: int,
    inner: AdaptConfig,
    config: EvalConfig,
    repeat: int = 0,
) -> TextPredictions:
    """Adapts to a task without options, and answers other items of it in free text."""
    phi, query = adapt_without_options(base, attached, theta, task, shots, inner, config, repeat)
    return TextPredictions(task, shots, decode_texts(base, attached, phi, query, config.draws, config.seed))


def predict_texts(
    base: Base,
    attached: Attached,
    theta: Posterior,
    tasks: Sequence[Task],
    inner: AdaptConfig,
    config: EvalConfig,
    progress: Progress = silent,
    jobs: int = 1,
) -> list[TextPredictions]:
    """Runs ``predict_text_task`` for every task, number of shots and support set; see ``predict_tasks``."""
    return each_task(predict_text_task, base, attached, theta, tasks, inner, config, progress, jobs)


def calibrate_texts(
    base: Base,
    attached: Attached,
    theta: Posterior,
    validation: Sequence[Task],
    training: Sequence[Task],
    inner: AdaptConfig,
    config: EvalConfig,
    progress: Progress = silent,
    jobs: int = 1,
) -> tuple[list[TextCalibration], list[TextPredictions]]:
    """Answers validation tasks and new tasks of the training families' kinds in free text, and calibrates on them.

    As ``calibrate_anew`` does with options.

    Returns:
        The entries for ``Calibration.texts``, and the answers on the validation tasks.
    """
    predictions = predict_texts(base, attached, theta, validation, inner, config, progress, jobs)
    tasks, fewer = familiar_tasks(training, config)
    familiar = predict_texts(base, attached, theta, tasks, inner, fewer, progress, jobs) if tasks else []
    return fit_text_calibration(predictions, familiar), predictions


def fit_text_calibration(
    predictions: Sequence[TextPredictions], familiar: Sequence[TextPredictions] = ()
) -> list[TextCalibration]:
    """Fits the confidence of free texts, an entry a number of shots.

    Args:
        predictions: On validation tasks, whose families meta-training has not seen.
        familiar: On tasks of the training families; they count half.
    """
    entries: list[TextCalibration] = []
    for shots in sorted({item.shots for item in predictions}):
        group = [item for item in predictions if item.shots == shots]
        others = [item for item in familiar if item.shots == shots]
        fit = _fit(group, others)
        right = torch.cat([item.answers.correct for item in group])
        before = torch.cat([item.answers.judged.logits.sigmoid() for item in group])
        tasks, correct = [item.task for item in group], [item.answers.correct for item in group]
        held_out = _held_out_answers(group, others)
        entries.append(
            TextCalibration(
                **fit.model_dump(),
                shots=shots,
                risk=task_risk(tasks, _confidence(fit, group), correct),
                accuracy=right.double().mean().item(),
                ece_before=metrics.expected_calibration_error(before, right),
                ece_after=metrics.expected_calibration_error(*held_out),
                questions=len(right),
                curves=curves(*held_out),
            )
        )
    return entries


def _fit(group: Sequence[TextPredictions], familiar: Sequence[TextPredictions]) -> TextConfidence:
    items = [*group, *familiar]
    weights = family_weights([[item.task for item in part] for part in (group, familiar)])
    return fit_texts([item.answers.judged for item in items], weights)


def _confidence(fit: TextConfidence, group: Sequence[TextPredictions]) -> list[Tensor]:
    return [fit.confidence(item.answers.judged.logits) for item in group]


def _held_out_answers(group: Sequence[TextPredictions], familiar: Sequence[TextPredictions]) -> tuple[Tensor, Tensor]:
    """Confidence of all answers, each family's by a fit to the others, and whether they were right."""
    confidences: list[Tensor] = []
    corrects: list[Tensor] = []
    for inside, others in held_out_families(group):
        confidences += _confidence(_fit(others, familiar), inside)
        corrects += [item.answers.correct for item in inside]
    return torch.cat(confidences), torch.cat(corrects)


class TextScores(BaseModel, frozen=True):
    """Measures of free-text answers, each a mean over tasks, but for ECE, which is of all answers together.

    ``prr`` is the prediction rejection ratio; ``answered_10`` and ``wrong_10`` are as in ``Scores``.
    """

    accuracy: float
    ece: float
    nll: float
    brier: float
    auroc: float
    prr: float
    answered_10: float | None = None
    wrong_10: float | None = None
    tasks: int


def score_texts(predictions: Sequence[TextPredictions], calibration: Calibration | None) -> TextScores:
    """Measures free-text answers; their confidence is the predictive probability where there is no calibration."""
    rows: list[dict[str, float]] = []
    confidences: list[Tensor] = []
    for item in predictions:
        entry = None if calibration is None else calibration.nearest_text(item.shots)
        correct, logits = item.answers.correct, item.answers.judged.logits
        confidence = logits.sigmoid() if entry is None else entry.confidence(logits)
        confidences.append(confidence)
        both = torch.stack([1 - confidence, confidence], dim=1)
        row = {
            "accuracy": correct.double().mean().item(),
            "nll": metrics.negative_log_likelihood(both, correct.long()),
            "brier": ((confidence - correct.double()) ** 2).mean().item(),
            "auroc": metrics.confidence_auroc(confidence, correct),
            "prr": metrics.prediction_rejection_ratio(confidence, correct),
        }
        rows.append(row | at_risk(entry, confidence, correct))
    right = torch.cat([item.answers.correct for item in predictions])
    means = {key: mean_of_known([row[key] for row in rows if key in row]) for key in rows[-1]}
    ece = metrics.expected_calibration_error(torch.cat(confidences), right)
    return TextScores(**means, ece=ece, tasks=len({item.task.name for item in predictions}))
