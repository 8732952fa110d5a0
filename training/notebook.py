"""A posterior at hand, in a notebook or a script: loaded, taught, and asked without a server."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abmll.calibration import Calibration
from abmll.draw_scores import score_draws
from abmll.draws import for_all_members
from abmll.errors import AbmllError, InvalidExamples, InvalidRequest
from abmll.examples import Example, check_options
from abmll.layers import Attached
from abmll.names import check_name
from abmll.posterior import Posterior
from abmll.predictive import predictive
from abmll.scoring import tokenize_apart
from abmll.sequences import text_predictive
from abmll.store import Record, StoredPosterior, load_posterior, save_posterior
from abmll.text_calibration import text_confidence
from clients.examples import rows_of_frame
from training.adaptation import AdaptConfig
from training.base_model import BaseModel as Base
from training.commands.opening import open_base
from training.decoded_texts import MAX_TOKENS, answer_texts
from training.embedded import POSTERIOR
from training.predictions import Prediction, Predictions
from training.ranks import ALONE
from training.settings import MAX_STEPS, SEED_LIMIT
from training.task_calibration import adapt_and_calibrate
from training.tasks import HALF, examples_of

if TYPE_CHECKING:
    import pandas as pd


def load(
    posterior: str | Path | None = None, *, model: str | None = None, device: str | None = None, dtype: str = "float32"
) -> LoadedPosterior:
    """Loads a posterior with its base model.

    Args:
        posterior: Its folder; the embedded global posterior by default.
        model: Hub name or folder of the base model, where it is not found by the name that the posterior has.
        device: Such as ``cuda:1``; a GPU by default, if there is one.
        dtype: Of the base weights: ``float32``, ``bfloat16`` or ``nf4`` (4 bits).

    Raises:
        AbmllError: The posterior is damaged, or the base model is not there or another one.
    """
    stored = load_posterior(POSTERIOR if posterior is None else Path(posterior))
    base, attached, ready = open_base(stored.posterior, model, dtype, device, ALONE)
    return LoadedPosterior(base, attached, ready, stored.record, stored.calibration)


@dataclass(frozen=True)
class LoadedPosterior:
    """A posterior with its base model; ``abmll.load`` gives the first one, ``adapt`` those of tasks.

    Attributes:
        base: Model and tokenizer.
        attached: The same model, attached; all tasks of one ``load`` share it.
        posterior: The parameters, on the model's device.
        record: Where they come from.
        calibration: How confidence is made; None: it is not calibrated.
    """

    base: Base
    attached: Attached
    posterior: Posterior
    record: Record
    calibration: Calibration | None

    def __repr__(self) -> str:
        config = self.posterior.config
        return (
            f"<{config.family} posterior of {self.record.task!r}, {self.record.shots} shots, over {config.base_model}>"
        )

    def adapt(
        self,
        examples: Iterable[Example | Mapping[str, Any]] | pd.DataFrame,
        *,
        task: str = "task",
        steps: int | None = None,
        seed: int = 0,
    ) -> LoadedPosterior:
        """Adapts the global posterior to a task; it is left as it is.

        Args:
            examples: Records or rows with ``prompt``, ``answer`` and, but for free text, ``options``.
            task: The task's name.
            steps: Gradient steps; by default as in meta-training, more for many examples.
            seed: The same seed and examples give the same posterior.

        Raises:
            AbmllError: This is a task's posterior already.
            InvalidRequest: Not a task's name, or steps or seed are out of range.
            InvalidExamples: An example is malformed, or adaptation diverged.
            PromptTooLong: An example exceeds the model's context.
        """
        if self.record.shots:
            raise AbmllError(f"this is the posterior of task {self.record.task!r}; adapt the one that `load` gave")
        check_name(task)
        _check_whole(seed, "seed", 0, SEED_LIMIT - 1)
        support = examples_of(_records(examples))
        inner = AdaptConfig.from_record(self.record.training)
        if steps is not None:
            _check_whole(steps, "steps", 1, MAX_STEPS)
            inner = inner.with_steps(steps)
        phi, calibration = adapt_and_calibrate(
            self.base, self.attached, self.posterior, support, inner, self.calibration, seed=seed
        )
        record = Record(
            task=task,
            parent=self.posterior.digest(),
            seed=seed,
            shots=len(support),
            training={"inner": inner.model_dump()},
        )
        return LoadedPosterior(self.base, self.attached, phi, record, calibration)

    def predict(
        self,
        prompts: str | Sequence[str],
        options: Sequence[str] | Sequence[Sequence[str]] | None = None,
        *,
        draws: int = 8,
        seed: int = 0,
        max_tokens: int = MAX_TOKENS,
    ) -> Predictions:
        """Answers questions under draws from the posterior.

        Args:
            prompts: A question, or several.
            options: What to choose from, for all questions or for each; None: free text.
            draws: Draws from the posterior, at least 1; of a mixture rounded up to as many pairs of each member.
            seed: Their seed.
            max_tokens: Of a free text; one that comes to no end within them has ``finish`` "length".

        Raises:
            InvalidRequest: A question is blank, or its options are not 2 to 64 texts that the model can tell apart.
            PromptTooLong: A question exceeds the model's context.
        """
        asked = _texts_of([prompts] if isinstance(prompts, str) else prompts, "prompts")
        for number, prompt in enumerate(asked):
            if not prompt.strip():
                raise InvalidRequest(f"prompts[{number}] is blank; give a question", field="prompts")
        _check_whole(draws, "draws", 1)
        _check_whole(max_tokens, "max_tokens", 1)
        _check_whole(seed, "seed", 0, SEED_LIMIT - 1)
        draws = for_all_members(draws, self.posterior.config.members)
        if options is None:
            return Predictions(self._texts(asked, draws, seed, max_tokens), self.record.task)
        if isinstance(options, str) or not hasattr(options, "__iter__"):
            raise InvalidRequest(f"options is {options!r}; give a list of texts", field="options")
        if all(isinstance(option, str) for option in options):
            each = [tuple(_texts_of(options, "options"))] * len(asked)
        else:
            each = [tuple(_texts_of(given, f"options[{number}]")) for number, given in enumerate(options)]
        if len(each) != len(asked):
            raise InvalidRequest(f"there are {len(asked)} questions, but options for {len(each)}", field="options")
        return Predictions(self._choices(asked, each, draws, seed), self.record.task)

    def save(self, folder: str | Path) -> StoredPosterior:
        """Writes a posterior folder, which ``load``, ``abmll serve`` and all other commands read.

        Raises:
            StoreFailure: The disk is full or not writable.
        """
        return save_posterior(
            Path(folder), self.posterior.map(lambda tensor: tensor.cpu()), self.record, self.calibration
        )

    def _choices(
        self, prompts: Sequence[str], options: Sequence[tuple[str, ...]], draws: int, seed: int
    ) -> list[Prediction]:
        for given in options:
            check_options(given)
        template, context = self.posterior.config.template, self.base.context
        questions = [
            tokenize_apart(self.base.tokenizer, template, prompt, given, context)
            for prompt, given in zip(prompts, options, strict=True)
        ]
        scores = score_draws(self.attached, self.posterior, questions, range(draws), seed)
        entry = None if self.calibration is None else self.calibration.nearest(self.record.shots)
        raw = predictive(scores)
        result = predictive(scores, 1.0 if entry is None else entry.temperature, mirrored=True)
        inside = None if entry is None else entry.prediction_set(result.probabilities)
        found: list[Prediction] = []
        for at, (prompt, given) in enumerate(zip(prompts, options, strict=True)):
            best, count = int(result.answer[at]), len(given)
            found.append(
                Prediction(
                    prompt=prompt,
                    answer=given[best],
                    confidence=result.confidence[at].item(),
                    calibrated=entry is not None,
                    raw_confidence=raw.probabilities[at, best].item(),
                    options=given,
                    probabilities=tuple(result.probabilities[at, :count].tolist()),
                    standard_errors=tuple(result.standard_errors[at, :count].tolist()),
                    prediction_set=None
                    if inside is None
                    else tuple(option for option, member in zip(given, inside[at].tolist(), strict=False) if member),
                    total=result.total[at].item(),
                    aleatoric=result.aleatoric[at].item(),
                    epistemic=result.epistemic[at].item(),
                    standard_error=result.standard_error[at].item(),
                    draws=draws,
                    finish=None,
                )
            )
        return found

    def _texts(self, prompts: Sequence[str], draws: int, seed: int, max_tokens: int) -> list[Prediction]:
        answers = answer_texts(self.base, self.attached, self.posterior, prompts, draws, seed, max_tokens)
        entry = None if self.calibration is None else self.calibration.nearest_text(self.record.shots)
        found: list[Prediction] = []
        for at, (prompt, text, tokens) in enumerate(zip(prompts, answers.texts, answers.tokens, strict=True)):
            each = answers.log_probs[:, at]
            whole = text_predictive(each, len(tokens))
            holds = entry if answers.ended[at] else None
            found.append(
                Prediction(
                    prompt=prompt,
                    answer=text,
                    confidence=text_confidence(each, whole, holds),
                    calibrated=holds is not None,
                    raw_confidence=whole.probability,
                    options=None,
                    probabilities=None,
                    standard_errors=None,
                    prediction_set=None,
                    total=whole.total,
                    aleatoric=whole.aleatoric,
                    epistemic=whole.epistemic,
                    standard_error=whole.standard_error,
                    draws=draws,
                    finish="end" if answers.ended[at] else "length",
                )
            )
        return found


def _check_whole(value: object, name: str, least: int, most: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        bounds = f"from {least}" if most == math.inf else f"from {least} to {most}"
        raise InvalidRequest(f"{name} is {value!r}; give a whole number {bounds}", field=name)


def _records(examples: Any) -> Iterable[Example | Mapping[str, Any]]:
    """Rows of a frame, what is missing in them left out; else the examples as they are."""
    rows = rows_of_frame(examples)
    if rows is not None:
        return rows
    if isinstance(examples, str | Path | dict) or not hasattr(examples, "__iter__"):
        raise InvalidExamples("examples must be a list of records, or a frame; a file is read by pandas", "examples")
    return examples


def _texts_of(given: Any, name: str) -> list[str]:
    """Texts given as a list, a column or an array.

    Raises:
        InvalidRequest: There are none, or one is no text.
    """
    if isinstance(given, str) or not hasattr(given, "__iter__"):
        raise InvalidRequest(f"{name} is {given!r}; give a list of texts", field=name)
    texts: list[Any] = list(given)
    for number, text in enumerate(texts):
        if not isinstance(text, str) or HALF.search(text):
            raise InvalidRequest(f"{name}[{number}] is {text!r}; give a text of whole characters", field=name)
    if not texts:
        raise InvalidRequest(f"{name} is empty; give at least one text", field=name)
    return texts
