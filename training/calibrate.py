"""Everything that a posterior's calibration holds: for questions with options, and for free text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from abmll.calibration import Calibration
from abmll.errors import AbmllError
from abmll.layers import Attached
from abmll.posterior import Posterior
from abmll.text_calibration import TextCalibration
from training.adaptation import AdaptConfig
from training.base_model import BaseModel as Base
from training.evaluation import EvalConfig, calibrate_anew, has_enough, score
from training.progress import Progress
from training.report import grouped, markdown
from training.tasks import Task
from training.text_evaluation import TextPredictions, calibrate_texts, score_texts


def calibrate_all(
    base: Base,
    attached: Attached,
    theta: Posterior,
    validation: Sequence[Task],
    training: Sequence[Task],
    inner: AdaptConfig,
    config: EvalConfig,
    progress: Progress,
    jobs: int,
) -> tuple[Calibration, dict[str, Any], list[str]]:
    """Calibrates on validation tasks: in free text on all of them, with options on those that have some.

    Args:
        base: Model and tokenizer.
        attached: The same model, attached.
        theta: The global posterior.
        validation: Tasks that meta-training has not seen, at least one.
        training: Tasks of the training families, best items that the base model has not read.
        inner: Inner-loop settings.
        config: Settings.
        progress: Shows progress.
        jobs: Processes, see ``predict_tasks``.

    Returns:
        The calibration, the measures on the validation tasks by category and shots, and these as Markdown tables.

    Raises:
        AbmllError: There are no options, and free text cannot be calibrated.
    """
    names = sorted(task.name for task in validation)
    tables: list[str] = []
    results: dict[str, Any] = {}
    choices = [task for task in validation if not task.is_free_text and has_enough(task, min(config.shots))]
    texts: list[TextCalibration] = []
    answers: list[TextPredictions] = []
    if base.tokenizer.eos_token_id is not None:  # else no text ever comes to its end
        texts, answers = calibrate_texts(base, attached, theta, validation, training, inner, config, progress, jobs)
    elif not choices:
        raise AbmllError("the tokenizer has no token that ends texts: free text cannot be calibrated", field="model")
    calibration: Calibration | None = None
    if choices:
        familiar = [task for task in training if not task.is_free_text]
        of_options, predictions = calibrate_anew(
            base, attached, theta, choices, familiar, inner, config, progress, jobs
        )
        calibration = of_options.model_copy(update={"texts": texts, "fitted_on": names})
        rows = grouped(predictions, lambda group: score(group, of_options), lambda task: task.category)
        results |= {f"{name}/{shots}": scores.model_dump() for name, shots, scores in rows}
        tables.append(markdown(rows, "category (validation)"))
    if texts:
        of_texts = Calibration(by_shots=[], texts=texts, fitted_on=names, draws=config.draws)
        calibration = calibration or of_texts
        rows = grouped(answers, lambda group: score_texts(group, of_texts), lambda task: task.category)
        results |= {f"text/{name}/{shots}": scores.model_dump() for name, shots, scores in rows}
        tables.append(markdown(rows, "free text (validation)"))
    assert calibration is not None
    return calibration, results, tables
