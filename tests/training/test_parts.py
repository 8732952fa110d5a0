from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from abmll.decoding import decode, end_tokens, until_end
from abmll.errors import AbmllError
from abmll.examples import Example, Template
from abmll.sampling import Sampling
from tests.command_line import CommandLine
from tests.training.conftest import rule_task, write_tasks
from training.base_model import BaseModel, load_base
from training.commands.parts import chosen_split, tell_of_small, within_context
from training.embedded import POSTERIOR
from training.episodes import label

TASKS = [rule_task(number) for number in range(5)]
ROOM = Template()


def test_items_that_the_model_cannot_read_are_left_out_and_told(
    base: BaseModel, capsys: pytest.CaptureFixture[str]
) -> None:
    long = Example("word " * 300, ("yes", "no"), 0)
    mixed = replace(TASKS[0], examples=(*TASKS[0].examples[:3], long, TASKS[0].examples[4], long))
    hopeless = replace(TASKS[1], examples=(long,))
    kept = within_context(base, ROOM, [mixed, hopeless, TASKS[2]])
    assert kept == [replace(mixed, examples=(*mixed.examples[:3], mixed.examples[4])), TASKS[2]]
    told = capsys.readouterr().err.splitlines()
    assert "task rule_0: 2 of 6 items left out, the first is number 4: longer than the 256 tokens" in told[0]
    assert "task rule_1: 1 of 1 items left out" in told[1]
    with pytest.raises(AbmllError, match="no item fits into the 256 tokens"):
        within_context(base, ROOM, [hopeless], main=False)
    assert capsys.readouterr().err == ""


def test_tasks_with_too_few_examples_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    small = replace(TASKS[0], examples=TASKS[0].examples[:9])
    tell_of_small([small, TASKS[1]], (0, 4, 5))
    assert capsys.readouterr().err == (
        "abmll: 5 shots: 1 of 2 tasks left out, the first is rule_0: with fewer than 10 items\n"
    )
    with pytest.raises(AbmllError, match="the largest has 9, of which half are asked; give at most 4 shots"):
        tell_of_small([small], (5, 16))


def test_whatever_is_kept_can_be_asked_with_options_and_without(base: BaseModel) -> None:
    sizes = [Example("x" * count, ("yes", "no"), 0) for count in range(200, 300)]
    (kept,) = within_context(base, ROOM, [replace(TASKS[0], examples=tuple(sizes))])
    assert 0 < len(kept.examples) < len(sizes)
    label(base, ROOM, kept.examples)
    label(base, ROOM, [example.as_free_text() for example in kept.examples])


def test_a_split_is_made_or_read_never_both(tmp_path: Path) -> None:
    made = chosen_split(TASKS, None, 3, ["family_0=test"], tmp_path / "made.json")
    assert (made.seed, made.families["family_0"]) == (3, "test")
    assert chosen_split(TASKS, tmp_path / "made.json", 4, None, tmp_path / "read.json") == made
    with pytest.raises(AbmllError, match="--pin holds for a split that is made"):
        chosen_split(TASKS, tmp_path / "made.json", 3, ["family_0=train"], tmp_path / "read.json")
    with pytest.raises(AbmllError, match=r"absent\.json is not a split file"):
        chosen_split(TASKS, tmp_path / "absent.json", 3, None, tmp_path / "read.json")


def test_a_folder_of_other_things_is_not_replaced(abmll: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "examples.jsonl").write_text('{"input": "a", "options": ["x", "y"], "answer": 0}\n')
    given = ("adapt", POSTERIOR, "--examples", tmp_path / "examples.jsonl", "--task", "t")
    assert "holds no posterior; it is not replaced" in abmll(*given, "--out", tmp_path).refusal
    tasks = write_tasks(tmp_path / "tasks", TASKS)
    assert "holds no posterior" in abmll("train", "--tasks", tasks, "--out", tmp_path, "--steps", 1).refusal
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_decoding_takes_no_advice_of_the_models_maker_but_where_a_text_ends(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    advice = {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "do_sample": True, "temperature": 0.1, "top_k": 3}
    (folder / "generation_config.json").write_text(json.dumps(advice | {"eos_token_id": [0, 7]}))
    advised, plain = load_base(str(folder)), load_base(str(tiny_model_folder))
    assert end_tokens(advised.model, advised.tokenizer) == [0, 7]
    prompts = [[40, 41, 42], [50, 51, 50, 51]]
    for sampling in (Sampling(12), Sampling(12, temperature=1.0, seed=3)):
        texts = [
            [until_end(text, [0, 7]) for text in decode(base.model, base.tokenizer, prompts, sampling, [None, 1])]
            for base in (advised, plain)
        ]
        assert texts[0] == texts[1]
