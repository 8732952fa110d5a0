"""Runs the benchmark: tunes each method on validation tasks, then measures it on test tasks; resumes."""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from abmll.calibration import fit_temperature_prior
from abmll.examples import Example
from abmll.metrics import negative_log_likelihood
from abmll.predictive import predictive
from training.base_model import load_base
from training.benchmark.exact import ExactBayes
from training.benchmark.measures import of_task
from training.benchmark.method import Budget, Learner, Load, Method, Settings
from training.benchmark.world import World
from training.episodes import EpisodeConfig, draw_support
from training.progress import Progress, silent
from training.tasks import Task


class BenchConfig(BaseModel, frozen=True):
    """Settings of a benchmark run; what they say is part of a result's name, so that a resumed run fits."""

    shots: tuple[int, ...] = (1, 4, 16, 64)
    seeds: tuple[int, ...] = (0, 1, 2)
    train_tasks: int = Field(default=200, ge=1, description="tasks to meta-learn from")
    validation_tasks: int = Field(default=20, ge=1, description="tasks to tune and calibrate on")
    test_tasks: int = Field(default=40, ge=1, description="tasks to measure on")
    queries: int = Field(default=32, ge=1, description="questions of each task")
    meta_steps: int = Field(default=300, ge=1, description="steps of learning over tasks")
    tasks_per_step: int = Field(default=2, ge=1)
    steps: int = Field(default=12, ge=1, description="gradient steps of adaptation")
    draws: int = Field(default=8, ge=1)
    tune_shots: int = Field(default=16, ge=1, description="shots at which settings are compared")


def _support(task: Task, shots: int, config: BenchConfig, seed: int) -> tuple[list[Example], list[Example]]:
    """Support and query examples; the queries are the same for every number of shots."""
    rng = random.Random(f"{seed}:{task.name}")
    largest = min(max(config.shots), len(task.examples) - config.queries)
    pool, rest = draw_support(task, largest, rng)
    return list(pool[: min(shots, largest)]), list(rest[: config.queries])


@dataclass(frozen=True)
class _Predicted:
    """A task's predictions, and what they were made from and took."""

    scores: Tensor
    answers: Tensor
    support: list[Example]
    query: list[Example]
    seconds: float


def _predict(learner: Learner, task: Task, shots: int, config: BenchConfig, seed: int) -> _Predicted:
    support, query = _support(task, shots, config, seed)
    begin = time.perf_counter()
    scores = learner.predict(support, query, seed).detach()
    seconds = time.perf_counter() - begin
    answers = torch.tensor([example.answer for example in query])
    return _Predicted(scores, answers, support, query, seconds)


def _temperature(predicted: Sequence[_Predicted]) -> float:
    """The one temperature that suits the tasks best."""
    pairs = [(item.scores, item.answers) for item in predicted]
    return fit_temperature_prior([None] * len(pairs), pairs).median


def _tempered_loss(predicted: Sequence[_Predicted]) -> float:
    """Mean over tasks of NLL at the temperature that suits them best."""
    temperature = _temperature(predicted)
    losses = [
        negative_log_likelihood(predictive(item.scores, temperature).probabilities, item.answers) for item in predicted
    ]
    return sum(losses) / len(losses)


def run(
    methods: Sequence[Method],
    train: Sequence[Task],
    validation: Sequence[Task],
    test: Sequence[Task],
    model: str,
    config: BenchConfig,
    out: Path,
    *,
    world: World | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """Runs every method and seed that ``out`` does not hold yet.

    Settings are chosen by NLL on the validation tasks after tempering; the temperatures that results with
    ``calibrated`` use are fitted on the validation tasks for each number of shots. Test tasks are looked at once.

    Args:
        methods: What to compare.
        train: Tasks to meta-learn from.
        validation: Tasks to tune and calibrate on.
        test: Tasks to measure on.
        model: Base model, hub name or folder.
        config: Settings.
        out: JSON Lines file of results, one row a (method, seed, task, shots, calibrated); appended to.
        world: Gives the exact predictive, for generated tasks.
        device: Where to run.
        progress: Shows progress.

    Returns:
        All rows, those of earlier runs with the same settings included.
    """
    parts = [[task.name for task in part] for part in (train, validation, test)]
    identity = hashlib.sha256(json.dumps([config.model_dump(mode="json"), model, parts]).encode()).hexdigest()[:16]
    rows = [row for row in read_rows(out) if row["identity"] == identity]
    done = {(row["method"], row["seed"]) for row in rows}
    budget = Budget(
        meta_steps=config.meta_steps,
        tasks_per_step=config.tasks_per_step,
        episodes=EpisodeConfig(shots=(*config.shots, config.tune_shots), max_chars=None, permute=0.0, subset=0.0),
        steps=config.steps,
        draws=config.draws,
    )

    def load() -> Any:
        return load_base(model, device=device)

    jobs = [(method, seed) for seed in config.seeds for method in methods]
    with progress("bench", total=len(jobs)) as bar:
        for number, (method, seed) in enumerate(jobs, start=1):
            if (method.name, seed) not in done:
                new = _measure(method, seed, train, validation, test, load, budget, config, world)
                new = [row | {"identity": identity} for row in new]
                append_rows(out, new)
                rows += new
            bar.update(number, {"seed": seed})
    return rows


def _measure(
    method: Method,
    seed: int,
    train: Sequence[Task],
    validation: Sequence[Task],
    test: Sequence[Task],
    load: Load,
    budget: Budget,
    config: BenchConfig,
    world: World | None,
) -> list[dict[str, Any]]:
    best: tuple[float, Learner, Settings, float, list[_Predicted]] | None = None
    for settings in method.trials:
        begin = time.perf_counter()
        learner = method.learn(load, train, settings, budget, seed)
        seconds = time.perf_counter() - begin
        predicted = [_predict(learner, task, config.tune_shots, config, seed) for task in validation]
        loss = _tempered_loss(predicted)
        if best is None or loss < best[0]:
            best = loss, learner, settings, seconds, predicted
    assert best is not None
    _, learner, settings, learn_seconds, tuned = best
    bound = isinstance(learner, ExactBayes)
    rows: list[dict[str, Any]] = []
    for shots in config.shots:
        predicted = tuned
        if shots != config.tune_shots:
            predicted = [_predict(learner, task, shots, config, seed) for task in validation]
        # The exact predictive is calibrated by definition: a temperature could only spoil it.
        temperature = 1.0 if bound else _temperature(predicted)
        for task in test:
            item = _predict(learner, task, shots, config, seed)
            exact = None if world is None else world.exact(item.support, item.query)
            for calibrated in (False, True):
                chosen = temperature if calibrated else 1.0
                result = predictive(item.scores, chosen)
                measures = of_task(item.scores, item.answers, chosen, exact)
                if bound and world is not None and exact is not None:
                    # Its doubt of the rule does not show in one draw of its predictive.
                    measures["epistemic"] = world.epistemic(exact).mean().item()
                rows.append(
                    {
                        "method": method.name,
                        "seed": seed,
                        "task": task.name,
                        "shots": shots,
                        "calibrated": calibrated,
                        "settings": dict(settings),
                        "temperature": chosen,
                        "parameters": learner.parameters,
                        "passes": learner.passes,
                        "learn_s": learn_seconds,
                        "predict_s": item.seconds,
                        "confidence": [round(value, 5) for value in result.confidence.tolist()],
                        "correct": (result.answer == item.answers).tolist(),
                        **measures,
                    }
                )
    return rows


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Reads result rows; a last line that a kill cut short is left out."""
    if not path.is_file():
        return []
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def append_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Adds rows to a results file: the file is replaced as a whole, so that it never holds half a method."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in [*read_rows(path), *rows])
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)
