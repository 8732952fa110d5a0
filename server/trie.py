"""Next-token questions that together give the exact log-probabilities of answer texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from abmll.scoring import Question

# vLLM returns the log-probabilities of at most this many chosen tokens a request.
MAX_TOKENS = 128


@dataclass(frozen=True)
class Step:
    """One next-token question.

    Attributes:
        before: Tokens that stand between the prompt and the token asked for.
        tokens: The tokens whose log-probabilities are wanted there.
    """

    before: tuple[int, ...]
    tokens: tuple[int, ...]


def option_steps(question: Question) -> list[Step]:
    """Returns the inner nodes of the trie of a question's options, shared beginnings asked once.

    Options of one token each need a single step; the steps of longer ones share the prompt's cache.
    """
    following: dict[tuple[int, ...], dict[int, None]] = {}
    for option in question.options:
        for at, token in enumerate(option):
            following.setdefault(option[:at], {})[token] = None
    steps: list[Step] = []
    for before, tokens in following.items():
        given = tuple(tokens)
        steps += [Step(before, given[i : i + MAX_TOKENS]) for i in range(0, len(given), MAX_TOKENS)]
    return steps


def token_steps(tokens: Sequence[int]) -> list[Step]:
    """Returns one step for each token of a given text."""
    given = tuple(tokens)
    return [Step(given[:at], (token,)) for at, token in enumerate(given)]
