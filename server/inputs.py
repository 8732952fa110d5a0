"""Checks of what comes in: prompts and labelled examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from abmll.errors import InvalidExamples, InvalidRequest, PromptTooLong
from abmll.examples import Example, Template, check_options, resolve_answer
from abmll.scoring import tokenize
from server.schemas import MAX_EXAMPLES, ExampleIn


def check_prompt(prompt: str, field: str = "prompt") -> None:
    """Checks that a prompt says something.

    Raises:
        InvalidRequest: It is blank.
    """
    if not prompt.strip():
        raise InvalidRequest(f"{field} is empty; give a question", field=field)


def read_examples(given: Sequence[ExampleIn], tokenizer: Any, template: Template, context: int) -> list[Example]:
    """Checks labelled examples; every error names the example and the field.

    Raises:
        InvalidExamples: Too few or too many, blank, or labelled with an answer outside the options.
        PromptTooLong: One exceeds the model's context.
    """
    if not 1 <= len(given) <= MAX_EXAMPLES:
        raise InvalidExamples(f"examples has {len(given)} entries; give 1 to {MAX_EXAMPLES}", field="examples")
    examples: list[Example] = []
    for number, example in enumerate(given):
        where = f"examples[{number}]"
        try:
            check_prompt(example.prompt)
            check_options(example.options)
            tokenize(tokenizer, template, example.prompt, example.options, context)
        except PromptTooLong as error:
            raise PromptTooLong(f"{where}: {error.message}", field=f"{where}.prompt") from error
        except InvalidRequest as error:
            raise InvalidExamples(f"{where}: {error.message}", field=f"{where}.{error.field}") from error
        answer = resolve_answer(example.answer, example.options, f"{where}.answer")
        examples.append(Example(example.prompt, tuple(example.options), answer))
    return examples
