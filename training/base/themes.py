"""Passages asked for their theme: an endless exercise that teaches a small model what words belong together.

Topics are told apart by what words go with what names. A passage is given, perhaps with some of its content
words cut out, and those words are the right answers at the place where a label would stand: the skip-gram
objective (Mikolov et al. 2013) through the model itself, in the form in which it is asked later.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

IGNORED = -100

_CONTENT = re.compile(r" [a-z]{3,}")
_FREQUENT = 150
_CUT = 0.5
_LENGTHS = (10, 80)


@dataclass(frozen=True)
class Passage:
    """Token ids of a passage, and its content words in random order, rare ones more likely first."""

    ids: list[int]
    themes: list[int]


class Themes:
    """Draws passages with their content words from books and from task texts.

    Args:
        tokenizer: The model's tokenizer; a content word is one token of it.
        books: Token ids of the books, shape (tokens,).
        texts: Token ids of other texts, each drawn whole.
        most: Content words of a passage, at most.
    """

    def __init__(self, tokenizer: Tokenizer, books: np.ndarray, texts: Sequence[Sequence[int]], most: int) -> None:
        size = tokenizer.get_vocab_size()
        counts = np.bincount(books[:: max(1, len(books) // 5_000_000)], minlength=size).astype(float)
        for text in texts:
            np.add.at(counts, np.asarray(text, dtype=np.int64), 1.0)
        written = [tokenizer.decode([token]) for token in range(size)]
        content = np.array([_CONTENT.fullmatch(text) is not None for text in written])
        content[np.argsort(-counts)[:_FREQUENT]] = False
        # A token that goes on with letters begins a longer word.
        self._goes_on = np.array([text[:1].isalpha() for text in written])
        self._weight = np.where(content, 1.0 / np.sqrt(counts + 1.0), 0.0)
        self._books, self._texts, self._most = books, [text for text in texts if len(text) > 2], most

    def draw(self, rng: random.Random, from_texts: bool) -> Passage:
        """Draws a passage, from the books or from the texts; one without content words has no theme."""
        if from_texts and self._texts:
            ids = np.asarray(rng.choice(self._texts)[: _LENGTHS[1]], dtype=np.int64)
        else:
            length = rng.randint(*_LENGTHS)
            start = rng.randrange(len(self._books) - length)
            ids = self._books[start : start + length].astype(np.int64)
        whole = np.append(~self._goes_on[ids[1:]], True)
        weight = self._weight[ids] * whole
        # The largest exponential races: a weighted sample without repetition (Efraimidis and Spirakis 2006).
        races = [(-rng.expovariate(1.0) / w, int(token)) for w, token in zip(weight, ids, strict=True) if w > 0]
        themes = list(dict.fromkeys(token for _, token in sorted(races, reverse=True)))[: self._most]
        if rng.random() < _CUT:
            cut = set(themes)
            return Passage([int(token) for token in ids if int(token) not in cut], themes)
        return Passage([int(token) for token in ids], themes)
