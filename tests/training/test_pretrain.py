from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer

from abmll.errors import AbmllError
from tests.training.conftest import rule_task
from training.base.corpus import in_pretraining, unseen_items
from training.base.pretrain import PretrainConfig, pretrain
from training.splits import Split
from training.tasks import Task

CONFIG = PretrainConfig(
    vocabulary=600, width=32, layers=2, heads=2, kv_heads=1, mlp_width=48, context=128, row_tokens=64,
    batch_rows=4, micro_rows=2, minutes=0.06, pseudo_tasks=2,
)  # fmt: skip
TASKS: list[Task] = [
    *(replace(rule_task(n), source="someone/rules", licence="CC0") for n in range(2)),
    replace(rule_task(2), name="bbh_rule", family="kept"),
    replace(rule_task(3), family="exam"),
]
SPLIT = Split(seed=0, families={"family_0": "train", "family_1": "train", "kept": "train", "exam": "test"})


@pytest.mark.filterwarnings("ignore")  # scipy's and torch's own, at so small a size
def test_a_model_is_made_and_gone_on_with(books: Path, tmp_path: Path) -> None:
    first = pretrain(books, TASKS, SPLIT, tmp_path / "one", CONFIG)
    more = {"seed": 1, "theme_share": 0.2, "polarity_share": 0.2}
    second = pretrain(books, TASKS, SPLIT, tmp_path / "two", CONFIG.model_copy(update=more), start=first)
    for folder, runs in ((first, 1), (second, 2)):
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        ids = tokenizer("the film", return_tensors="pt").input_ids
        assert model(ids).logits.shape == (1, ids.shape[1], 600)
        record = json.loads((folder / "training.json").read_text())
        assert record["tasks"] == ["rule_0", "rule_1"]  # neither BIG-bench's nor held-out families
        assert len(record["runs"]) == runs
        card = (folder / "README.md").read_text()
        assert "| someone/rules | CC0 | rule_0, rule_1 |" in card
        assert f"run {runs}:" in card
    assert (first / "tokenizer.json").read_text() == (second / "tokenizer.json").read_text()
    other = Split(seed=0, families={**SPLIT.families, "family_1": "test"})
    with pytest.raises(AbmllError, match=r"has read 1 tasks that are not among .* such as rule_1"):
        pretrain(books, TASKS, other, tmp_path / "three", CONFIG, start=first)
    assert not (tmp_path / "three").exists()


def test_meta_training_is_left_the_other_half(tmp_path: Path) -> None:
    (tmp_path / "training.json").write_text(json.dumps({"tasks": ["rule_0"], "runs": []}))
    task, other = unseen_items(tmp_path, TASKS[:2])
    assert 8 < len(task.examples) < 32
    assert not any(in_pretraining(task, example) for example in task.examples)
    assert other == TASKS[1]
    assert unseen_items(tmp_path / "elsewhere", TASKS) == TASKS


def test_shares_add_up_to_one_at_most() -> None:
    assert PretrainConfig(task_share=0.5, theme_share=0.2, polarity_share=0.3).shares == pytest.approx(
        (0, 0.5, 0.2, 0.3)
    )
    with pytest.raises(ValidationError, match="more than 1"):
        PretrainConfig(task_share=0.5, theme_share=0.3, polarity_share=0.3)
