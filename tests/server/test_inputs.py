"""What comes in, read with the embedded model's tokenizer, which knows no capitals."""

from __future__ import annotations

import asyncio

import pytest
from transformers import AutoTokenizer

from abmll.errors import InvalidExamples, InvalidRequest
from abmll.examples import Template
from server.inputs import encode, read_examples
from server.task_schemas import ExampleIn
from training.embedded import resolve

TOKENIZER = AutoTokenizer.from_pretrained(resolve(None))


@pytest.mark.parametrize("prompt", ["which country", "which country " * 2000])
def test_options_that_are_the_same_to_the_model_are_refused(prompt: str) -> None:
    with pytest.raises(InvalidRequest, match=r"options\[2\] 'us' is the same to the model as 'US'") as refused:
        asyncio.run(encode(TOKENIZER, Template(), prompt, ["US", "UK", "us"], 10**6))
    assert refused.value.field == "options[2]"
    assert len(asyncio.run(encode(TOKENIZER, Template(), prompt, ["US", "UK"], 10**6)).options) == 2


def test_examples_whose_options_are_the_same_to_the_model_are_refused() -> None:
    good = ExampleIn(prompt="which country", options=["US", "UK"], answer="UK")
    bad = good.model_copy(update={"options": ["US", "us"], "answer": "US"})
    with pytest.raises(InvalidExamples, match=r"examples\[1\]: options\[1\] 'us' is the same") as refused:
        read_examples([good, bad], TOKENIZER, Template(), 512)
    assert refused.value.field == "examples[1].options[1]"
    assert read_examples([good], TOKENIZER, Template(), 512)[0].answer == 1
