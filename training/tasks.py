"""Tasks: named sets of labelled examples, read from JSONL folders or from Hugging Face datasets."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abmll.errors import AbmllError, InvalidExamples
from abmll.examples import Example, check_one_kind, check_options, resolve_answer
from clients.examples import misnamed
from training.hub import brief

HALF = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Task:
    """A set of examples that share one rule.

    Attributes:
        name: Unique within a collection.
        family: Tasks of one family share items or style and must stay in the same split.
        category: Kind of task, for reports (intent, topic, ...).
        examples: The labelled examples.
        fixed_labels: Whether all examples have the same options in the same order.
        source: Where the examples come from, if known.
        licence: Their licence, if known.
    """

    name: str
    family: str
    category: str
    examples: tuple[Example, ...]
    fixed_labels: bool
    source: str = ""
    licence: str = ""

    @property
    def is_free_text(self) -> bool:
        """Whether its questions have no options."""
        return self.examples[0].is_free_text

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that tell its examples from others."""
        items = [[example.prompt, example.options, example.answer] for example in self.examples]
        return hashlib.sha256(json.dumps(items).encode()).hexdigest()[:16]

    @property
    def majority_share(self) -> float:
        """Accuracy of always giving the most frequent answer, by text with fixed labels or none, else by position."""
        counts = Counter(example.text if example.is_free_text else example.answer for example in self.examples)
        return max(counts.values()) / len(self.examples)


def _example(record: Any, where: str) -> Example:
    if not isinstance(record, Mapping):
        raise InvalidExamples(f'{where}: an item must be an object {{"input", "options", "answer"}}', field=where)
    fault = misnamed(record)
    if fault is not None:
        raise InvalidExamples(f"{where}: {fault}", field=where)
    text = record.get("input", record.get("prompt"))
    options = record.get("options")
    if not isinstance(text, str) or not text.strip():
        name = "input" if "input" in record else "prompt"
        there = "" if name in record else f"; there are {', '.join(map(repr, record)) or 'none'}"
        raise InvalidExamples(f"{where}: {name!r} must be a text that is not empty{there}", field=where)
    texts: list[Any] = [text, record.get("answer"), *(options if isinstance(options, list) else [])]
    if any(isinstance(each, str) and HALF.search(each) for each in texts):
        raise InvalidExamples(f"{where}: a text holds half a character, one of \\ud800 to \\udfff alone", field=where)
    if options is None:
        answer = record.get("answer")
        if not isinstance(answer, str) or not answer.strip():
            raise InvalidExamples(f"{where}: without 'options', 'answer' must be a text that is not empty", field=where)
        return Example(text, (answer,), 0)
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise InvalidExamples(f"{where}: 'options' must be a list of texts", field=where)
    try:
        check_options(options)
        answer = resolve_answer(record.get("answer"), options, "answer")
    except AbmllError as error:
        raise InvalidExamples(f"{where}: {error.message}", field=where) from error
    return Example(text, tuple(options), answer)


def examples_of(records: Iterable[Example | Mapping[str, Any]]) -> tuple[Example, ...]:
    """Returns labelled examples given as they are, or as records like the lines of ``read_examples``.

    Raises:
        InvalidExamples: There are none, one is malformed, or some have options and some have not.
    """
    found = tuple(
        record if isinstance(record, Example) else _example(record, f"examples[{number}]")
        for number, record in enumerate(records)
    )
    if not found:
        raise InvalidExamples("there are no examples; give at least one", field="examples")
    check_one_kind(found)
    return found


def read_examples(path: Path) -> tuple[Example, ...]:
    """Reads labelled examples from a JSON Lines file.

    Args:
        path: One object a line: ``{"input": str, "options": [str, ...], "answer": int or str}``; free text: no options.

    Raises:
        InvalidExamples: The file is missing, empty, or a line is malformed, which the message names; or some lines have
            options and some have not.
    """
    try:
        # Not splitlines: it ends a line at characters that may stand in a text, such as U+2028.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidExamples(f"cannot read examples from {path}: {error}", field=str(path)) from error
    examples: list[Example] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path.name} line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # also numbers of thousands of digits
            raise InvalidExamples(f"{where}: not valid JSON ({error})", field=where) from error
        examples.append(_example(record, where))
    if not examples:
        raise InvalidExamples(f"{path} holds no examples; give one JSON object a line", field=str(path))
    try:
        check_one_kind(examples)
    except InvalidExamples as error:
        raise InvalidExamples(f"{path}: {error.message}", field=str(path)) from error
    return tuple(examples)


def _make_task(
    name: str, family: str, category: str, examples: tuple[Example, ...], source: str = "", licence: str = ""
) -> Task:
    fixed = all(example.options == examples[0].options for example in examples)
    return Task(name, family, category, examples, fixed, source, licence)


def _of_manifest(entry: dict[str, Any], folder: Path) -> Task:
    for key in ("name", "family", "category"):
        if not isinstance(entry[key], str) or not entry[key].strip():
            raise ValueError(f"{key} is {entry[key]!r}, and must be a text")
    if "dataset" in entry:
        text = entry["text"]
        columns = DatasetColumns([text] if isinstance(text, str) else text, entry["label"], entry.get("options"))
        more = {key: entry[key] for key in ("config", "split", "limit", "revision") if key in entry}
        path, family, category = entry["dataset"], entry["family"], entry["category"]
        return load_hub_task(path, columns, name=entry["name"], family=family, category=category, **more)
    return _make_task(
        entry["name"],
        entry["family"],
        entry["category"],
        read_examples(folder / entry["file"]),
        entry.get("source_repo", ""),
        entry.get("licence", ""),
    )


def load_tasks(folder: Path) -> list[Task]:
    """Loads every task of a folder, sorted by name.

    A ``manifest.json`` (``{"tasks": [{"name", "file", "family", "category"}, ...]}``) names families
    and categories (``source_repo`` and ``licence`` may be given too); without one, every ``*.jsonl`` file
    of the folder is a family of its own. An entry with ``dataset`` in place of ``file`` is loaded with
    ``load_hub_task``: ``text`` (list of columns) and ``label`` are needed, ``options``, ``config``,
    ``split``, ``limit`` and ``revision`` may be given.

    Raises:
        InvalidExamples: The folder has no tasks, or one is malformed.
    """
    manifest = folder / "manifest.json"
    if manifest.is_file():
        try:
            entries = json.loads(manifest.read_text(encoding="utf-8"))["tasks"]
            tasks = [_of_manifest(entry, folder) for entry in entries]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InvalidExamples(
                f'{manifest} must be {{"tasks": [{{"name", "file", "family", "category"}}, ...]}}: {error!r}',
                field=str(manifest),
            ) from error
    else:
        paths = sorted(folder.glob("*.jsonl"))
        tasks = [_make_task(path.stem, path.stem, "task", read_examples(path)) for path in paths]
    if not tasks:
        raise InvalidExamples(f"{folder} has neither a manifest.json nor any .jsonl file", field=str(folder))
    name, count = Counter(task.name for task in tasks).most_common(1)[0]
    if count > 1:
        raise InvalidExamples(f"{folder} has {count} tasks named {name!r}; give each a name of its own", field=name)
    return sorted(tasks, key=lambda task: task.name)


def spread_over_families(tasks: Sequence[Task], seed: int) -> list[Task]:
    """Returns the tasks in random order, the first of every family before the second of any."""
    shuffled = list(tasks)
    random.Random(seed).shuffle(shuffled)
    order: dict[str, int] = {}
    rank: dict[str, int] = {}
    for task in shuffled:
        rank[task.name] = order[task.family] = order.get(task.family, -1) + 1
    return sorted(shuffled, key=lambda task: rank[task.name])


@dataclass(frozen=True)
class DatasetColumns:
    """Where a Hugging Face dataset keeps what an example needs.

    Attributes:
        text: Columns that make up the question, joined by newlines as ``column: value`` when several.
        label: Column of the answer: an index into the options, or the answer's text.
        options: Column holding each row's own options; None when the label column is a ``ClassLabel``,
            whose names are the options, or when the distinct label texts are.
    """

    text: Sequence[str]
    label: str
    options: str | None = None


def load_hub_task(
    path: str,
    columns: DatasetColumns,
    *,
    name: str | None = None,
    config: str | None = None,
    split: str = "train",
    limit: int | None = None,
    family: str | None = None,
    category: str = "task",
    revision: str | None = None,
) -> Task:
    """Loads a task with the ``datasets`` library, by hub name or local path.

    Args:
        path: Dataset name on the hub, or a builder name or folder that ``datasets.load_dataset`` takes.
        columns: Which columns hold question, answer and options.
        name: Task name; the dataset's by default.
        config: Dataset configuration.
        split: Which split to read.
        limit: At most this many examples, from the start.
        family: Family name; the task's name by default.
        category: Category for reports.
        revision: Commit or tag on the hub.

    Raises:
        InvalidExamples: It cannot be had, or a named column is missing or holds no usable labels.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        data = datasets.load_dataset(path, config, split=split, revision=revision)
    except (ValueError, OSError, DatasetsError) as error:
        raise InvalidExamples(
            f"the data set {path} cannot be loaded ({brief(error)}); check its name, config and split", field=path
        ) from error
    if not isinstance(data, datasets.Dataset):
        raise InvalidExamples(f"{path} split {split!r} is not a map-style dataset", field="split")
    wanted = [*columns.text, columns.label, *([columns.options] if columns.options else [])]
    missing = [column for column in wanted if column not in data.column_names]
    if missing:
        raise InvalidExamples(f"{path} has no column {missing[0]!r}; it has {data.column_names}", field=missing[0])
    if limit is not None:
        data = data.select(range(min(limit, len(data))))
    rows: Iterable[dict[str, Any]] = data  # pyright: ignore[reportAssignmentType] -- datasets types rows as Any
    feature = data.features[columns.label]
    names: list[str] | None = None
    if columns.options is None:
        if isinstance(feature, datasets.ClassLabel):
            names = [label.replace("_", " ") for label in feature.names]
        else:
            names = sorted({str(row[columns.label]) for row in rows})
    examples: list[Example] = []
    for number, row in enumerate(rows):
        text = (
            str(row[columns.text[0]])
            if len(columns.text) == 1
            else "\n".join(f"{column}: {row[column]}" for column in columns.text)
        )
        options = names if names is not None else row[columns.options or ""]
        answer = row[columns.label]
        if names is not None and not isinstance(feature, datasets.ClassLabel):
            answer = str(answer)
        examples.append(_example({"input": text, "options": list(options), "answer": answer}, f"{path} row {number}"))
    if not examples:
        raise InvalidExamples(f"{path} split {split!r} is empty", field="split")
    task_name = name or path.rstrip("/").split("/")[-1]
    return _make_task(task_name, family or task_name, category, tuple(examples), source=path)
