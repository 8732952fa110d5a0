"""Runs the benchmark: tunes each method on validation tasks, then measures it on test tasks; resumes."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import resource
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, Field
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from abmll.calibration import conformal_scores, conformal_threshold, fit_temperature_prior
from abmll.examples import Example
from abmll.metrics import negative_log_likelihood
from abmll.predictive import Predictive, predictive
from abmll.store import replace_file
from training.base_model import load_base
from training.benchmark.exact import ExactBayes
from training.benchmark.measures import of_task, ood_auroc
from training.benchmark.method import Budget, Learner, Load, Method, Noting, Settings
from training.benchmark.ood import foreign, nonsense
from training.benchmark.world import World
from training.episodes import EpisodeConfig, draw_support
from training.progress import Progress, silent
from training.provenance import provenance
from training.settings import choose_device
from training.tasks import Task


class BenchConfig(BaseModel, frozen=True):
    """Settings of a benchmark run; what they say is part of a result's name, so that a resumed run fits."""

    shots: tuple[int, ...] = (1, 4, 16, 64)
    train_tasks: int = Field(default=200, ge=1, description="tasks to meta-learn from")
    validation_tasks: int = Field(default=40, ge=1, description="tasks to tune and calibrate on")
    test_tasks: int = Field(default=24, ge=1, description="tasks to measure on")
    queries: int = Field(default=32, ge=1, description="questions of each task")
    meta_steps: int = Field(default=100, ge=1, description="steps of learning over tasks")
    tasks_per_step: int = Field(default=2, ge=1)
    steps: int = Field(default=12, ge=1, description="gradient steps of adaptation")
    draws: int = Field(default=8, ge=1)
    rank: int = Field(default=16, ge=3, description="rank of LoRA, and of a draw where a method has draws")
    tune_shots: int = Field(default=16, ge=1, description="shots at which settings are compared")

    @property
    def strange_shots(self) -> int:
        """Shots at which questions out of distribution are asked."""
        return self.tune_shots if self.tune_shots in self.shots else max(self.shots)


def _support(task: Task, shots: int, config: BenchConfig, seed: int) -> tuple[list[Example], list[Example]]:
    """Support and query examples; the queries are the same for every number of shots."""
    rng = random.Random(f"{seed}:{task.name}")
    largest = min(max(config.shots), len(task.examples) - config.queries)
    pool, rest = draw_support(task, largest, rng)
    return list(pool[: min(shots, largest)]), list(rest[: config.queries])


@dataclass(frozen=True)
class Parts:
    """Tasks of one seed.

    Attributes:
        train: To meta-learn from.
        validation: To tune and calibrate on.
        test: To measure on; looked at once.
    """

    train: Sequence[Task]
    validation: Sequence[Task]
    test: Sequence[Task]

    def names(self) -> list[list[str]]:
        """Names of the tasks of each part."""
        return [[task.name for task in part] for part in (self.train, self.validation, self.test)]


@dataclass(frozen=True)
class _Predicted:
    """A task's predictions, and what they were made from and took.

    ``ood`` has the scores of questions out of distribution, by kind.
    """

    scores: Tensor
    answers: Tensor
    support: list[Example]
    query: list[Example]
    seconds: float
    ood: dict[str, Tensor]


def _predict(
    learner: Learner, task: Task, shots: int, config: BenchConfig, seed: int, others: Sequence[Task] | None = None
) -> _Predicted:
    """Predicts a task's queries; with ``others`` also questions out of distribution, foreign ones from these tasks."""
    support, query = _support(task, shots, config, seed)
    strange: dict[str, list[Example]] = {}
    if others is not None:
        rng = random.Random(f"{seed}:{task.name}:ood")
        strange = {"nonsense": nonsense(query, rng), "foreign": foreign(query, task, others, rng)}
    asked = [*query, *(example for examples in strange.values() for example in examples)]
    begin = time.perf_counter()
    scores = learner.predict(support, asked, seed).detach()
    seconds = time.perf_counter() - begin
    answers = torch.tensor([example.answer for example in query])
    own, *parts = scores.split([len(query), *map(len, strange.values())], dim=1)
    ood = {kind: part for kind, part in zip(strange, parts, strict=True) if part.shape[1]}
    return _Predicted(own, answers, support, query, seconds, ood)


def _ood_measures(inside: Predictive, item: _Predicted, temperature: float) -> dict[str, float]:
    values: dict[str, float] = {}
    for kind, scores in item.ood.items():
        outside = predictive(scores, temperature)
        values[f"ood_{kind}_epistemic"] = ood_auroc(inside.epistemic, outside.epistemic)
        values[f"ood_{kind}_total"] = ood_auroc(inside.total, outside.total)
    return values


def _by_draws(item: _Predicted, temperature: float) -> dict[str, dict[str, list[Any]]]:
    """Confidence and correctness with fewer draws: 1, 2, 4, ..., all."""
    most = len(item.scores)
    counts = sorted({*(2**power for power in range(most.bit_length()) if 2**power < most), most})
    found: dict[str, dict[str, list[Any]]] = {}
    for count in counts:
        result = predictive(item.scores[:count], temperature)
        found[str(count)] = _answers(result.confidence, result.answer == item.answers)
    return found


def _answers(confidence: Tensor, correct: Tensor) -> dict[str, list[Any]]:
    return {"confidence": [round(value, 5) for value in confidence.tolist()], "correct": correct.tolist()}


def _threshold(predicted: Sequence[_Predicted], temperature: float) -> float:
    """Threshold of 90 % conformal sets on the validation tasks' answers."""
    scores = [conformal_scores(predictive(item.scores, temperature).probabilities, item.answers) for item in predicted]
    return conformal_threshold(torch.cat(scores), 0.9)


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
    parts: Mapping[int, Parts],
    model: str,
    config: BenchConfig,
    out: Path,
    *,
    world: World | None = None,
    device: str | None = None,
    jobs: int = 1,
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """Runs every method and seed that ``out`` does not hold yet, each in a process of its own.

    Settings are chosen by NLL on the first seed's validation tasks after tempering, and serve all seeds; temperatures
    (for results with ``calibrated``) and conformal thresholds are fitted on each seed's validation tasks for each
    number of shots. Test tasks are looked at once. Questions out of distribution are asked at one number of shots,
    in the same pass, and count in its seconds.

    Args:
        methods: What to compare.
        parts: The tasks of each seed.
        model: Base model, hub name or folder.
        config: Settings.
        out: Compressed JSON Lines of results, one row a (method, seed, task, shots, calibrated); appended to.
        world: Gives the exact predictive, for generated tasks.
        device: Where to run; a GPU if there is one by default.
        jobs: Processes at a time, which share the cores.
        progress: Shows progress.

    Returns:
        All rows of these seeds, those of earlier runs with the same settings included.
    """
    first = min(parts)
    weights = _weights(model)
    identities = {seed: _identity(config, weights, tasks, parts[first]) for seed, tasks in parts.items()}
    rows = [row for row in read_rows(out) if identities.get(row["seed"]) == row["identity"]]
    done = {(row["method"], row["seed"]) for row in rows}
    source = provenance()
    with progress("bench", total=len(parts) * len(methods)) as bar:
        bar.update(len(done), {})
        for seeds in ([first], sorted(parts.keys() - {first})):
            chosen = {row["method"]: row["settings"] for row in rows if row["seed"] == first}
            todo = [
                _Job(method, seed, parts[seed], model, config, world, device, jobs, chosen.get(method.name))
                for seed in seeds
                for method in methods
                if (method.name, seed) not in done
            ]
            for job, measured in _in_processes(todo, jobs):
                new = [row | {"identity": identities[job.seed], "measured": source} for row in measured]
                append_rows(out, new)
                rows += new
                done.add((job.method.name, job.seed))
                bar.update(len(done), {"seed": job.seed})
    order = {method.name: number for number, method in enumerate(methods)}
    return sorted(rows, key=lambda row: (row["seed"], order.get(row["method"], len(order))))


@dataclass(frozen=True)
class _Job:
    """One method with one seed; ``settings`` are None where they are still to be chosen."""

    method: Method
    seed: int
    parts: Parts
    model: str
    config: BenchConfig
    world: World | None
    device: str | None
    jobs: int
    settings: Settings | None


def _in_processes(todo: Sequence[_Job], jobs: int) -> Iterator[tuple[_Job, list[dict[str, Any]]]]:
    """Yields each job with its rows, as they come.

    A process does one job, so that its peak memory is that of the job.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1) as pool:
        waiting = {pool.submit(_do, job): job for job in todo}
        try:
            for future in as_completed(waiting):
                yield waiting[future], future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _do(job: _Job) -> list[dict[str, Any]]:
    disable_progress_bar()  # of loading weights: a base model is loaded anew for every trial
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // job.jobs))
    device = choose_device(job.device)
    budget = Budget(
        meta_steps=job.config.meta_steps,
        tasks_per_step=job.config.tasks_per_step,
        episodes=EpisodeConfig(
            shots=(*job.config.shots, job.config.tune_shots), max_chars=None, permute=0.0, subset=0.0
        ),
        steps=job.config.steps,
        draws=job.config.draws,
        rank=job.config.rank,
    )
    rows = _measure(job, lambda: load_base(job.model, device=device), budget)
    return [row | {"memory_mib": _peak_memory(device)} for row in rows]


def _peak_memory(device: str) -> int:
    """Peak memory of this process so far in MiB: the GPU's where it runs on one, else what is resident."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() >> 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def _identity(config: BenchConfig, model: str, parts: Parts, first: Parts) -> str:
    """What a seed's results depend on, as a short hash; ``first`` are the tasks that settings are chosen on."""
    what = [config.model_dump(mode="json"), model, parts.names(), first.names()]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


def _weights(model: str) -> str:
    """A base model's identity: a folder's weights wherever it lies, or a hub name."""
    files = sorted(Path(model).glob("*.safetensors"))
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest() if files else model


@dataclass(frozen=True)
class _Tuned:
    """A method with the settings that suit the validation tasks best."""

    learner: Learner
    settings: Settings
    seconds: float
    predicted: list[_Predicted]


def _tune(job: _Job, load: Load, budget: Budget) -> _Tuned:
    best: tuple[float, _Tuned] | None = None
    for settings in job.method.trials if job.settings is None else [job.settings]:
        begin = time.perf_counter()
        learner = job.method.learn(load, job.parts.train, settings, budget, job.seed)
        seconds = time.perf_counter() - begin
        predicted = [
            _predict(learner, task, job.config.tune_shots, job.config, job.seed) for task in job.parts.validation
        ]
        loss = _tempered_loss(predicted)
        if best is None or loss < best[0]:
            best = loss, _Tuned(learner, settings, seconds, predicted)
    assert best is not None
    return best[1]


def _measure(job: _Job, load: Load, budget: Budget) -> list[dict[str, Any]]:
    tuned = _tune(job, load, budget)
    learner, config, seed, parts, world = tuned.learner, job.config, job.seed, job.parts, job.world
    bound = isinstance(learner, ExactBayes)
    rows: list[dict[str, Any]] = []
    for shots in config.shots:
        predicted = tuned.predicted
        if shots != config.tune_shots:
            predicted = [_predict(learner, task, shots, config, seed) for task in parts.validation]
        # The exact predictive is calibrated by definition: a temperature could only spoil it.
        temperatures = {False: 1.0, True: 1.0 if bound else _temperature(predicted)}
        thresholds = {calibrated: _threshold(predicted, chosen) for calibrated, chosen in temperatures.items()}
        for task in parts.test:
            # The exact predictive is told of the world's scenes only.
            strange = shots == config.strange_shots and not bound
            item = _predict(learner, task, shots, config, seed, parts.test if strange else None)
            exact = None if world is None else world.exact(item.support, item.query)
            for calibrated, chosen in temperatures.items():
                result = predictive(item.scores, chosen)
                measures = of_task(item.scores, item.answers, chosen, thresholds[calibrated], exact)
                measures |= _ood_measures(result, item, chosen)
                if bound and world is not None and exact is not None:
                    # Its doubt of the rule does not show in one draw of its predictive.
                    measures["epistemic"] = world.epistemic(exact).mean().item()
                rows.append(
                    {
                        "method": job.method.name,
                        "seed": seed,
                        "task": task.name,
                        "shots": shots,
                        "calibrated": calibrated,
                        "settings": dict(tuned.settings),
                        "temperature": chosen,
                        "parameters": learner.parameters,
                        "passes": learner.passes,
                        "learn_s": tuned.seconds,
                        "predict_s": item.seconds,
                        **_answers(result.confidence, result.answer == item.answers),
                        "by_draws": _by_draws(item, chosen) if calibrated and len(item.scores) > 1 else {},
                        **(learner.notes if isinstance(learner, Noting) else {}),
                        **measures,
                    }
                )
    return rows


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Reads result rows; none where there is no file."""
    if not path.is_file():
        return []
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def append_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Adds rows to a results file: the file is replaced as a whole, so that it never holds half a method."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in [*read_rows(path), *rows])
    replace_file(path, gzip.compress(text.encode("utf-8")))
