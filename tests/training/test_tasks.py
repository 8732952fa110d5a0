from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from abmll.errors import InvalidExamples
from tests.training.conftest import rule_task, write_tasks
from training.tasks import DatasetColumns, load_hub_task, load_tasks, read_examples

GOOD = {"input": "is it so?", "options": ["no", "yes"], "answer": 1}


def test_a_folder_with_a_manifest(tmp_path: Path) -> None:
    given = [rule_task(1), rule_task(0)]
    loaded = load_tasks(write_tasks(tmp_path / "data", given))
    assert [task.name for task in loaded] == ["rule_0", "rule_1"]
    assert loaded[1].examples == given[0].examples
    assert (loaded[0].family, loaded[0].category, loaded[0].source, loaded[0].licence) == (
        "family_0", "rule", "someone/rules", "CC0",
    )  # fmt: skip
    assert loaded[0].fixed_labels
    assert loaded[0].majority_share == 0.5


def test_a_folder_without_one_and_answers_as_text(tmp_path: Path) -> None:
    rows = [GOOD, {"prompt": "and now?", "options": ["later", "now"], "answer": "now"}]
    (tmp_path / "b.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    (task,) = load_tasks(tmp_path)
    assert (task.name, task.family, task.fixed_labels) == ("b", "b", False)
    assert [example.answer for example in task.examples] == [1, 1]


def test_a_line_ends_at_a_newline_alone(tmp_path: Path) -> None:
    text = "first\u2028second\x85third"
    lines = [json.dumps(GOOD | {"input": text}, ensure_ascii=False), json.dumps(GOOD)]
    (tmp_path / "t.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert [example.prompt for example in read_examples(tmp_path / "t.jsonl")] == [text, "is it so?"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (json.dumps(GOOD | {"input": "\ud83d"}), "line 2: a text holds half a character"),
        ("{", "line 2: not valid JSON"),
        ("[1]", "line 2: an item must be an object"),
        (json.dumps(GOOD | {"input": " "}), "line 2: 'input' must be a text"),
        (json.dumps(GOOD | {"options": "ab"}), "line 2: 'options' must be a list"),
        (json.dumps(GOOD | {"options": ["a"]}), "line 2: options has 1 entries"),
        (json.dumps(GOOD | {"answer": 2}), "line 2: answer is 2"),
        (json.dumps(GOOD | {"answer": "maybe"}), "line 2: answer is 'maybe'"),
        (json.dumps({"input": "x", "options": ["a", "b"]}), "line 2: answer must be"),
        (json.dumps({"input": "x", "choices": ["a", "b"], "answer": "a"}), "line 2: 'choices' is no key .+ 'options'"),
        (json.dumps({"input": "x", "optoins": ["a", "b"], "answer": "a"}), "line 2: 'optoins' is no key .+ 'options'"),
        (json.dumps({"input": "x", "options": None, "Options": ["a", "b"], "answer": "a"}), "'Options' is no key"),
        (json.dumps({"input": "x", "options": ["a", "b"], "label": 1}), "line 2: 'label' is no key .+ 'answer'"),
        ('{"input": "x", "answer": ' + "1" * 5000 + "}", "line 2: not valid JSON"),
        ("[" * 100_000, "line 2: not valid JSON"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps(GOOD) + "\n" + line + "\n")
    with pytest.raises(InvalidExamples, match=message):
        read_examples(tmp_path / "t.jsonl")


def test_keys_that_an_example_does_not_need_do_no_harm(tmp_path: Path) -> None:
    more = {"id": 7, "prompt_id": 3, "text": "so?", "label": 1, "choices": None, "answer_id": 4}
    (tmp_path / "t.jsonl").write_text(json.dumps(GOOD | more) + "\n" + json.dumps(GOOD))
    first, second = read_examples(tmp_path / "t.jsonl")
    assert first == second


def test_folders_that_hold_no_tasks(tmp_path: Path) -> None:
    with pytest.raises(InvalidExamples, match=r"neither a manifest.json nor any .jsonl"):
        load_tasks(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InvalidExamples, match="holds no examples"):
        load_tasks(tmp_path)
    (tmp_path / "manifest.json").write_text('{"tasks": [{"name": "a"}]}')
    with pytest.raises(InvalidExamples, match="family"):
        load_tasks(tmp_path)
    entry: dict[str, Any] = {"name": "a", "file": "t.jsonl", "family": "f", "category": "c"}
    for wrong in ({"name": 3}, {"family": ["f"]}, {"family": None}, {"category": " "}):
        (tmp_path / "manifest.json").write_text(json.dumps({"tasks": [entry | wrong]}))
        with pytest.raises(InvalidExamples, match=f"{next(iter(wrong))} is .+ must be a text"):
            load_tasks(tmp_path)
    (tmp_path / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(InvalidExamples, match="must be"):
        load_tasks(tmp_path)
    with pytest.raises(InvalidExamples, match="2 tasks named 'rule_0'"):
        load_tasks(write_tasks(tmp_path / "twice", [rule_task(0), rule_task(0)]))


def saved(folder: Path, rows: dict[str, list[Any]], features: Any = None) -> str:
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / "train.parquet"))
    return str(folder)


def test_a_dataset_with_class_labels(tmp_path: Path) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "very_pos"])}
    )
    path = saved(tmp_path, {"text": ["dull", "fine", "good"], "label": [0, 1, 1]}, features)
    task = load_hub_task(path, DatasetColumns(["text"], "label"), limit=2, family="films")
    assert task.examples[1].options == ("neg", "very pos")
    assert [example.answer for example in task.examples] == [0, 1]
    assert (task.family, task.fixed_labels, task.source) == ("films", True, path)


def test_datasets_with_texts_as_labels_or_options_of_their_own(tmp_path: Path) -> None:
    rows = {
        "premise": ["it rains", "it snows"], "claim": ["wet", "hot"], "verdict": ["true", "false"],
        "choices": [["a", "b"], ["c", "d"]], "right": [1, 0],
    }  # fmt: skip
    path = saved(tmp_path, rows)
    told = load_hub_task(path, DatasetColumns(["premise", "claim"], "verdict"))
    assert told.examples[0].prompt == "premise: it rains\nclaim: wet"
    assert (told.examples[0].options, told.examples[0].answer) == (("false", "true"), 1)
    own = load_hub_task(path, DatasetColumns(["premise"], "right", "choices"))
    assert [example.options for example in own.examples] == [("a", "b"), ("c", "d")]
    with pytest.raises(InvalidExamples, match=r"no column 'verdikt'; it has"):
        load_hub_task(path, DatasetColumns(["premise"], "verdikt"))


def test_a_manifest_may_name_a_dataset(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    path = saved(tmp_path / "set", {"text": ["a b", "c d"], "label": ["x", "y"]})
    entry = {"name": "n", "family": "f", "category": "c", "dataset": path, "text": ["text"], "label": "label"}
    (tmp_path / "manifest.json").write_text(json.dumps({"tasks": [entry]}))
    (task,) = load_tasks(tmp_path)
    assert (task.name, task.family, len(task.examples)) == ("n", "f", 2)


def test_a_dataset_that_cannot_be_had_is_told(tmp_path: Path) -> None:
    path = saved(tmp_path, {"text": ["a b", "c d"], "label": ["x", "y"]})
    with pytest.raises(InvalidExamples, match=r"cannot be loaded .* check its name, config and split"):
        load_hub_task(path, DatasetColumns(["text"], "label"), split="tset")
    with pytest.raises(InvalidExamples, match="cannot be loaded"):
        load_hub_task(str(tmp_path / "nothing"), DatasetColumns(["text"], "label"))
