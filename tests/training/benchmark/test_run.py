from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from abmll.predictive import predictive
from training.benchmark import measures
from training.benchmark.exact import ExactBayes
from training.benchmark.method import Budget, Learner, Load, Settings
from training.benchmark.pictures import draw_all
from training.benchmark.point import ZeroShot
from training.benchmark.report import cost_table, paired_table, quality_table
from training.benchmark.run import BenchConfig, read_rows, run
from training.benchmark.world import World
from training.tasks import Task

WORLD = World()
CONFIG = BenchConfig(shots=(2, 8), seeds=(0, 1), queries=12, meta_steps=1, draws=2, tune_shots=8)
TRAIN, VALIDATION, TEST = (WORLD.tasks(count, seed=seed, items=40) for count, seed in ((2, 1), (2, 2), (4, 3)))


class Counted(ZeroShot):
    """Counts how often it learns, and may be told to fail."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.learned, self.fail_at = 0, fail_at

    def learn(self, load: Load, tasks: Any, settings: Settings, budget: Budget, seed: int) -> Learner:
        self.learned += 1
        if self.learned == self.fail_at:
            raise KeyboardInterrupt
        return super().learn(load, tasks, settings, budget, seed)


def bench(methods: list[Any], model: Path, out: Path, test: list[Task] = TEST) -> list[dict[str, Any]]:
    return run(methods, TRAIN, VALIDATION, test, str(model), CONFIG, out, world=WORLD)


def test_a_run_that_was_stopped_goes_on_where_it_was(tiny_model_folder: Path, tmp_path: Path) -> None:
    out, whole = tmp_path / "results.jsonl", tmp_path / "whole.jsonl"
    stopped = Counted(fail_at=2)
    with pytest.raises(KeyboardInterrupt):
        bench([stopped], tiny_model_folder, out)
    out.write_text(out.read_text() + '{"method": "zero-')  # a kill in the middle of a line
    again = Counted()
    rows = bench([again], tiny_model_folder, out)
    assert again.learned == 1
    expected = bench([Counted()], tiny_model_folder, whole)
    times = {"learn_s", "predict_s"}

    def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{k: v for k, v in row.items() if k not in times} for row in rows]

    assert timeless(rows) == timeless(expected) == timeless(read_rows(out))
    assert len(rows) == 2 * 2 * 4 * 2  # seeds, shots, tasks, calibrated or not


def test_results_with_other_settings_are_kept_apart(tiny_model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    bench([Counted()], tiny_model_folder, out, TEST[:2])
    rows = bench([Counted()], tiny_model_folder, out)
    assert {row["task"] for row in rows} == {task.name for task in TEST}
    assert len(read_rows(out)) == len(rows) * 6 // 4


def test_measures_and_tables_say_what_the_rows_say(tiny_model_folder: Path, tmp_path: Path) -> None:
    rows = bench([ExactBayes(WORLD), ZeroShot()], tiny_model_folder, tmp_path / "results.jsonl")
    for row in rows:
        if row["method"] == "exact bayes":  # calibrated or not
            assert row["kl_exact"] == pytest.approx(0.0, abs=1e-9)
        assert row["accuracy"] == pytest.approx(sum(row["correct"]) / len(row["correct"]))
    table = quality_table(rows, 8, calibrated=False)
    assert table.splitlines()[0].startswith("| method | ece | adaptive ece | accuracy | nll |")
    assert [line.split(" |")[0] for line in table.splitlines()[2:]] == ["| exact bayes", "| zero-shot"]
    mean = sum(r["nll"] for r in rows if r["method"] == "zero-shot" and r["shots"] == 8 and not r["calibrated"]) / 8
    assert f"{mean:.3f} (" in table
    paired = paired_table(rows, 8, True, ["exact bayes"])
    assert "| kl exact | zero-shot | -" in paired
    assert "| zero-shot | 0 |" in cost_table(rows)
    pictures = draw_all(rows, tmp_path / "pictures")
    assert all(picture.stat().st_size > 5_000 and picture.with_suffix(".svg").is_file() for picture in pictures)


def test_kl_to_the_exact_predictive_is_that_of_torch() -> None:
    exact, other = torch.rand(5, 3).double().softmax(-1), torch.rand(5, 3).double().softmax(-1)
    want = torch.distributions.kl_divergence(
        torch.distributions.Categorical(probs=exact), torch.distributions.Categorical(probs=other)
    ).mean()
    assert measures.kl_to_exact(exact, other) == pytest.approx(want.item(), rel=1e-6)


def test_a_bootstrap_interval_covers_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    inside = 0
    for _ in range(200):
        _, low, high = measures.bootstrap(torch.randn(60, generator=generator).tolist(), samples=400)
        inside += low <= 0 <= high
    assert 0.90 <= inside / 200 <= 0.98


def test_a_measure_over_pooled_answers_is_resampled_by_task() -> None:
    scores = torch.randn(1, 50, 3, generator=torch.Generator().manual_seed(1))
    confidence = predictive(scores).confidence
    right, wrong = torch.ones(50, dtype=torch.bool), torch.zeros(50, dtype=torch.bool)
    value, low, high = measures.pooled_interval([(confidence, right), (confidence, wrong)])
    assert low <= value < high
    alone = measures.pooled_interval([(confidence, right)])
    assert alone[0] == alone[1] == alone[2]
