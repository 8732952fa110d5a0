"""A text's tokens as replies tell them, with the embedded model's tokenizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from abmll.decoding import StopStrings, until_end
from abmll.sequences import TokenScores
from server.texts import pieces, tell_tokens, until_stop
from training.embedded import resolve


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(resolve(None))


def encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("text", ["a plain answer", "naïve 日本 😀!", "x\n\n  y", "🦜"])
def test_pieces_together_are_the_text_and_a_characters_last_token_has_it(tokenizer: Any, text: str) -> None:
    tokens = encode(tokenizer, text)
    found = pieces(tokenizer, tokens)
    assert len(found) == len(tokens)
    assert "".join(found) == tokenizer.decode(tokens)
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(found)


def test_the_end_of_a_text_has_no_piece(tokenizer: Any) -> None:
    assert pieces(tokenizer, [*encode(tokenizer, "yes"), tokenizer.eos_token_id])[-1] == ""
    assert pieces(tokenizer, []) == []


def test_a_text_is_cut_before_the_first_of_its_stop_strings(tokenizer: Any) -> None:
    tokens = encode(tokenizer, "first line\nsecond. line")
    cut, text, stopped = until_stop(tokenizer, tokens, [". l", "\nsec"])
    assert (text, stopped) == ("first line", True)
    assert tokens[: len(cut)] == cut
    assert "\nsec" in tokenizer.decode(cut)
    assert "\nsec" not in tokenizer.decode(cut[:-1])
    assert until_stop(tokenizer, tokens, ["never"]) == (tokens, "first line\nsecond. line", False)
    assert until_stop(tokenizer, tokens, []) == (tokens, "first line\nsecond. line", False)


def test_decoding_stops_by_the_new_text_and_not_by_the_prompts(tokenizer: Any) -> None:
    prompt, new = encode(tokenizer, "say: yes"), encode(tokenizer, " no way")
    stop = StopStrings(tokenizer, ["yes", "s no"], len(prompt))
    assert stop(torch.tensor([[*prompt, *new]]), None).tolist() == [False]
    other = encode(tokenizer, " oh yes")
    assert stop(torch.tensor([[*prompt, *other]]), None).tolist() == [True]


def test_tokens_after_the_end_are_dropped() -> None:
    assert until_end([5, 6, 2, 0, 0], [2]) == [5, 6]
    assert until_end([5, 6], [2]) == [5, 6]


def test_the_likeliest_tokens_are_told_likeliest_first(tokenizer: Any) -> None:
    yes, no = encode(tokenizer, " yes")[0], encode(tokenizer, " no")[0]
    scores = TokenScores(
        torch.tensor([no]), torch.tensor([[0.2]]).log(), torch.tensor([[no, yes]]), torch.tensor([[[0.2, 0.7]]]).log()
    )
    (told,) = tell_tokens(tokenizer, scores)
    assert (told.text, told.probability) == (tokenizer.decode([no]), pytest.approx(0.2))
    assert [other.text for other in told.likeliest] == [tokenizer.decode([yes]), tokenizer.decode([no])]
    assert [other.probability for other in told.likeliest] == pytest.approx([0.7, 0.2])
