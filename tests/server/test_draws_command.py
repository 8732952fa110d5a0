"""Draws as adapters for other servers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from abmll.draws import draw_signs, stack_signs
from abmll.layers import attach
from abmll.store import Record, StoredPosterior
from server.store import TaskStore
from tests.command_line import CommandLine
from tests.server.conftest import random_posterior
from training.base_model import load_base

IDS = torch.tensor([[5, 9, 33, 2, 71, 14], [8, 8, 1, 60, 90, 3]])


@pytest.fixture
def store(tiny_model_folder: Path, global_posterior: tuple[Path, StoredPosterior], tmp_path: Path) -> Sequence[object]:
    """Options that name a store with two versions of a task."""
    made = TaskStore(tmp_path / "store", global_posterior[1])
    for seed in (2, 3):
        made.add("films", random_posterior(tiny_model_folder, seed), None, lambda n: Record(task="films", version=n))
    (tmp_path / "abmll.toml").write_text(f"[serve]\nposterior = '{global_posterior[0]}'\n")
    return ("--store", tmp_path / "store", "--config", tmp_path / "abmll.toml")


def test_peft_gives_an_exported_draw_the_logits_of_our_own(
    abmll: CommandLine, store: Sequence[object], tiny_model_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    told = abmll("draws", "films", *store, "--out", out, "--draws", 3, "--seed", 7, "--json").json
    assert json.loads((out / "draws.json").read_text()) | {"folder": str(out)} == told
    posterior = random_posterior(tiny_model_folder, 3)
    assert told | {"task": "films", "version": 2, "seed": 7, "rank": posterior.config.draw_rank} == told
    assert (told["posterior"], told["base_model"]) == (posterior.digest(), str(tiny_model_folder))
    # In float64: a CPU's own order of additions is up to 1.3e-5 of a float32 logit.
    exact = posterior.map(lambda tensor: tensor.double())
    attached = attach(load_base(str(tiny_model_folder), dtype=torch.float64).model, exact.config.targets)
    signs = stack_signs([draw_signs(exact, 7, 1)] * len(IDS))
    with torch.no_grad(), attached.using(exact, signs) as model:
        ours = model(input_ids=IDS).logits
    plain: Any = load_base(str(tiny_model_folder), dtype=torch.float64).model
    peft: Any = PeftModel.from_pretrained(plain, str(out / told["adapters"][1])).double().eval()
    with torch.no_grad():
        torch.testing.assert_close(peft(input_ids=IDS).logits, ours, atol=1e-5, rtol=1e-5)
        with peft.disable_adapter():
            assert (peft(input_ids=IDS).logits - ours).abs().max() > 1e-2


def test_draws_appear_whole_and_replace_only_draws_and_only_by_force(
    abmll: CommandLine, store: Sequence[object], global_posterior: tuple[Path, StoredPosterior], tmp_path: Path
) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    first = abmll("draws", "films", *store, "--version", 1, "--out", out, "--draws", 2)
    assert first.out.split() == [str(out / "draw-0"), str(out / "draw-1")]
    assert "--force" in abmll("draws", "films", *store, "--out", out).refusal
    assert json.loads((out / "draws.json").read_text())["version"] == 1
    assert abmll("draws", global_posterior[0], "--out", out, "--draws", 1, "--force").code == 0
    assert sorted(path.name for path in out.iterdir()) == ["draw-0", "draws.json"]
    assert json.loads((out / "draws.json").read_text())["posterior"] == global_posterior[1].digest
    assert all(file.stat().st_mode & 0o044 == 0o044 for file in (out / "draw-0").iterdir())
    other.mkdir()
    (other / "mine").write_text("")
    assert "holds no draws" in abmll("draws", "films", *store, "--out", other, "--force").refusal
    assert [path.name for path in other.iterdir()] == ["mine"]
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_folder_that_bears_a_tasks_name_does_not_hide_the_task(
    abmll: CommandLine,
    store: Sequence[object],
    global_posterior: tuple[Path, StoredPosterior],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "films").mkdir()
    monkeypatch.setenv("ABMLL_STORE", str(store[1]))
    ran = abmll("draws", "films", *store[2:], "--out", tmp_path / "first", "--draws", 1, "--json")
    assert (ran.json["task"], ran.json["version"]) == ("films", 2)
    shutil.copytree(global_posterior[0], tmp_path / "films", dirs_exist_ok=True)
    for number, (options, digest) in enumerate(((store, ran.json["posterior"]), ((), global_posterior[1].digest))):
        out = ("--out", tmp_path / str(number), "--draws", 1, "--json")
        assert abmll("draws", "films", *options, *out).json["posterior"] == digest


def test_a_source_that_is_none_is_named(
    abmll: CommandLine, store: Sequence[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = ("--out", tmp_path / "out")
    assert "known tasks: global, films" in abmll("draws", "songs", *store, *out).refusal
    assert "no version 9" in abmll("draws", "films", *store, *out, "--version", 9).refusal
    assert "there is no store" in abmll("draws", "films", "--store", tmp_path / "none", *out).refusal
    monkeypatch.chdir(tmp_path)
    assert "no folder of a posterior" in abmll("draws", tmp_path, *out).refusal
    (tmp_path / "file").write_text("")
    full = abmll("draws", "films", *store, "--out", tmp_path / "file" / "out")
    assert (full.code, full.err.count("\n")) == (1, 1)
    assert "choose another folder" in full.err
    assert not (tmp_path / "out").exists()
