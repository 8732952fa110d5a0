"""The commands, in processes of their own as a user runs them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from abmll.store import Record, StoredPosterior, load_posterior, save_posterior
from tests.command_line import CommandLine
from tests.training.conftest import rule_task, write_tasks
from training import benchmark

# The command line counts before the file.
SETTINGS = """
steps = 400
checkpoint_every = 2
[posterior]
rank = 5
[inner]
steps = 2
[episodes]
shots = [4]
queries = 4
"""
PINS = ["--pin", "family_3=validation", "--pin", "family_4=test"]


def launched(*arguments: object, told: bool = True, processes: int = 1) -> str:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    command = [sys.executable, *launcher, "-m", "server.cli", *map(str, arguments)]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, cwd=root, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + (done.stderr if told else "")


def write_texts(path: Path, examples: Path) -> Path:
    """The same examples without options."""
    rows = [json.loads(line) for line in examples.read_text().splitlines()]
    texts = [{"input": row["input"], "answer": row["options"][row["answer"]]} for row in rows]
    path.write_text("".join(json.dumps(text) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def trained(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    folder = tmp_path_factory.mktemp("commands")
    data = write_tasks(folder / "data", [rule_task(number) for number in range(5)])
    (folder / "settings.toml").write_text(SETTINGS)
    return data, folder / "theta", train(data, tiny_model_folder, folder / "theta")


def train(data: Path, model: Path, out: Path, *more: object, processes: int = 1) -> str:
    options = ["--steps", 3, "--config", data.parent / "settings.toml", "--rank", 3, *PINS, *more]
    return launched("train", "--tasks", data, "--model", model, "--out", out, *options, processes=processes)


@pytest.mark.slow
def test_train_adapt_and_eval(trained: tuple[Path, Path, str], tmp_path: Path, abmll: CommandLine) -> None:
    data, theta, printed = trained
    assert "| rule | 16 | 1 |" in printed
    stored = load_posterior(theta)
    assert stored.calibration is not None
    assert stored.calibration.fitted_on == ["rule_3"]
    assert stored.posterior.config.rank == 3
    assert stored.record.training["steps"] == 3
    assert stored.record.training["split"]["families"]["family_4"] == "test"
    wanted = ["--queries", 6, "--draws", 2, "--shots", "0,2", "--by", "category,task"]
    rows = abmll("eval", theta, "--tasks", data, *wanted, "--json").json
    assert [(row.get("category") or row["task"], row["shots"], row["tasks"]) for row in rows] == [
        (name, shots, 1) for level in ("rule", "rule_4") for name in (level, "all") for shots in (0, 2)
    ]
    examples = data / "tasks" / "rule_4.jsonl"
    adapt = ["adapt", theta, "--task", "films", "--steps", 3, "--examples"]
    adapted = abmll(*adapt, examples, "--out", tmp_path / "phi", "--json").json
    phi = load_posterior(tmp_path / "phi")
    assert adapted == {
        "folder": str(tmp_path / "phi"), "task": "films", "posterior": phi.digest, "parent": stored.digest, "shots": 40,
    }  # fmt: skip
    assert (phi.record.task, phi.record.shots, phi.record.parent) == ("films", 40, stored.digest)
    assert stored.calibration is not None
    assert phi.calibration is not None
    assert [entry.shots for entry in phi.calibration.by_shots] == [40]
    assert phi.calibration.fitted_on == stored.calibration.fitted_on
    printed = abmll("eval", theta, "--tasks", data, *wanted[:4], "--shots", 2, "--by", "task", "--free-text").out
    assert "| rule_4 | 2 | 1 |" in printed
    assert "prr" in printed
    onto_task = abmll("train", "--tasks", data, "--out", tmp_path / "phi", *PINS)
    assert "holds the posterior of task 'films', which a global one does not replace" in onto_task.refusal
    assert load_posterior(tmp_path / "phi").digest == phi.digest
    texts = write_texts(tmp_path / "texts.jsonl", examples)
    assert abmll(*adapt, texts, "--out", tmp_path / "text").code == 0
    taught = load_posterior(tmp_path / "text").calibration
    assert taught is not None
    assert (taught.by_shots, [entry.shots for entry in taught.texts]) == ([], [40])
    table_again = abmll("calibrate", theta, "--tasks", data, "--shots", "0,4", "--draws", 2, "--queries", 10).out
    assert "4 shots: temperatures around" in table_again
    again = load_posterior(theta)
    assert again.digest == stored.digest
    assert again.calibration is not None
    assert [entry.shots for entry in again.calibration.by_shots] == [0, 4]
    assert [entry.shots for entry in again.calibration.texts] == [0, 4]
    assert "4 shots, free text: slope" in table_again


def test_wrong_input_is_one_line(trained: tuple[Path, Path, str], tmp_path: Path, abmll: CommandLine) -> None:
    data, theta, _ = trained
    out = ["--out", tmp_path / "out"]
    examples = ["--examples", data / "tasks" / "rule_4.jsonl"]
    flat = tmp_path / "flat.toml"
    flat.write_text("posterior = 3\n")
    (tmp_path / "b.toml").write_text('[posterior]\nbase_model = "other"\n')
    (tmp_path / "seed.toml").write_text(f"seed = {2**64}\n")
    (tmp_path / "inf.toml").write_text("learning_rate = inf\n")
    (tmp_path / "utf16.toml").write_text("steps = 3\n", encoding="utf-16")
    (tmp_path / "wrong").mkdir()
    (tmp_path / "wrong" / "manifest.json").write_text('{"tasks": []}', encoding="utf-16")
    save_posterior(tmp_path / "one", load_posterior(theta).posterior, Record(task="one"), None)
    longer = Path(benchmark.__file__).parent / "results" / "world-longer"
    cases: dict[str, list[object]] = {
        "--part 'exam' must be": ["eval", theta, "--tasks", data, "--part", "exam"],
        "neither a manifest.json": ["eval", theta, "--tasks", tmp_path],
        "must be whole numbers": ["eval", theta, "--tasks", data, "--shots", "few"],
        "not a posterior folder": ["eval", tmp_path, "--tasks", data],
        "must be FAMILY=train": ["train", "--tasks", data, "--pin", "family_0", *out],
        "'global' is reserved": ["adapt", theta, *examples, "--task", "global", *out],
        "'My task' is no task name": ["adapt", theta, *examples, "--task", "My task", *out],
        "holds the global posterior, which a task's one": ["adapt", theta, *examples, "--task", "a", "--out", theta],
        "no task has examples enough for 50 shots": ["eval", theta, "--tasks", data, "--shots", "50,60"],
        "cannot be a folder of results": ["bench", "--out", data / "manifest.json"],
        "holds other things than results": ["bench", "--out", data],
        "is no folder of `abmll bench`": ["bench", "--out", tmp_path / "results", "--settings-of", data],
        "says no settings of lora": [
            "bench",
            "--out",
            tmp_path / "results",
            "--settings-of",
            longer,
            "--methods",
            "lora",
        ],
        "greater than or equal to 0": ["bench", "--out", tmp_path / "results", "--shots", "-1"],
        "--shard-base needs several processes": ["eval", theta, "--tasks", data, "--shard-base"],
        "--jobs 2 would load the whole base model": ["eval", theta, "--tasks", data, "--shard-base", "--jobs", 2],
        "setting posterior is 3; make it a table": ["train", "--tasks", data, "--config", tmp_path / "flat.toml", *out],
        "cannot read settings from": ["train", "--tasks", data, "--config", tmp_path / "utf16.toml", *out],
        "is not a split file": ["train", "--tasks", data, "--split", tmp_path / "utf16.toml", *out],
        "manifest.json must be": ["train", "--tasks", tmp_path / "wrong", *out],
        "setting layers": ["train", "--tasks", data, "--layers", "bottom", "--model", "/nowhere", *out],
        "holds the posterior of task 'one'": ["eval", tmp_path / "one", "--tasks", data, "--part", "all"],
        "base_model: the base model is named by --model": [
            "train",
            "--tasks",
            data,
            "--config",
            tmp_path / "b.toml",
            *out,
        ],
        "setting seed": ["train", "--tasks", data, "--config", tmp_path / "seed.toml", *out],
        "setting learning_rate": ["train", "--tasks", data, "--config", tmp_path / "inf.toml", *out],
        "device 'meta' cannot be used": ["eval", theta, "--tasks", data, "--device", "meta"],
        "of task 'one'; give the global": ["adapt", tmp_path / "one", *examples, "--task", "a", *out],
        "give the global one that it": ["calibrate", tmp_path / "one", "--tasks", data],
        "serve it with its own base model": ["adapt", theta, *examples, "--task", "a", "--model", "abmll-small", *out],
    }
    nowhere = abmll("adapt", theta, *examples, "--task", "a", "--out", flat / "sub")
    assert nowhere.code == 1  # the disk's failure, told before the work
    assert "cannot be made, nothing can be written" in nowhere.err
    for message, arguments in cases.items():
        ran = abmll(*arguments)
        assert (ran.code, ran.out) == (2, ""), ran
        last = ran.err.strip().splitlines()[-1]
        assert last.startswith("abmll: "), ran
        assert message in last
        assert "Traceback" not in ran.err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_processes_that_share_the_base_model_do_what_one_does(
    trained: tuple[Path, Path, str], tiny_model_folder: Path, tmp_path: Path, abmll: CommandLine
) -> None:
    data, theta, told = trained
    sharded = ["--shard-base", "--device", "cpu"]
    printed = train(data, tiny_model_folder, tmp_path / "theta", *sharded, processes=2)
    assert printed.count("wrote ") == told.count("wrote ") == 1
    found, expected = load_posterior(tmp_path / "theta"), load_posterior(theta)
    assert_close(found, expected)
    assert cells(printed) == pytest.approx(cells(told), abs=2e-3)  # on validation tasks, calibrated
    taught = [theta, "--examples", data / "tasks" / "rule_4.jsonl", "--task", "new"]
    assert abmll("adapt", *taught, "--out", tmp_path / "alone").code == 0
    launched("adapt", *taught, "--out", tmp_path / "shared", *sharded, processes=2)
    assert_close(load_posterior(tmp_path / "shared"), load_posterior(tmp_path / "alone"))
    measured = ["eval", theta, "--tasks", data, "--queries", 6, "--draws", 2, "--shots", "2"]
    assert launched(*measured, *sharded, told=False, processes=2) == abmll(*measured).out


def cells(printed: str) -> list[float]:
    """Numbers of the tables in what a command printed."""
    rows = [line for line in printed.splitlines() if line.startswith("|")]
    return [float(cell) for row in rows for cell in row.split("|") if re.fullmatch(r" *-?[\d.]+%? *", cell)]


def assert_close(found: StoredPosterior, expected: StoredPosterior) -> None:
    """Equal, but for the order in which gradients were added."""
    assert found.posterior.config == expected.posterior.config
    for key, tensor in expected.posterior.tensors().items():
        torch.testing.assert_close(found.posterior.tensors()[key], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_calibration_leaves_out_what_the_model_cannot_read(
    trained: tuple[Path, Path, str], tmp_path: Path, abmll: CommandLine
) -> None:
    data, theta = tmp_path / "data", tmp_path / "theta"
    shutil.copytree(trained[0], data)
    shutil.copytree(trained[1], theta)
    long = {"input": " ".join("abcdefghij" * 48), "options": ["yes", "no"], "answer": 0}
    for number in range(3):  # of training families
        path = data / "tasks" / f"rule_{number}.jsonl"
        path.write_text("".join(json.dumps(long) + "\n" for _ in range(40)) + path.read_text())
    ran = abmll("calibrate", theta, "--tasks", data, "--shots", "0", "--draws", 2, "--queries", 10)
    assert ran.code == 0, ran
    assert "task rule_0: 40 of 80 items left out, the first is number 1" in ran.err


@pytest.mark.slow
def test_a_posterior_is_calibrated_for_mixtures_which_are_then_made(
    tiny_model_folder: Path, trained: tuple[Path, Path, str], tmp_path: Path, abmll: CommandLine
) -> None:
    data, kronecker, _ = trained
    theta, out = tmp_path / "theta", ("--out", tmp_path / "theta")
    settings = ["train", "--tasks", data, "--model", tiny_model_folder, "--steps", 1, "--calibration-draws", 6, *PINS]
    settings += ["--config", tmp_path / "settings.toml", "--family", "subspace"]
    (tmp_path / "settings.toml").write_text("[inner]\nsteps = 2\n[episodes]\nshots = [4]\nqueries = 4\n")
    assert "only subspace" in abmll(*settings[:-1], "kronecker", *out, "--members", 2).refusal
    assert "give a multiple of 8" in abmll(*settings, *out, "--members", 4).refusal
    (tmp_path / "wrong.toml").write_text("[posterior]\nmembers = 2\n")
    wrong = ["train", "--tasks", data, "--family", "subspace", "--config", tmp_path / "wrong.toml", *out]
    assert "give inner.members" in abmll(*wrong).refusal
    assert not theta.exists()
    assert abmll(*settings, *out, "--members", 3).code == 0
    stored = load_posterior(theta)
    assert (stored.posterior.config.members, stored.record.training["inner"]["members"]) == (1, 3)

    measured = ["--tasks", data, "--shots", "4", "--draws", 4, "--queries", 10]
    assert abmll("calibrate", theta, *measured, "--members", 2).code == 0
    again = load_posterior(theta)
    assert again.digest == stored.digest
    assert again.record.training == stored.record.training | {"inner": again.record.training["inner"]}
    assert again.record.training["inner"] == stored.record.training["inner"] | {"members": 2}
    assert again.calibration != stored.calibration
    assert stored.calibration is not None
    assert again.calibration is not None
    for entry in (*stored.calibration.by_shots, *again.calibration.by_shots):
        assert (entry.scatter is None) == (entry.shots > 0)  # few draws cannot stand for all members
    assert "only subspace" in abmll("calibrate", kronecker, *measured, "--members", 2).refusal
    assert "only subspace" in abmll("calibrate", kronecker, *measured, "--factor-rate", 0.002).refusal
    together = abmll("calibrate", theta, *measured, "--factor-rate", 0.002)
    assert "these settings do not go together: members is 2" in together.refusal
    taught = ["adapt", theta, "--examples", data / "tasks" / "rule_4.jsonl", "--task", "t", "--out", tmp_path / "phi"]
    assert abmll(*taught).code == 0
    assert load_posterior(tmp_path / "phi").posterior.config.members == 2
    assert abmll("eval", theta, *measured).code == 0
    one = abmll("calibrate", theta, *measured, "--members", 1, "--factor-rate", 0.002)
    assert one.code == 0, one.err
    inner = load_posterior(theta).record.training["inner"]
    assert (inner["members"], inner["factor_rate"]) == (1, 0.002)
    assert "tasks of 17 examples and more have factors of their own" in one.err
    assert abmll("calibrate", theta, *measured, "--members", 2).code == 0  # members share their factors
    inner = load_posterior(theta).record.training["inner"]
    assert (inner["members"], inner["factor_rate"]) == (2, 0.0)


@pytest.mark.slow
def test_a_prior_has_components_as_many_as_are_asked_for(
    tiny_model_folder: Path, trained: tuple[Path, Path, str], tmp_path: Path, abmll: CommandLine
) -> None:
    data, kronecker, _ = trained
    theta, out = tmp_path / "theta", ("--out", tmp_path / "theta")
    settings = ["train", "--tasks", data, "--model", tiny_model_folder, "--steps", 1, "--calibration-draws", 2, *PINS]
    settings += ["--config", tmp_path / "settings.toml", "--components", 2, "--family"]
    (tmp_path / "settings.toml").write_text("[inner]\nsteps = 2\n[episodes]\nshots = [4]\nqueries = 4\n")
    assert "only a subspace posterior has some, not a kronecker one" in abmll(*settings, "kronecker", *out).refusal
    assert not theta.exists()
    assert abmll(*settings, "subspace", *out).code == 0
    stored = load_posterior(theta)
    assert stored.posterior.components is not None
    training = {name for name, part in stored.record.training["split"]["families"].items() if part == "train"}
    assert len(stored.posterior.components.tasks) == 2
    assert {f"family_{name.removeprefix('rule_')}" for name in stored.posterior.components.tasks} <= training
    taught = ["adapt", theta, "--examples", data / "tasks" / "rule_4.jsonl", "--task", "t", "--out"]
    assert abmll(*taught, tmp_path / "phi").code == 0
    assert load_posterior(tmp_path / "phi").posterior.components is None

    measured = ["--tasks", data, "--shots", "4", "--draws", 2, "--queries", 10]
    assert abmll("calibrate", theta, *measured).code == 0
    assert load_posterior(theta).digest == stored.digest
    many = abmll("calibrate", theta, *measured, "--components", 99)
    assert many.code == 0, many.err
    assert re.search(r"the prior has \d components, not 99: no more training tasks have 16 examples", many.err)
    assert abmll("calibrate", theta, *measured, "--components", 1).code == 0
    fewer = load_posterior(theta)
    assert fewer.posterior.components is not None
    assert fewer.posterior.components.tasks == stored.posterior.components.tasks[:1]
    assert abmll("eval", theta, *measured).code == 0
    assert abmll("calibrate", theta, *measured, "--components", 0).code == 0
    none = load_posterior(theta)
    assert none.posterior.components is None
    assert none.digest not in {stored.digest, fewer.digest}
    assert abmll(*taught, tmp_path / "other").code == 0
    assert load_posterior(tmp_path / "other").digest != load_posterior(tmp_path / "phi").digest
    assert "not a kronecker one; give 0" in abmll("calibrate", kronecker, *measured, "--components", 1).refusal
