"""Labelled examples to teach a task with."""

from __future__ import annotations

from pathlib import Path

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from clients.errors import InvalidFile


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
            where = ".".join(str(piece) for piece in first["loc"]) or "the line"
            raise InvalidFile(f"{path} line {number}: {where}: {first['msg']}") from error
    if not examples:
        raise InvalidFile(f'{path} holds no examples; give one {{"prompt", "options", "answer"}} object a line')
    return examples
