"""Labelled examples and the text that a model reads for them: one place for training and server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from abmll.errors import InvalidExamples, InvalidRequest

MAX_OPTIONS = 64


@dataclass(frozen=True)
class Example:
    """A question with its right answer: one of several options, or a free text.

    Attributes:
        prompt: The question's text.
        options: At least two distinct answers; of a free text, the right one alone.
        answer: Index of the right one in ``options``.
    """

    prompt: str
    options: tuple[str, ...]
    answer: int

    @property
    def text(self) -> str:
        """The right answer."""
        return self.options[self.answer]

    @property
    def is_free_text(self) -> bool:
        """Whether there is nothing to choose from."""
        return len(self.options) == 1

    def as_free_text(self) -> Example:
        """The same question without options."""
        return Example(self.prompt, (self.text,), 0)


@dataclass(frozen=True)
class Template:
    """How question and option become text.

    Attributes:
        suffix: Follows the question.
        separator: Stands before each option's text.
    """

    suffix: str = "\nAnswer:"
    separator: str = " "

    def prompt(self, text: str) -> str:
        """Returns the text that precedes an answer."""
        return text.rstrip() + self.suffix

    def option(self, text: str) -> str:
        """Returns the text of one answer, to be tokenized on its own and appended."""
        return self.separator + text.strip()


def check_one_kind(examples: Sequence[Example]) -> None:
    """Checks that a task's examples have options, or are free text, all of them.

    Raises:
        InvalidExamples: Some are, some not.
    """
    kinds = [example.is_free_text for example in examples]
    if len(set(kinds)) > 1:
        other = kinds.index(not kinds[0])
        have, lack = (0, other) if kinds[other] else (other, 0)
        raise InvalidExamples(
            f"examples[{have}] has options and examples[{lack}] has none; give all of them options, or none",
            field=f"examples[{other}].options",
        )


def check_options(options: Sequence[str]) -> None:
    """Checks that a question can be asked with these options.

    Raises:
        InvalidRequest: Fewer than two or more than ``MAX_OPTIONS`` options, or an option that is
            empty or given twice.
    """
    if not 2 <= len(options) <= MAX_OPTIONS:
        raise InvalidRequest(
            f"options has {len(options)} entries; give between 2 and {MAX_OPTIONS}, or none for a free-text answer",
            field="options",
        )
    seen: set[str] = set()
    for position, option in enumerate(options):
        where, text = f"options[{position}]", option.strip()
        if not text:
            raise InvalidRequest(f"{where} is empty; every option needs a text", field=where)
        if text in seen:
            raise InvalidRequest(f"{where} repeats {text!r}; options must differ", field=where)
        seen.add(text)


def resolve_answer(answer: object, options: Sequence[str], where: str) -> int:
    """Returns the index of ``answer`` in ``options``, given as an index or as the option's text.

    Args:
        answer: Index from 0, or the option's text; anything else is refused.
        options: The question's options.
        where: Name of the field, for the message.

    Raises:
        InvalidExamples: The answer is not among the options.
    """
    if isinstance(answer, bool) or not isinstance(answer, int | str):
        raise InvalidExamples(f"{where} must be an option's text or its index, not {answer!r}", field=where)
    if isinstance(answer, int):
        if not 0 <= answer < len(options):
            raise InvalidExamples(
                f"{where} is {answer}, but there are {len(options)} options: give 0 to {len(options) - 1}",
                field=where,
            )
        return answer
    stripped = [option.strip() for option in options]
    if answer.strip() not in stripped:
        shown = ", ".join(repr(option) for option in options[:8])
        raise InvalidExamples(f"{where} is {answer!r}, which is not among the options: {shown}", field=where)
    return stripped.index(answer.strip())
