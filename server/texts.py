"""A text's tokens, each with its predictive probability and its part of the doubt, as replies tell them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from abmll.sequences import TokenScores, token_predictive
from server.schemas import OtherToken, TokenReply, Uncertainty

# Entropies are of so many of the likeliest tokens, and the rest as one.
LIKELY = 64
# A reply shows so many of them.
_SHOWN = 5


def tell_tokens(tokenizer: Any, scores: TokenScores) -> list[TokenReply]:
    """Tells a text's tokens; those of special meaning, such as the end of the text, have no text.

    Args:
        tokenizer: The base model's.
        scores: Of the text.
    """
    result = token_predictive(scores)
    texts = pieces(tokenizer, scores.tokens.tolist())
    shown = result.others.topk(min(_SHOWN, result.others.shape[-1]), dim=-1)
    ids = scores.others.gather(-1, shown.indices).tolist()
    return [
        TokenReply(
            text=text,
            probability=result.probability[at].item(),
            uncertainty=Uncertainty(
                total=result.total[at].item(),
                aleatoric=result.aleatoric[at].item(),
                epistemic=result.epistemic[at].item(),
            ),
            likeliest=[
                OtherToken(text=_one(tokenizer, other), probability=probability)
                for other, probability in zip(ids[at], shown.values[at].tolist(), strict=True)
            ],
        )
        for at, text in enumerate(texts)
    ]


def pieces(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """Splits a text into its tokens' parts, which together are the text; a character of several has its last's place.

    Args:
        tokenizer: The base model's.
        tokens: Token ids of the text.
    """
    found: list[str] = []
    told = ""
    for stop in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:stop], skip_special_tokens=True)
        unfinished = stop < len(tokens) and text.endswith("\N{REPLACEMENT CHARACTER}")
        found.append("" if unfinished else text[len(told) :])
        told = told if unfinished else text
    return found


def until_stop(tokenizer: Any, tokens: Sequence[int], stop: Sequence[str]) -> tuple[list[int], str, bool]:
    """Cuts a decoded text at the first of several stop strings.

    Args:
        tokenizer: The base model's.
        tokens: Of the text.
        stop: The strings; perhaps none.

    Returns:
        The tokens up to the one that ends the stop string, the text before it, and whether there was one.
    """
    whole = tokenizer.decode(tokens, skip_special_tokens=True)
    if any(string in whole for string in stop):  # else it would be decoded once for each of its tokens
        for count in range(1, len(tokens) + 1):
            text = tokenizer.decode(tokens[:count], skip_special_tokens=True)
            places = [place for string in stop if (place := text.find(string)) >= 0]
            if places:
                return list(tokens[:count]), text[: min(places)], True
    return list(tokens), whole, False


def _one(tokenizer: Any, token: int) -> str:
    return tokenizer.decode([token], skip_special_tokens=False)
