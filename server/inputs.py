"""Checks of what comes in: prompts and labelled examples."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from abmll.errors import InvalidExamples, InvalidRequest, PromptTooLong
from abmll.examples import Example, Template, check_one_kind, check_options, resolve_answer
from abmll.scoring import Question, tokenize_apart
from server.schemas import MAX_EXAMPLES
from server.task_schemas import ExampleIn

# Longer texts are tokenized beside the event loop: a tokenizer reads about a million characters a second.
_LONG = 20_000


def check_prompt(prompt: str, field: str = "prompt") -> None:
    """Checks that a prompt says something.

    Raises:
        InvalidRequest: It is blank.
    """
    if not prompt.strip():
        what = "a text" if field == "answer" else "a question"
        raise InvalidRequest(f"{field} is empty; give {what}", field=field)


async def encode(tokenizer: Any, template: Template, prompt: str, options: Sequence[str], room: int) -> Question:
    """Tokenizes a question, see ``tokenize_apart``; a long one beside the event loop."""
    if len(prompt) + sum(map(len, options)) < _LONG:
        return tokenize_apart(tokenizer, template, prompt, options, room)
    return await asyncio.to_thread(tokenize_apart, tokenizer, template, prompt, options, room)


def read_examples(given: Sequence[ExampleIn], tokenizer: Any, template: Template, context: int) -> list[Example]:
    """Checks labelled examples; every error names the example and the field.

    Raises:
        InvalidExamples: Too few or too many, blank, labelled with an answer outside the options, with options that are
            the same to the model, or some with options and some without.
        PromptTooLong: One exceeds the model's context.
    """
    if not 1 <= len(given) <= MAX_EXAMPLES:
        raise InvalidExamples(f"examples has {len(given)} entries; give 1 to {MAX_EXAMPLES}", field="examples")
    examples: list[Example] = []
    for number, example in enumerate(given):
        where, options = f"examples[{number}]", example.options or []
        try:
            check_prompt(example.prompt)
            if example.options is None:
                options = [_free_text(example)]
            else:
                check_options(options)
            # A free text needs room for its end.
            tokenize_apart(tokenizer, template, example.prompt, options, context - (example.options is None))
        except PromptTooLong as error:
            if example.options is None and error.field == "options":
                message = f"{where}: prompt and answer exceed the model's {context} tokens; shorten the answer"
                raise PromptTooLong(message, field=f"{where}.answer") from error
            raise PromptTooLong(f"{where}: {error.message}", field=f"{where}.{error.field}") from error
        except InvalidRequest as error:
            raise InvalidExamples(f"{where}: {error.message}", field=f"{where}.{error.field}") from error
        answer = 0 if example.options is None else resolve_answer(example.answer, options, f"{where}.answer")
        examples.append(Example(example.prompt, tuple(options), answer))
    check_one_kind(examples)
    return examples


def _free_text(example: ExampleIn) -> str:
    if not isinstance(example.answer, str):
        raise InvalidRequest(
            f"answer is the index {example.answer}, but there are no options; give options, or the answer's text",
            field="answer",
        )
    check_prompt(example.answer, "answer")
    return example.answer
