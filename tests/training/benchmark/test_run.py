from __future__ import annotations

import json
import random
import re
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from abmll.errors import AbmllError
from abmll.examples import Example
from abmll.predictive import predictive
from tests.training.conftest import rule_task
from training import benchmark
from training.benchmark import measures
from training.benchmark.catalogue import compared
from training.benchmark.exact import ExactBayes
from training.benchmark.method import Budget, Learner, Load, Settings
from training.benchmark.ood import foreign, nonsense
from training.benchmark.pictures import against_beta, draw_all
from training.benchmark.point import McDropout, ZeroShot
from training.benchmark.report import baselines_of, cost_table, ood_table, paired_table, quality_table
from training.benchmark.run import BenchConfig, Parts, read_rows, run
from training.benchmark.world import World
from training.tasks import Task

WORLD = World()
CONFIG = BenchConfig(shots=(2, 8), queries=12, meta_steps=1, draws=2, tune_shots=8)
TRAIN, VALIDATION, TEST = (WORLD.tasks(count, seed=seed, items=40) for count, seed in ((2, 1), (2, 2), (4, 3)))
PARTS = Parts(TRAIN, VALIDATION, TEST)


class Counted(ZeroShot):
    """Notes in a file each time it learns, with the settings, and may be told to fail at a seed."""

    trials: Sequence[Settings] = ({"rate": 1}, {"rate": 2})

    def __init__(self, notes: Path, fail_at: int | None = None) -> None:
        self.notes, self.fail_at = notes, fail_at

    @property
    def learned(self) -> list[tuple[int, int]]:
        return [tuple(json.loads(line)) for line in self.notes.read_text().splitlines()]

    def learn(self, load: Load, tasks: Any, settings: Settings, budget: Budget, seed: int) -> Learner:
        if seed == self.fail_at:
            raise AbmllError("told to fail")
        with self.notes.open("a") as stream:
            stream.write(json.dumps([seed, settings["rate"]]) + "\n")
        return super().learn(load, tasks, settings, budget, seed)


class Knowing(ZeroShot):
    """Is sure of an answer to every question, which is right where the question says so."""

    parameters = 0
    passes = 1

    def learn(self, load: Load, tasks: Any, settings: Settings, budget: Budget, seed: int) -> Learner:
        return self

    def predict(self, support: Sequence[Example], query: Sequence[Example], seed: int) -> Tensor:
        assert not {example.prompt for example in support} & {example.prompt for example in query}
        sure_of = [
            example.answer if example.prompt.startswith("easy") else zlib.crc32(example.prompt.encode()) % 2
            for example in query
        ]
        return 3.0 * torch.nn.functional.one_hot(torch.tensor(sure_of), 2)[None].double()


def _called(task: Task, kind: str) -> Task:
    return replace(task, examples=tuple(replace(item, prompt=f"{kind} {item.prompt}") for item in task.examples))


def bench(
    methods: list[Any], model: Path, out: Path, parts: Parts = PARTS, jobs: int = 1, seeds: Sequence[int] = (0, 1)
) -> list[dict[str, Any]]:
    return run(methods, dict.fromkeys(seeds, parts), str(model), CONFIG, out, world=WORLD, jobs=jobs)


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in {"learn_s", "predict_s", "memory_mib"}} for row in rows]


def test_a_run_that_was_stopped_goes_on_where_it_was(tiny_model_folder: Path, tmp_path: Path) -> None:
    out, whole = tmp_path / "results.jsonl.gz", tmp_path / "whole.jsonl.gz"
    with pytest.raises(AbmllError, match="told to fail"):
        bench([Counted(tmp_path / "stopped", fail_at=1)], tiny_model_folder, out)
    out.with_name(out.name + ".partial").write_bytes(out.read_bytes()[:100])  # a kill while writing
    again = Counted(tmp_path / "again")
    rows = bench([again], tiny_model_folder, out)
    assert again.learned == [(1, 1)]  # the first seed chose the first of two settings that are as good
    expected = bench([Counted(tmp_path / "whole")], tiny_model_folder, whole)
    assert Counted(tmp_path / "whole").learned == [(0, 1), (0, 2), (0, 1), (1, 1)]
    assert timeless(rows) == timeless(expected) == timeless(read_rows(out))
    assert len(rows) == 2 * 2 * 4 * 2  # seeds, shots, tasks, calibrated or not


@pytest.mark.parametrize(
    "folder",
    [
        "real",
        "world",
        "world-beta",
        "world-layers",
        "world-steps",
        "world-longer",
        "world-more-tasks",
        "world-longest",
        "world-longer-steps",
        "real-longer-steps",
        "real-own-temperatures",
    ],
)
def test_the_results_in_the_repository_can_be_gone_on_from(folder: str) -> None:
    report = (Path(benchmark.__file__).parent / "results" / folder / "report.md").read_text()
    settings = re.findall(r"Settings: (\{.*\})", report)
    assert [BenchConfig.model_validate_json(text).model_dump_json() for text in settings] == settings != []


def test_settings_that_are_given_are_not_tuned(tiny_model_folder: Path, tmp_path: Path) -> None:
    method = Counted(tmp_path / "learned")
    rows = run(
        [method, ExactBayes(WORLD)],
        dict.fromkeys((0, 1), PARTS),
        str(tiny_model_folder),
        CONFIG,
        tmp_path / "results.jsonl.gz",
        world=WORLD,
        settings={method.name: {"rate": 7}},
    )
    assert sorted(method.learned) == [(0, 7), (1, 7)]
    assert {row["settings"].get("rate") for row in rows if row["method"] == method.name} == {7}


def test_tasks_that_a_method_knows_have_lower_temperatures_of_their_own(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    easy, hard = ([_called(task, kind) for task in (*VALIDATION, *TEST)] for kind in ("easy", "hard"))
    parts = Parts(TRAIN, [easy[0], hard[1]], [*easy[2:4], *hard[4:]])
    own, shared = (
        run(
            [Knowing()],
            {0: parts},
            str(tiny_model_folder),
            CONFIG.model_copy(update={"own_temperatures": wanted}),
            tmp_path / f"{wanted}.jsonl.gz",
        )
        for wanted in (True, False)
    )
    known = {task.name for task in easy[2:4]}
    most = [row for row in own if row["shots"] == 8]
    temperatures = {
        knows: [row["temperature"] for row in most if row["calibrated"] and (row["task"] in known) == knows]
        for knows in (True, False)
    }
    assert max(temperatures[True]) < 1 < min(temperatures[False])
    assert {row["temperature"] for row in own if not row["calibrated"]} == {1}
    assert len({row["temperature"] for row in shared if row["calibrated"] and row["shots"] == 8}) == 1
    of_own, of_shared = (sum(row["nll"] for row in rows if row["calibrated"]) for rows in (own, shared))
    assert of_own < 0.9 * of_shared


def test_a_method_that_fails_does_not_stop_the_others(tiny_model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl.gz"
    with pytest.raises(AbmllError, match="told to fail"):
        bench([Counted(tmp_path / "failing", fail_at=0), ExactBayes(WORLD)], tiny_model_folder, out)
    assert {(row["method"], row["seed"]) for row in read_rows(out)} == {("exact bayes", 0), ("exact bayes", 1)}


def test_two_processes_give_what_one_gives(tiny_model_folder: Path, tmp_path: Path) -> None:
    methods: list[Any] = [ZeroShot(), ExactBayes(WORLD)]
    one, two = (bench(methods, tiny_model_folder, tmp_path / f"{jobs}.jsonl.gz", jobs=jobs) for jobs in (1, 2))
    assert [row["method"] for row in one] == [row["method"] for row in two]
    for row, other in zip(timeless(one), timeless(two), strict=True):
        assert row["nll"] == pytest.approx(other["nll"], abs=1e-4)  # other threads, other rounding
    assert all(row["memory_mib"] > 100 for row in one)


def test_results_with_other_settings_are_kept_apart(tiny_model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl.gz"
    bench([ZeroShot()], tiny_model_folder, out, Parts(TRAIN, VALIDATION, TEST[:2]))
    rows = bench([ZeroShot()], tiny_model_folder, out)
    assert {row["task"] for row in rows} == {task.name for task in TEST}
    assert len(read_rows(out)) == len(rows) * 6 // 4


def test_measures_and_tables_say_what_the_rows_say(tiny_model_folder: Path, tmp_path: Path) -> None:
    rows = bench([ExactBayes(WORLD), ZeroShot()], tiny_model_folder, tmp_path / "results.jsonl.gz")
    for row in rows:
        if row["method"] == "exact bayes":  # calibrated or not
            assert row["kl_exact"] == pytest.approx(0.0, abs=1e-9)
        assert row["accuracy"] == pytest.approx(sum(row["correct"]) / len(row["correct"]))
        assert 0 <= row["coverage_90"] <= 1
        assert 1 <= row["set_size_90"] <= 2
    table = quality_table(rows, 8, calibrated=False)
    assert table.splitlines()[0].startswith("| method | ece | adaptive ece | accuracy | nll |")
    assert [line.split(" |")[0] for line in table.splitlines()[2:]] == ["| exact bayes", "| zero-shot"]
    mean = sum(r["nll"] for r in rows if r["method"] == "zero-shot" and r["shots"] == 8 and not r["calibrated"]) / 8
    assert f"{mean:.3f} (" in table
    paired = paired_table(rows, 8, True, ["exact bayes"])
    assert "| kl exact | zero-shot | -" in paired
    assert "| zero-shot | 0 |" in cost_table(rows)
    # One set of weights has no epistemic part: it tells nothing apart. The exact predictive is not asked nonsense.
    last = ood_table(rows).splitlines()
    assert last[0] == "| method | nonsense: epistemic | nonsense: total |"
    assert last[-1].startswith("| zero-shot | 0.500 (0.500 to 0.500) |")
    assert last[-2] == "| exact bayes | – | – |"
    pictures = draw_all(rows, tmp_path / "pictures")
    assert all(picture.stat().st_size > 5_000 and picture.with_suffix(".svg").is_file() for picture in pictures)


def test_results_with_fewer_draws_are_those_of_the_first_draws(tiny_model_folder: Path, tmp_path: Path) -> None:
    dropout = McDropout()
    dropout.trials = dropout.trials[:1]
    parts = Parts(TRAIN, VALIDATION, TEST[:1])
    rows = bench([dropout], tiny_model_folder, tmp_path / "results.jsonl.gz", parts, seeds=[0])
    for row in rows:
        if row["calibrated"]:
            assert list(row["by_draws"]) == ["1", "2"]
            assert row["by_draws"]["2"]["confidence"] == row["confidence"]
            assert row["by_draws"]["1"]["confidence"] != row["confidence"]


def test_an_ablation_tells_kl_and_draws_it(tiny_model_folder: Path, tmp_path: Path) -> None:
    rows = bench(
        compared(None, betas="0,1"),
        tiny_model_folder,
        tmp_path / "results.jsonl.gz",
        Parts(TRAIN, VALIDATION, TEST[:1]),
        seeds=[0],
    )
    kl = {beta: [row["kl_nats"] for row in rows if row["settings"]["beta"] == beta] for beta in (0.0, 1.0)}
    assert min(kl[0.0]) > max(kl[1.0]) > 0  # a heavy KL holds the posterior to the prior
    assert all(row["beta_kl_nats"] == pytest.approx(row["settings"]["beta"] * row["kl_nats"]) for row in rows)
    methods = sorted({row["method"] for row in rows})
    assert baselines_of(rows) == []
    # A run before it in the same folder: its settings name no weight of KL.
    other = rows[0] | {"method": "zero-shot", "settings": {}}
    assert baselines_of([*rows, other]) == ["zero-shot"]
    assert against_beta([*rows, other], methods, tmp_path).stat().st_size > 5_000
    with pytest.raises(AbmllError, match="betas must be numbers"):
        compared(None, betas="1e-3,many")
    with pytest.raises(AbmllError, match="exclude each other"):
        compared(None, betas="0", layers="last")
    with pytest.raises(AbmllError, match="layers"):
        compared(None, layers="all,bottom")


def test_a_set_of_all_options_has_none_that_pads_a_row() -> None:
    scores = torch.tensor([[[0.3, 0.1, -torch.inf], [0.2, 0.1, 0.4]]])
    measured = measures.of_task(scores, torch.tensor([1, 0]), 1.0, threshold=1.0)
    assert (measured["set_size_90"], measured["coverage_90"]) == (2.5, 1.0)


def test_sets_of_methods_are_adaptive_prediction_sets_at_the_mean_of_their_random_number() -> None:
    probabilities = torch.tensor([[0.5, 0.3, 0.2], [0.25, 0.25, 0.5]])
    expected = torch.tensor([[0.25, 0.65, 0.9], [0.75, 0.75, 0.25]])
    torch.testing.assert_close(measures.set_scores(probabilities), expected)
    generator = torch.Generator().manual_seed(5)
    uniform = torch.rand(20_000, dtype=torch.double, generator=generator)
    for row in torch.randn(20, 5, dtype=torch.double, generator=generator).softmax(-1):
        for answer in range(5):
            above = sum(p for p in row.tolist() if p > row[answer])
            want = (above + uniform * row[answer]).mean().item()
            assert measures.set_scores(row)[answer].item() == pytest.approx(want, abs=0.01)


def test_doubt_that_is_higher_on_strange_questions_has_a_high_auroc() -> None:
    inside, outside = torch.linspace(0, 1, 50), torch.linspace(0.5, 1.5, 50)
    assert measures.ood_auroc(inside, outside) == pytest.approx(1 - 0.5**3, abs=0.02)  # the overlap's two halves
    assert measures.ood_auroc(inside, inside + 1e-12) == pytest.approx(0.5)


def test_strange_questions_keep_the_options() -> None:
    task, other = rule_task(0), replace(rule_task(1), category="other")
    made = nonsense(task.examples, random.Random(0))
    assert [e.options for e in made] == [e.options for e in task.examples]
    assert [[len(w) for w in e.prompt.split()] for e in made] == [
        [len(w) for w in e.prompt.split()] for e in task.examples
    ]
    far = foreign(task.examples, task, [task, other], random.Random(0))
    assert {e.prompt for e in far} <= {e.prompt for e in other.examples}
    assert foreign(task.examples, task, [task, rule_task(1)], random.Random(0)) == []  # of the same category


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
    # All resamples are worse than the two parts together, which the basic interval takes for bias.
    assert low < value <= high
    alone = measures.pooled_interval([(confidence, right)])
    assert alone[0] == alone[1] == alone[2]
