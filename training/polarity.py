"""Passages of books labelled by the balance of their evaluative words: sentiment without a person's labels.

The word lists are ours and short; they were written once and not fitted to any task. A model that can
tell praise from blame in old prose knows enough to start from on reviews.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from abmll.errors import AbmllError
from abmll.examples import Example
from training.tasks import Task

PRAISE = frozenset(
    """good great best better excellent wonderful beautiful charming delightful admirable brilliant perfect lovely
    splendid magnificent superb enjoyed enjoy enjoyable pleasant pleasing pleasure happy love loved fine favourite
    favorite amusing clever fun funny fascinating interesting remarkable masterly masterpiece touching moving
    impressive strong fresh genuine true noble graceful exquisite finest greatest success successful worthy triumph
    gem recommend praise praised admired pleased laugh laughed glad joy thrilling exciting sweet gentle kind natural
    original satisfying powerful""".split()
)
BLAME = frozenset(
    """bad worst worse terrible awful horrible dreadful dull tedious boring tiresome wearisome stupid silly foolish
    absurd ridiculous poor poorly weak waste wasted failed fails failure miserable wretched ugly disgusting hideous
    vile nonsense disappointing disappointed disappointment hate hated annoying unpleasant clumsy awkward false fake
    pointless useless worthless hopeless meaningless mediocre trash rubbish mess shame shameful painful ruined spoiled
    lame cheap unfortunately sadly lacking lacks lack nothing sick insult offensive contemptible monotonous dreary
    stale sorry bore bored unbearable pathetic badly wrong""".split()
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
_WORD = re.compile(r"[a-z]+")
_MASKED, _SWAPPED = 0.2, 0.4
_TRIES = 200


def balance(text: str) -> int | None:
    """Returns 1 for a text that praises, 0 for one that blames, None where the words do not tell."""
    words = _WORD.findall(text.lower())
    praise, blame = sum(word in PRAISE for word in words), sum(word in BLAME for word in words)
    high, low = max(praise, blame), min(praise, blame)
    return None if high < 2 * low + 1 else int(praise > blame)


def _replace(passage: str, praise: Sequence[str], blame: Sequence[str], rng: random.Random) -> str:
    """Replaces each listed word by one of ``praise`` or ``blame``, as it was."""

    def other(match: re.Match[str]) -> str:
        word = match.group().lower()
        return rng.choice(praise) if word in PRAISE else rng.choice(blame) if word in BLAME else match.group()

    return re.sub(r"[A-Za-z]+", other, passage)


def polarity_task(number: int, books: Sequence[str], rng: random.Random, items: int) -> Task:
    """Makes a task of passages, half of them praise and half blame.

    Args:
        number: Of the task, which names it and chooses the names of its labels.
        books: Texts of at least 20,000 characters.
        rng: Chooses the passages.
        items: Items of the task.

    Raises:
        AbmllError: The books hardly praise or hardly blame.
    """
    options = _NAMES[number % len(_NAMES)]
    praise, blame = sorted(PRAISE), sorted(BLAME)
    wanted = [items // 2, items // 2]
    examples: list[Example] = []
    for _ in range(_TRIES * items):
        if not sum(wanted):
            break
        book = rng.choice(books)
        start = rng.randrange(2_000, len(book) - 1_500)
        passage = " ".join(book[start : start + rng.randint(60, 700)].split()[1:-1])
        label = balance(passage)
        if label is None or not wanted[label]:
            continue
        wanted[label] -= 1
        chance = rng.random()
        if chance < _MASKED:
            # Some must be told by the words around: the lists are short, the words of praise are many.
            passage = _replace(passage, ("...",), ("...",), rng)
        elif chance < _MASKED + _SWAPPED:
            # Words that today's reviews use are rare in old books; swapped in, each listed word is met often.
            passage = _replace(passage, praise, blame, rng)
        examples.append(Example(passage, options, label))
    if sum(wanted):
        raise AbmllError("the books have too few passages that praise or blame; give more books", field="books")
    rng.shuffle(examples)
    return Task(f"polarity_{number:03d}", "polarity", "polarity", tuple(examples), fixed_labels=True)
