"""Labelled examples to teach a task with."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from clients.errors import InvalidArgument, InvalidFile

_KEYS = {"prompt": "prompt", "input": "prompt", "options": "options", "answer": "answer"}
# What other people's files call them.
_SYNONYMS = {
    "question": "prompt", "text": "prompt", "choices": "options", "labels": "options", "option": "options",
    "label": "answer", "target": "answer", "output": "answer",
}  # fmt: skip
_CLOSE = 0.82  # finds "anwser", and lets "answer_id" be


class LabelledExample(BaseModel):
    """A question with its right answer.

    Attributes:
        prompt: The question; ``input`` in task files.
        options: At least two distinct answers; None where the answer is free text.
        answer: The right one: its text, or its index among the options.
    """

    model_config = ConfigDict(frozen=True, populate_by_name=True)

    prompt: str = Field(validation_alias=AliasChoices("prompt", "input"))
    options: list[str] | None = None
    answer: str | int

    @model_validator(mode="before")
    @classmethod
    def _keys_are_known(cls, record: Any) -> Any:
        fault = misnamed(record) if isinstance(record, Mapping) else None
        if fault is not None:
            raise ValueError(fault)
        return record

    @field_validator("answer", mode="before")
    @classmethod
    def _answer_is_text_or_index(cls, answer: object) -> object:
        if isinstance(answer, bool) or not isinstance(answer, int | str):
            raise ValueError(f"must be an option's text or its index, not {answer!r}")
        return answer


class Frame(Protocol):
    """A table, such as pandas' ``DataFrame``."""

    def to_dict(self, orient: Any, /) -> Any:
        """Returns its rows, for ``"records"``."""
        ...


Examples = Sequence[LabelledExample | Mapping[str, Any]] | Frame


def misnamed(record: Mapping[str, Any]) -> str | None:
    """Says which of an example's keys is meant as one that it lacks, such as ``choices`` as ``options``.

    Left alone, it would make a free-text example of a question with options. Nor may two keys give one thing. Other
    keys do no harm.
    """
    given = [key for key, value in record.items() if key in _KEYS and value is not None]
    had = {_KEYS[key] for key in given}
    if len(had) < len(given):
        return "'prompt' and 'input' both give the question; leave one of them out"
    for key, value in record.items():
        if key in _KEYS or value is None:
            continue
        known = str(key).strip().lower()
        close = difflib.get_close_matches(known, _KEYS, n=1, cutoff=_CLOSE)
        meant = _SYNONYMS.get(known) or (_KEYS[close[0]] if close else None)
        if meant is not None and meant not in had:
            return f"{key!r} is no key of an example; name it {meant!r}, or leave it out"
    return None


def records_of(examples: Examples) -> list[dict[str, Any]]:
    """Returns examples as the server takes them; of a frame, what is missing in a row is left out.

    Raises:
        InvalidArgument: They are no list of examples.
    """
    given: Any = examples
    rows = rows_of_frame(given)
    if rows is not None:
        return rows
    if isinstance(given, str | bytes | PathLike | Mapping) or not isinstance(given, Iterable):
        raise InvalidArgument(
            f"examples is {repr(given)[:80]}; give a list of records, or a frame (clients.examples.read_examples "
            "reads a file)"
        )
    listed: Iterable[object] = given
    return [_record(row, number) for number, row in enumerate(listed)]


def rows_of_frame(examples: Any) -> list[dict[str, Any]] | None:
    """Returns the rows of a frame, what is missing in them left out; None for what is no frame."""
    if not hasattr(examples, "to_dict") or not hasattr(examples, "columns"):
        return None
    rows: list[dict[str, Any]] = examples.to_dict("records")
    return [{key: _plain(value) for key, value in row.items() if not _missing(value)} for row in rows]


def _record(row: object, number: int) -> dict[str, Any]:
    if isinstance(row, LabelledExample):
        return row.model_dump()
    if not isinstance(row, Mapping):
        raise InvalidArgument(f'examples[{number}] is {repr(row)[:80]}; give {{"prompt", "options", "answer"}}')
    return dict(row)


def _plain(value: Any) -> Any:
    """A list where a frame's cell is an array."""
    return value.tolist() if hasattr(value, "tolist") else value


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)


def read_examples(path: Path) -> list[LabelledExample]:
    """Reads a JSON Lines file, one example a line: ``{"prompt": ..., "options": [...], "answer": ...}``.

    A line without options is free text.

    Raises:
        InvalidFile: The file is missing or empty, or a line is malformed; the message names the line.
    """
    try:
        # Not splitlines: it ends a line at characters that may stand in a text, such as U+2028.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidFile(f"cannot read {path}: {error}") from error
    examples: list[LabelledExample] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            examples.append(LabelledExample.model_validate_json(line))
        except ValidationError as error:
            first = error.errors()[0]
            where = f"{path} line {number}"
            if first["loc"]:
                where += ": " + ".".join(str(piece) for piece in first["loc"])
            raise InvalidFile(f"{where}: {first['msg'].removeprefix('Value error, ')}") from error
    if not examples:
        raise InvalidFile(f'{path} holds no examples; give one {{"prompt", "options", "answer"}} object a line')
    return examples
