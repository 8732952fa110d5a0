"""Passages of books labelled as praise or blame by VADER: sentiment without a person's labels.

VADER (Hutto & Gilbert 2014) adds up the valences that people gave to 7,500 words and minds negation and emphasis.
A model that can tell praise from blame in old prose, and knows the words, has something to start from on reviews.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from abmll.errors import AbmllError
from abmll.examples import Example
from training.tasks import Task

# What reviews say and VADER's list, made for social media, lacks. Written once and not fitted to any task.
_MORE_PRAISE = (
    "masterpiece masterly captivating compelling gripping memorable must-see riveting superbly timeless touching "
    "moving exquisite polished subtle engrossing underrated unforgettable well-made genuine original"
)
_MORE_BLAME = (
    "tedious tiresome dreary monotonous clumsy mediocre predictable overrated contrived cliched forgettable "
    "unwatchable laughable wooden amateurish pretentious shallow bland trite muddled incoherent wasted"
)

_NAMES = (
    ("negative", "positive"),
    ("bad", "good"),
    ("unfavourable", "favourable"),
    ("blame", "praise"),
    ("dislike", "like"),
    ("sad", "happy"),
    ("no", "yes"),
    ("thumbs down", "thumbs up"),
)
_WORD = re.compile(r"[A-Za-z]+(?:-[a-z]+)*")
_LENGTHS = (60, 1200)
_WORDS, _MASKED, _SWAPPED = 0.15, 0.1, 0.35
_CLEAR = 1.5
_TRIES = 400


class Polarity:
    """Draws passages of books that praise or blame.

    Args:
        books: Texts of at least 20,000 characters.
    """

    def __init__(self, books: Sequence[str]) -> None:
        self._books = books
        self._analyzer = SentimentIntensityAnalyzer()
        lexicon = self._analyzer.lexicon
        lexicon.update(dict.fromkeys(_MORE_PRAISE.split(), 2.0) | dict.fromkeys(_MORE_BLAME.split(), -2.0))
        self._words = (
            sorted(word for word, valence in lexicon.items() if _WORD.fullmatch(word) and valence <= -1),
            sorted(word for word, valence in lexicon.items() if _WORD.fullmatch(word) and valence >= 1),
        )

    def balance(self, text: str) -> int | None:
        """Returns 1 for a text that praises, 0 for one that blames, None where the words do not tell."""
        scores = self._analyzer.polarity_scores(text)
        praise, blame = scores["pos"], scores["neg"]
        high, low = max(praise, blame), min(praise, blame)
        return None if high < 0.05 or high < _CLEAR * low else int(praise > blame)

    def draw(self, rng: random.Random, label: int) -> str:
        """Draws a passage of the given label.

        Raises:
            AbmllError: The books hardly praise or hardly blame.
        """
        kind = rng.random()
        if kind < _WORDS:
            return self._only_words(rng, label)
        for _ in range(_TRIES):
            book = rng.choice(self._books)
            length = round(_LENGTHS[0] * (_LENGTHS[1] / _LENGTHS[0]) ** rng.random())
            start = rng.randrange(2_000, len(book) - _LENGTHS[1] - 100)
            passage = " ".join(book[start : start + length].split()[1:-1])
            if self.balance(passage) != label:
                continue
            if kind < _WORDS + _MASKED:
                # Some must be told by the words around: no list has all words of praise.
                return self._replace(passage, lambda _: "...")
            if kind < _WORDS + _MASKED + _SWAPPED:
                # Words that today's reviews use are rare in old books; swapped in, each listed word is met often.
                return self._replace(passage, lambda sign: rng.choice(self._words[sign]))
            return passage
        raise AbmllError("the books have too few passages that praise or blame; give more books", field="books")

    def _only_words(self, rng: random.Random, label: int) -> str:
        most = rng.randint(1, 6)
        words = rng.sample(self._words[label], most) + rng.sample(self._words[1 - label], rng.randint(0, most // 3))
        rng.shuffle(words)
        return rng.choice((" ", ", ", " and ")).join(words)

    def _replace(self, passage: str, other: Callable[[int], str]) -> str:
        """Replaces each listed word by ``other`` of its sign, 1 for praise."""
        lexicon = self._analyzer.lexicon

        def put(match: re.Match[str]) -> str:
            valence = lexicon.get(match.group().lower(), 0.0)
            return other(int(valence > 0)) if abs(valence) >= 1 else match.group()

        return _WORD.sub(put, passage)


def polarity_task(number: int, polarity: Polarity, rng: random.Random, items: int) -> Task:
    """Makes a task of passages, half of them praise and half blame.

    Args:
        number: Of the task, which names it and chooses the names of its labels.
        polarity: Draws the passages.
        rng: Chooses them.
        items: Items of the task.

    Raises:
        AbmllError: The books hardly praise or hardly blame.
    """
    options = label_names(number)
    examples = [Example(polarity.draw(rng, label), options, label) for label in (0, 1) for _ in range(items // 2)]
    rng.shuffle(examples)
    return Task(f"polarity_{number:03d}", "polarity", "polarity", tuple(examples), fixed_labels=True)


def label_names(number: int) -> tuple[str, str]:
    """Returns names for blame and praise, in this order; numbers go round a list of them."""
    return _NAMES[number % len(_NAMES)]
