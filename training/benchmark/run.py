"""Runs the benchmark: tunes each method on validation tasks, then measures it on test tasks; resumes."""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import math
import os
import random
import resource
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import BaseModel, Field, NonNegativeInt
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from abmll.calibration import (
    HeldOut,
    TemperaturePrior,
    conformal_threshold,
    fit_temperature_prior,
    task_temperature,
)
from abmll.errors import AbmllError
from abmll.examples import Example
from abmll.metrics import negative_log_likelihood
from abmll.predictive import Predictive, predictive
from abmll.store import replace_file
from training.base_model import load_base
from training.benchmark.exact import ExactBayes
from training.benchmark.measures import of_task, ood_auroc, set_scores
from training.benchmark.method import Budget, Learner, Method, Noting, Revised, Settings
from training.benchmark.ood import foreign, nonsense
from training.benchmark.world import World
from training.episodes import EpisodeConfig, draw_support, what_is_asked, without_twins
from training.folds import held_out
from training.progress import Progress, silent
from training.provenance import provenance
from training.settings import choose_device
from training.tasks import Task

logger = logging.getLogger(__name__)


class BenchConfig(BaseModel, frozen=True, allow_inf_nan=False):
    """Settings of a benchmark run; what they say is part of a result's name, so that a resumed run fits.

    What came later is left out of it where it changes nothing, so that earlier results keep theirs.
    """

    shots: tuple[NonNegativeInt, ...] = (1, 4, 16, 64)
    episode_shots: tuple[NonNegativeInt, ...] | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description="shots of the episodes to meta-learn from; those measured by default",
    )
    train_tasks: int = Field(default=200, ge=1, description="tasks to meta-learn from")
    validation_tasks: int = Field(default=40, ge=1, description="tasks to tune and calibrate on")
    test_tasks: int = Field(default=24, ge=1, description="tasks to measure on")
    queries: int = Field(default=32, ge=1, description="questions of each task")
    meta_steps: int = Field(default=100, ge=1, description="steps of learning over tasks")
    tasks_per_step: int = Field(default=2, ge=1)
    steps: int = Field(default=12, ge=1, description="gradient steps of adaptation")
    growth: float = Field(
        default=0.0,
        ge=0,
        le=1,
        exclude_if=lambda value: value == 0,
        description="power of (support set / 16) that the steps grow with when a task is predicted",
    )
    own_temperatures: bool = Field(
        default=False,
        exclude_if=lambda value: not value,
        description="whether each task has a temperature of its own, from its support set, held out in folds",
    )
    draws: int = Field(default=8, ge=1)
    rank: int = Field(default=16, ge=3, description="rank of LoRA, and of a draw where a method has draws")
    tune_shots: int = Field(default=16, ge=1, description="shots at which settings are compared")

    @property
    def strange_shots(self) -> int:
        """Shots at which questions out of distribution are asked."""
        return self.tune_shots if self.tune_shots in self.shots else max(self.shots)


def _support(task: Task, shots: int, config: BenchConfig, seed: int) -> tuple[list[Example], list[Example]]:
    """Support and query examples; the queries are the same for every number of shots.

    A task with fewer examples gives those that it has besides the queries.
    """
    rng = random.Random(f"{seed}:{task.name}")
    largest = min(max(config.shots), len(task.examples) - config.queries)
    pool, rest = draw_support(task, largest, rng)
    return list(pool[: min(shots, largest)]), list(without_twins(rest, pool)[: config.queries])


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

    def contents(self) -> list[list[tuple[str, str]]]:
        """Names of the tasks of each part, with hashes of their examples."""
        return [[(task.name, task.digest) for task in part] for part in (self.train, self.validation, self.test)]


@dataclass(frozen=True)
class _Predicted:
    """A task's predictions, and what they were made from and took.

    ``ood`` has the scores of questions out of distribution, by kind; ``held_out`` those of the support set's own.
    """

    scores: Tensor
    answers: Tensor
    support: list[Example]
    query: list[Example]
    seconds: float
    ood: dict[str, Tensor]
    held_out: HeldOut | None


def _predict(
    learner: Learner,
    task: Task,
    shots: int,
    config: BenchConfig,
    seed: int,
    others: Sequence[Task] | None = None,
    hold_out: bool = False,
) -> _Predicted:
    """Predicts a task's queries.

    With ``others`` also questions out of distribution, foreign ones from these tasks; with ``hold_out`` also each
    support example, from those of the other folds.
    """
    support, query = _support(task, shots, config, seed)
    strange: dict[str, list[Example]] = {}
    if others is not None:
        rng = random.Random(f"{seed}:{task.name}:ood")
        strange = {"nonsense": nonsense(query, rng), "foreign": foreign(query, task, others, rng)}
    asked = [*query, *(example for examples in strange.values() for example in examples)]
    begin = time.perf_counter()
    of_support = _held_out(learner, support, seed) if hold_out else None
    scores = learner.predict(support, asked, seed).detach()
    seconds = time.perf_counter() - begin
    answers = torch.tensor([example.answer for example in query])
    own, *parts = scores.split([len(query), *map(len, strange.values())], dim=1)
    ood = {kind: part for kind, part in zip(strange, parts, strict=True) if part.shape[1]}
    return _Predicted(own, answers, support, query, seconds, ood, of_support)


def _held_out(learner: Learner, support: Sequence[Example], seed: int) -> HeldOut | None:
    """Scores of the support examples, each by what has not seen it; None for fewer than two different questions.

    Unlike in the product, whether a task has factors of its own is decided for each fold by its own size.
    """

    def score(rest: list[int], left_out: list[int]) -> Tensor:
        return learner.predict([support[i] for i in rest], [support[i] for i in left_out], seed).detach()

    return held_out([what_is_asked(item) for item in support], [item.answer for item in support], seed, score)


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


def _threshold(predicted: Sequence[_Predicted], temperatures: TemperaturePrior) -> float:
    """Threshold of 90 % conformal sets on the validation tasks' answers."""
    scores: list[Tensor] = []
    for item in predicted:
        temperature = task_temperature(temperatures, item.held_out)
        each = set_scores(predictive(item.scores, temperature).probabilities)
        scores.append(each.gather(-1, item.answers[:, None]).squeeze(-1))
    return conformal_threshold(torch.cat(scores), 0.9)


def _temperatures(predicted: Sequence[_Predicted]) -> TemperaturePrior:
    """The temperatures that suit the tasks best: one for all, but where support sets were held out."""
    pairs = [(item.scores, item.answers) for item in predicted]
    return fit_temperature_prior([item.held_out for item in predicted], pairs)


def _tempered_loss(predicted: Sequence[_Predicted]) -> float:
    """Mean over tasks of NLL at the temperature that suits them best."""
    temperature = _temperatures(predicted).median
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
    settings: Mapping[str, Settings] | None = None,
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """Runs every method and seed that ``out`` does not hold yet, each in a process of its own.

    Settings are chosen by NLL on the first seed's validation tasks after tempering, and serve all seeds; each is tried
    in a process of its own too. Temperatures (for results with ``calibrated``) and conformal thresholds are fitted on
    each seed's validation tasks for each number of shots. With ``own_temperatures`` each task has its own, as the
    product's tasks have; how they are spread comes from the validation tasks, and the folds count in a task's seconds.
    Test tasks are looked at once. Questions out of distribution are asked at one number of shots, in the same pass, and
    count in its seconds. Where a method raises an error, the others go on, and the first error is raised at the end; a
    process that is killed ends the run. What was measured stays.

    Args:
        methods: What to compare.
        parts: The tasks of each seed.
        model: Base model, hub name or folder.
        config: Settings.
        out: Compressed JSON Lines of results, one row a (method, seed, task, shots, calibrated); appended to.
        world: Gives the exact predictive, for generated tasks.
        device: Where to run; a GPU if there is one by default.
        jobs: Processes at a time, which share the cores.
        settings: Of methods that are not to be tuned, by name.
        progress: Shows progress.

    Returns:
        All rows of these seeds, those of earlier runs with the same settings included.
    """
    first = min(parts)
    weights = _weights(model)
    identities = {seed: _identity(config, weights, tasks, parts[first]) for seed, tasks in parts.items()}
    versions = {method.name: _version(method) for method in methods}
    rows = [
        row
        for row in read_rows(out)
        if identities.get(row["seed"]) == row["identity"] and versions.get(row["method"]) in (row["version"], None)
    ]
    done = {(row["method"], row["seed"]) for row in rows}
    chosen = settings_of(rows, first)
    for name, wanted in (settings or {}).items():
        if (had := chosen.setdefault(name, wanted)) != wanted:
            raise AbmllError(
                f"{out} has results of {name} with {dict(had)}; measure {dict(wanted)} in another folder",
                field="settings_of",
            )
    trials = {
        method.name: [] if method.name in chosen or len(method.trials) == 1 else method.trials for method in methods
    }
    missing = sum((method.name, seed) not in done for method in methods for seed in parts)
    source = provenance()
    with (
        progress("bench", total=missing + sum(map(len, trials.values()))) as bar,
        _Processes(jobs) as processes,
    ):

        def job(method: Method, seed: int, settings: Settings) -> _Job:
            return _Job(method, seed, parts[seed], model, config, world, device, jobs, settings)

        def measure(method: Method, settings: Settings) -> None:
            for seed in parts:
                if (method.name, seed) not in done:
                    processes.submit(_measure, job(method, seed, settings))

        for method in methods:
            for settings in trials[method.name]:
                processes.submit(_loss, job(method, first, settings))
            if not trials[method.name]:
                measure(method, chosen.get(method.name, method.trials[0]))
        losses: dict[str, list[tuple[float, Settings]]] = {method.name: [] for method in methods}
        failures: list[Exception] = []
        for number, (ended, result) in enumerate(processes.results(), start=1):
            name, tried = ended.method.name, trials[ended.method.name]
            if isinstance(result, Exception):
                logger.error("%s failed with seed %d and %s", name, ended.seed, dict(ended.settings), exc_info=result)
                failures.append(result)
            elif isinstance(result, float):
                losses[name].append((result, ended.settings))
                if len(losses[name]) == len(tried):
                    measure(ended.method, _best(losses[name], tried))
            else:
                new = [row | {"identity": identities[ended.seed], "measured": source} for row in result]
                append_rows(out, new)
                rows += new
            bar.update(number, {"seed": ended.seed})
    if failures:
        raise failures[0]
    order = {method.name: number for number, method in enumerate(methods)}
    return sorted(rows, key=lambda row: (row["seed"], order.get(row["method"], len(order))))


def settings_of(rows: Iterable[Mapping[str, Any]], seed: int) -> dict[str, Settings]:
    """The settings that methods have in a seed's rows, by name."""
    return {row["method"]: row["settings"] for row in rows if row["seed"] == seed}


def _version(method: Method) -> int:
    return method.version if isinstance(method, Revised) else 1


def _best(losses: Sequence[tuple[float, Settings]], tried: Sequence[Settings]) -> Settings:
    """The settings of least loss, the first tried of equals; one that is not a number is the worst."""

    def rank(pair: tuple[float, Settings]) -> tuple[float, int]:
        loss, settings = pair
        return math.inf if math.isnan(loss) else loss, tried.index(settings)

    return min(losses, key=rank)[1]


@dataclass(frozen=True)
class _Job:
    """One method with one seed and settings."""

    method: Method
    seed: int
    parts: Parts
    model: str
    config: BenchConfig
    world: World | None
    device: str | None
    jobs: int
    settings: Settings

    def learn(self) -> tuple[Learner, float, str]:
        """Learns in this process; gives the learner, the seconds that it took, and the device."""
        disable_progress_bar()  # of loading weights
        threads = torch.get_num_threads() if "OMP_NUM_THREADS" in os.environ else os.cpu_count() or 1
        torch.set_num_threads(max(1, threads // self.jobs))
        device, config = choose_device(self.device), self.config
        budget = Budget(
            meta_steps=config.meta_steps,
            tasks_per_step=config.tasks_per_step,
            episodes=EpisodeConfig(
                shots=(*(config.episode_shots or config.shots), config.tune_shots),
                max_chars=None,
                permute=0.0,
                subset=0.0,
            ),
            steps=config.steps,
            growth=config.growth,
            draws=config.draws,
            rank=config.rank,
        )
        begin = time.perf_counter()
        learner = self.method.learn(
            lambda: load_base(self.model, device=device), self.parts.train, self.settings, budget, self.seed
        )
        return learner, time.perf_counter() - begin, device

    def validate(self, learner: Learner, shots: int, hold_out: bool = False) -> list[_Predicted]:
        """Predicts the validation tasks; with ``hold_out`` their support sets too."""
        return [
            _predict(learner, task, shots, self.config, self.seed, hold_out=hold_out) for task in self.parts.validation
        ]


class _Processes:
    """Does jobs, each in a process of its own, so that its peak memory is that of the job."""

    def __init__(self, jobs: int) -> None:
        context = get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self._pool = ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1)
        self._waiting: dict[Future[Any], _Job] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def submit(self, work: Callable[[_Job], Any], job: _Job) -> None:
        """Queues a job."""
        self._waiting[self._pool.submit(work, job)] = job

    def results(self) -> Iterator[tuple[_Job, Any]]:
        """Yields each job with its result or what it raised, as they come, those queued meanwhile included."""
        while self._waiting:
            for future in wait(self._waiting, return_when=FIRST_COMPLETED).done:
                error = future.exception()
                if error is not None and not isinstance(error, Exception):
                    raise error
                yield self._waiting.pop(future), error or future.result()


def _peak_memory(device: str) -> int:
    """Peak memory of this process so far in MiB: the GPU's where it runs on one, else what is resident."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) >> 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def _identity(config: BenchConfig, model: str, parts: Parts, first: Parts) -> str:
    """What a seed's results depend on, as a short hash; ``first`` are the tasks that settings are chosen on."""
    what = [config.model_dump(mode="json"), model, parts.contents(), first.contents()]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


def _weights(model: str) -> str:
    """A base model's identity: a folder's weights wherever it lies, or a hub name."""
    files = sorted(Path(model).glob("*.safetensors"))
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest() if files else model


def _loss(job: _Job) -> float:
    """What settings are chosen by: NLL on the validation tasks, tempered."""
    learner, _, _ = job.learn()
    return _tempered_loss(job.validate(learner, job.config.tune_shots))


def _measure(job: _Job) -> list[dict[str, Any]]:
    learner, learn_seconds, device = job.learn()
    config, seed, parts, world = job.config, job.seed, job.parts, job.world
    bound = isinstance(learner, ExactBayes)
    rows: list[dict[str, Any]] = []
    for shots in config.shots:
        hold_out = config.own_temperatures and not bound
        predicted = job.validate(learner, shots, hold_out)
        untempered = TemperaturePrior(median=1.0)
        # The exact predictive is calibrated by definition: a temperature could only spoil it.
        temperatures = {False: untempered, True: untempered if bound else _temperatures(predicted)}
        thresholds = {calibrated: _threshold(predicted, chosen) for calibrated, chosen in temperatures.items()}
        for task in parts.test:
            # The exact predictive is told of the world's scenes only.
            strange = shots == config.strange_shots and not bound
            item = _predict(learner, task, shots, config, seed, parts.test if strange else None, hold_out)
            exact = None if world is None else world.exact(item.support, item.query)
            for calibrated, prior in temperatures.items():
                chosen = task_temperature(prior, item.held_out)
                result = predictive(item.scores, chosen)
                measures = of_task(item.scores, item.answers, chosen, thresholds[calibrated], exact)
                measures |= _ood_measures(result, item, chosen)
                if bound and world is not None and exact is not None:
                    # Its doubt of the rule does not show in one draw of its predictive.
                    measures["epistemic"] = world.epistemic(exact).mean().item()
                rows.append(
                    {
                        "method": job.method.name,
                        "version": _version(job.method),
                        "seed": seed,
                        "task": task.name,
                        "shots": shots,
                        "calibrated": calibrated,
                        "settings": dict(job.settings),
                        "temperature": chosen,
                        "parameters": learner.parameters,
                        "passes": learner.passes,
                        "learn_s": learn_seconds,
                        "predict_s": item.seconds,
                        **_answers(result.confidence, result.answer == item.answers),
                        "by_draws": _by_draws(item, chosen) if calibrated and len(item.scores) > 1 else {},
                        **(learner.notes if isinstance(learner, Noting) else {}),
                        **measures,
                    }
                )
    memory = _peak_memory(device)
    return [row | {"memory_mib": memory} for row in rows]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Reads result rows; none where there is no file.

    Raises:
        AbmllError: The file is damaged.
    """
    if not path.is_file():
        return []
    try:
        with gzip.open(path, "rt", encoding="utf-8") as stream:
            return [json.loads(line) for line in stream]
    except (EOFError, ValueError, zlib.error, gzip.BadGzipFile) as error:
        raise AbmllError(
            f"{path} is damaged: {error}; restore it, or measure anew in another folder", field="out"
        ) from error


def _measured(row: dict[str, Any]) -> tuple[str, int, str]:
    return row["method"], row["seed"], row["identity"]


def append_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Adds a method's rows to a results file, in the place of those that it had of the same tasks and settings.

    The file is replaced as a whole, so that it never holds half a method.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    added = list(rows)
    new = {_measured(row) for row in added}
    kept = [row for row in read_rows(path) if _measured(row) not in new]
    text = "".join(json.dumps(row) + "\n" for row in [*kept, *added])
    replace_file(path, gzip.compress(text.encode("utf-8")))
