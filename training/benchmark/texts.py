"""Which free texts are right? Our confidence beside the usual scores, on the same answers and budget of passes.

``python -m training.benchmark.texts --tasks FOLDER --out FOLDER`` adapts the embedded posterior to each held-out task
without options, decodes the likeliest answer to its queries, and has every score say how sure it is. Without
``--tasks`` the tasks are the generated world's, where the exact Bayes predictive is one of the scores.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from abmll import metrics
from abmll.decoding import decode, with_end
from abmll.draw_scores import rows_of_draws, score_draws
from abmll.draws import draw_signs, stack_signs
from abmll.errors import AbmllError
from abmll.examples import Example
from abmll.layers import Attached, attach
from abmll.meanings import group_meanings, meaning_predictive, normalized
from abmll.posterior import Posterior
from abmll.sampling import Sampling
from abmll.scoring import Question, tokenize
from abmll.store import load_posterior, replace_file
from abmll.text_calibration import JudgedTexts, fit_texts, text_logits
from training.adaptation import AdaptConfig
from training.base_model import BaseModel as Base
from training.base_model import load_base
from training.benchmark.measures import bootstrap, pooled_interval
from training.benchmark.pictures import reliability_panels
from training.benchmark.report import interval_text
from training.benchmark.world import OPTIONS, World
from training.decoded_texts import MAX_TOKENS, decode_texts
from training.embedded import NAME, POSTERIOR, resolve
from training.evaluation import EvalConfig, each_task, family_weights, support_and_query
from training.progress import track
from training.report import table
from training.splits import Split
from training.tasks import Task, load_tasks
from training.text_evaluation import adapt_without_options

# Draws that score the answer, or samples: what every score that needs several passes may spend.
BUDGET = 8
_SHOTS = 16
_QUERIES = 40
# Of the generated world: validation and test tasks, and the seeds that they are drawn with.
_WORLD = ((12, 1), (24, 2))


@dataclass(frozen=True)
class Scored:
    """Answers to one task's queries.

    Attributes:
        task: The task.
        correct: Whether each is right, shape (n,), bool.
        scores: By name, how sure of each answer, shape (n,); more is surer.
        told: What lm-polygraph's estimators take.
    """

    task: Task
    correct: Tensor
    scores: dict[str, Tensor]
    told: dict[str, list[Any]]


def score_task(
    base: Base,
    attached: Attached,
    theta: Posterior,
    task: Task,
    shots: int,
    inner: AdaptConfig,
    config: EvalConfig,
    repeat: int = 0,
) -> Scored:
    """Adapts to a task without options, answers its queries, and scores the answers in every way."""
    phi, query = adapt_without_options(base, attached, theta, task, shots, inner, config, repeat)
    answers = decode_texts(base, attached, phi, query, config.draws, config.seed)
    prompts = [question.prompt for question in answers.asked]
    log_probs, entropies = _of_tokens(base, attached, phi, answers.asked)
    whole = torch.tensor([sum(each) for each in log_probs])
    lengths = torch.tensor([len(each) for each in log_probs])
    scores = {
        "abmll": text_logits(answers.log_probs),
        "sequence probability of the mean": text_logits(whole[None]),
        "perplexity of the mean": whole / lengths,
        "P(True)": _p_true(base, attached, theta, query, answers.texts),
    }
    if task.category == "world":
        scores["exact Bayes"] = _exact(task, shots, config, repeat, answers.texts)
    of_mean = _samples(base, attached, phi, prompts, under_draws=False, seed=config.seed)
    of_draws = _samples(base, attached, phi, prompts, under_draws=True, seed=config.seed)
    texts = [[_text(base, tokens) for tokens in each] for each in of_mean]
    scores["self-consistency"] = _agreement(answers.texts, texts)
    scores["semantic entropy without draws"] = _semantic(attached, phi, prompts, of_mean, texts, 0, config.seed)
    of_draws_texts = [[_text(base, tokens) for tokens in each] for each in of_draws]
    scores["self-consistency under draws"] = _agreement(answers.texts, of_draws_texts)
    scores["semantic entropy with draws"] = _semantic(
        attached, phi, prompts, of_draws, of_draws_texts, config.draws, config.seed
    )
    each = [Question(p, (t,)) for p, samples in zip(prompts, of_mean, strict=True) for t in samples]
    sample_log_probs = score_draws(attached, phi, each, [], 0, normalize="sum")[0, :, 0].view(len(prompts), BUDGET)
    told = {
        "greedy_log_likelihoods": log_probs,
        "entropy": entropies,
        "sample_texts": texts,
        "sample_log_probs": sample_log_probs.tolist(),
    }
    return Scored(task, answers.correct, scores, told)


def _text(base: Base, tokens: Sequence[int]) -> str:
    return base.tokenizer.decode(list(tokens), skip_special_tokens=True).strip()


@torch.inference_mode()
def _of_tokens(
    base: Base, attached: Attached, phi: Posterior, asked: Sequence[Question]
) -> tuple[list[list[float]], list[list[float]]]:
    """Log-probability of each answer's tokens under the mean, and entropy in its place, nats."""
    log_probs: list[list[float]] = []
    entropies: list[list[float]] = []
    with attached.using(phi) as model:
        for question in asked:
            (text,) = question.options
            ids = torch.tensor([[*question.prompt, *text]], device=base.device)
            each = model(ids).logits[0, len(question.prompt) - 1 : -1].float().log_softmax(-1).cpu()
            log_probs.append(each.gather(-1, torch.tensor(text)[:, None])[:, 0].tolist())
            entropies.append(torch.special.entr(each.exp()).sum(-1).tolist())
    return log_probs, entropies


@torch.inference_mode()
def _samples(
    base: Base, attached: Attached, phi: Posterior, prompts: Sequence[tuple[int, ...]], *, under_draws: bool, seed: int
) -> list[list[tuple[int, ...]]]:
    """As many sampled texts to each prompt as the budget allows: under the mean, or each under a draw of its own."""
    found: list[list[tuple[int, ...]]] = [[] for _ in prompts]
    sampling = Sampling(MAX_TOKENS, temperature=1.0, seed=seed)
    for number in range(BUDGET):
        signs = None
        if under_draws:
            signs = rows_of_draws(stack_signs([draw_signs(phi, seed, number)]), len(prompts), base.device)
        with attached.using(phi, signs):
            # A seed for each row: else all questions would meet the same noise.
            rows = range(number * len(prompts), (number + 1) * len(prompts))
            decoded = decode(base.model, base.tokenizer, prompts, sampling, rows)
        for own, tokens in zip(found, decoded, strict=True):
            own.append(tuple(with_end(tokens, base.tokenizer, sampling)))
    return found


def _agreement(answers: Sequence[str], samples: Sequence[Sequence[str]]) -> Tensor:
    """Share of the samples that mean what the answer means (Manakul et al. 2023, Lin et al. 2023)."""
    shares = [
        sum(normalized(text) == normalized(answer) for text in each) / len(each)
        for answer, each in zip(answers, samples, strict=True)
    ]
    return torch.tensor(shares)


def _semantic(
    attached: Attached,
    phi: Posterior,
    prompts: Sequence[tuple[int, ...]],
    samples: Sequence[Sequence[tuple[int, ...]]],
    texts: Sequence[Sequence[str]],
    draws: int,
    seed: int,
) -> Tensor:
    """Minus semantic entropy of the samples' meanings and all else as one, under draws, or under the mean for 0."""
    values: list[float] = []
    for prompt, tokens, said in zip(prompts, samples, texts, strict=True):
        wordings = dict(zip(tokens, said, strict=True))
        question = Question(prompt, tuple(wordings))
        log_probs = score_draws(attached, phi, [question], range(draws), seed, normalize="sum")[:, 0]
        values.append(-meaning_predictive(log_probs, group_meanings(list(wordings.values()))).total.item())
    return torch.tensor(values)


def _p_true(
    base: Base, attached: Attached, theta: Posterior, query: Sequence[Example], answers: Sequence[str]
) -> Tensor:
    """Log-odds of "yes" when the global mean is asked whether the answer is right (Kadavath et al. 2022)."""
    asked = [
        tokenize(
            base.tokenizer,
            theta.config.template,
            f"{example.prompt.rstrip()}\nProposed answer: {answer}\nIs the proposed answer right?",
            ("yes", "no"),
            base.context,
        )
        for example, answer in zip(query, answers, strict=True)
    ]
    scores = score_draws(attached, theta, asked, [], 0, normalize="sum")[0]
    return scores[:, 0] - scores[:, 1]


def _exact(task: Task, shots: int, config: EvalConfig, repeat: int, answers: Sequence[str]) -> Tensor:
    """Log-odds of each answer's probability by one who knows the generated world's rules and their prior."""
    exact = World().exact(*support_and_query(task, shots, config, repeat))
    known = [
        exact[at, OPTIONS.index(answer)] if answer in OPTIONS else exact.new_tensor(0.0)
        for at, answer in enumerate(answers)
    ]
    return text_logits(torch.stack(known).log()[None])


def with_polygraph(scored: Sequence[Scored], python: str) -> list[Scored]:
    """Adds the scores of lm-polygraph's estimators, run by the Python of an environment that has it.

    Raises:
        AbmllError: They do not run there.
    """
    told = {name: [each for item in scored for each in item.told[name]] for name in scored[0].told}
    done = subprocess.run(
        [python, "-P", str(Path(__file__).with_name("polygraph.py"))],
        input=json.dumps(told),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:]
        raise AbmllError(f"lm-polygraph's estimators do not run with {python}: {' '.join(last)}", field="polygraph")
    theirs: dict[str, list[float]] = json.loads(done.stdout.strip().splitlines()[-1])
    counts = [len(item.correct) for item in scored]
    parts = {f"lm-polygraph {name}": (-torch.tensor(values)).split(counts) for name, values in theirs.items()}
    return [
        Scored(item.task, item.correct, item.scores | {name: part[at] for name, part in parts.items()}, item.told)
        for at, item in enumerate(scored)
    ]


def rows_of(validation: Sequence[Scored], test: Sequence[Scored]) -> list[dict[str, Any]]:
    """Measures of each score on the test tasks; its confidence is fitted on the validation tasks (Platt scaling)."""
    weights = family_weights([[item.task for item in validation]])
    rows: list[dict[str, Any]] = []
    for name in test[0].scores:
        fit = fit_texts([JudgedTexts(item.scores[name].double(), item.correct) for item in validation], weights)
        for item in test:
            score = item.scores[name].double()
            rows.append(
                {
                    "score": name,
                    "task": item.task.name,
                    "family": item.task.family,
                    "correct": item.correct.tolist(),
                    "confidence": fit.confidence(score).tolist(),
                    "raw": score.sigmoid().tolist(),
                    "auroc": metrics.confidence_auroc(score, item.correct),
                    "prr": metrics.prediction_rejection_ratio(score, item.correct),
                }
            )
    return rows


def markdown(rows: Sequence[dict[str, Any]], resamples: int = 2000) -> str:
    """Returns a table of the scores, with 95 % bootstrap intervals over tasks."""
    interval = partial(_interval, resamples=resamples)
    lines: list[list[str]] = []
    for name in dict.fromkeys(row["score"] for row in rows):
        of = [row for row in rows if row["score"] == name]
        lines.append(
            [
                name,
                interval_text(bootstrap([row["auroc"] for row in of], samples=resamples)),
                interval_text(bootstrap([row["prr"] for row in of], samples=resamples)),
                interval(of, lambda some: metrics.confidence_auroc(*_together(some))),
                interval_text(pooled_interval([_together([row]) for row in of])),
                interval(of, _log_loss),
            ]
        )
    return table(["score", "AUROC in a task", "PRR in a task", "AUROC of all", "ECE", "log loss"], lines)


def draw(rows: Sequence[dict[str, Any]], folder: Path) -> Path:
    """Draws reliability diagrams: of our confidence before calibration, and of every score's after it."""
    of = {name: [row for row in rows if row["score"] == name] for name in dict.fromkeys(row["score"] for row in rows)}
    before = {"abmll before calibration": _together(of["abmll"], "raw")}
    return reliability_panels(before | {name: _together(some) for name, some in of.items()}, folder)


def _together(rows: Sequence[dict[str, Any]], column: str = "confidence") -> tuple[Tensor, Tensor]:
    confidence = torch.tensor([value for row in rows for value in row[column]], dtype=torch.float64)
    return confidence, torch.tensor([value for row in rows for value in row["correct"]])


def _log_loss(rows: Sequence[dict[str, Any]]) -> float:
    confidence, correct = _together(rows)
    return torch.nn.functional.binary_cross_entropy(confidence, correct.double()).item()


def _interval(
    rows: Sequence[dict[str, Any]], measure: Callable[[Sequence[dict[str, Any]]], float], resamples: int
) -> str:
    rng = random.Random(0)
    values = sorted(v for _ in range(resamples) if not math.isnan(v := measure(rng.choices(rows, k=len(rows)))))
    if not values:
        return "–"
    low, high = values[int(0.025 * len(values))], values[int(0.975 * len(values))]
    return interval_text((measure(rows), low, high))


def main() -> None:
    """Runs the benchmark and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=Path, help="folder of tasks; without it, tasks of the generated world")
    parser.add_argument("--out", type=Path, required=True, help="folder for rows.jsonl, report.md and the picture")
    parser.add_argument("--polygraph", help="Python of an environment with lm-polygraph")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the work")
    given = parser.parse_args()
    stored = load_posterior(POSTERIOR)
    base = load_base(resolve(NAME))
    attached = attach(base.model, stored.posterior.config.targets, stored.posterior.config.layers)
    parts = [World().tasks(count, seed) for count, seed in _WORLD]
    if given.tasks is not None:
        split, tasks = Split.model_validate(stored.record.training["split"]), load_tasks(given.tasks)
        parts = [split.select(tasks, "validation"), split.select(tasks, "test")]
    config = EvalConfig(shots=(_SHOTS,), queries=_QUERIES, draws=BUDGET)
    inner = AdaptConfig.from_record(stored.record.training)
    found = [
        each_task(score_task, base, attached, stored.posterior, part, inner, config, track, given.jobs)
        for part in parts
    ]
    if given.polygraph:
        found = [with_polygraph(part, given.polygraph) for part in found]
    rows = rows_of(*found)
    given.out.mkdir(parents=True, exist_ok=True)
    replace_file(given.out / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    right = Counter(value for item in found[1] for value in item.correct.tolist())
    mixed = sum(0 < int(item.correct.sum()) < len(item.correct) for item in found[1])
    report = (
        f"{len(found[1])} test tasks after {_SHOTS} examples without options, {right.total()} answers, "
        f"{right[True]} of them right; AUROC and PRR in a task are of the {mixed} tasks with right and wrong answers; "
        f"confidence is fitted to each score on {len(found[0])} validation tasks.\n\n{markdown(rows)}\n"
    )
    replace_file(given.out / "report.md", report.encode())
    draw(rows, given.out)
    print(report)


if __name__ == "__main__":
    main()
