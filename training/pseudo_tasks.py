"""Tasks made from plain text, which widen the range of tasks that meta-training sees.

Labelled tasks are few; text is plenty. Four kinds: which word was left out of a sentence (SMLMT, Bansal
et al. 2020), which word is a sentence's theme, which book a passage is from, and whether a passage praises
or blames. None needs a label that a person gave.
"""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter, defaultdict
from pathlib import Path

from abmll.errors import AbmllError
from abmll.examples import Example
from training.base.corpus import read_books
from training.polarity import polarity_task
from training.tasks import Task

_SENTENCE = re.compile(r"(?<=[.!?])\s+")
_WORD = re.compile(r"[a-z]{4,}")
_BOOKS = 200
_RANKS = (150, 3000)


def _title(book: str, number: int) -> str:
    found = re.search(r"^Title: (.+)$", book[:500], re.MULTILINE)
    return found.group(1).strip().lower()[:40] if found else f"book {number}"


def _word_task(
    name: str,
    kind: str,
    labels: int,
    sentences: dict[str, list[str]],
    rng: random.Random,
    items: int,
) -> Task:
    """Sentences labelled with a word of theirs: marked as missing in "cloze"; there or cut in "themes"."""
    words = rng.sample(sorted(sentences), labels)
    examples: list[Example] = []
    for position, word in enumerate(words):
        for sentence in rng.sample(sentences[word], min(items // len(words), len(sentences[word]))):
            if kind == "cloze":
                text = re.sub(rf"\b{word}\b", "...", sentence, flags=re.IGNORECASE)
            elif rng.random() < 0.5:
                text = sentence
            else:
                text = " ".join(re.sub(rf"\b{word}\b", "", sentence, flags=re.IGNORECASE).split())
            examples.append(Example(text, tuple(words), position))
    rng.shuffle(examples)
    return Task(name, kind, kind, tuple(examples), fixed_labels=True)


def _passages(name: str, books: list[tuple[str, str]], rng: random.Random, items: int) -> Task:
    chosen = rng.sample(books, rng.randint(2, 4))
    titles = tuple(title for title, _ in chosen)
    examples: list[Example] = []
    for position, (_, text) in enumerate(chosen):
        for _ in range(items // len(chosen)):
            start = rng.randrange(2_000, len(text) - 1_000)
            passage = text[start : start + rng.randint(100, 450)]
            examples.append(Example(" ".join(passage.split()[1:-1]), titles, position))
    rng.shuffle(examples)
    return Task(name, "passages", "passages", tuple(examples), fixed_labels=True)


def pseudo_tasks(folder: Path, count: int, seed: int, *, items: int = 80) -> list[Task]:
    """Makes tasks from book shards.

    Args:
        folder: The shards, as ``read_books`` takes them.
        count: Number of tasks of each of the four kinds.
        seed: The same seed and books give the same tasks.
        items: Items of a task, about; twice as many for themes, four times where passages praise or blame.

    Raises:
        AbmllError: The books are too few or too short.
    """
    rng = random.Random(seed)
    books: list[tuple[str, str]] = []
    counts: Counter[str] = Counter()
    sentences: list[str] = []
    for number, book in enumerate(itertools.islice(read_books(folder), _BOOKS)):
        if len(book) < 20_000:
            continue
        books.append((_title(book, number), book))
        part = " ".join(book[5_000:45_000].split())
        sentences += [sentence for sentence in _SENTENCE.split(part) if 50 <= len(sentence) <= 220]
    for sentence in sentences:
        counts.update(set(_WORD.findall(sentence.lower())))
    ranked = [word for word, _ in counts.most_common(_RANKS[1])][_RANKS[0] :]
    wanted = set(ranked)
    by_word: defaultdict[str, list[str]] = defaultdict(list)
    for sentence in sentences:
        for word in wanted.intersection(_WORD.findall(sentence.lower())):
            by_word[word].append(sentence)
    usable = {word: found for word, found in by_word.items() if len(found) >= 20}
    unique = list({title: (title, text) for title, text in books}.values())
    if len(unique) < 4 or len(usable) < 5:
        raise AbmllError(
            f"{folder} has {len(unique)} books of 20,000 characters and {len(usable)} words in 20 of their sentences; "
            "pseudo-tasks need at least 4 such books and 5 such words: give more books",
            field="books",
        )
    tasks = [_word_task(f"cloze_{n:03d}", "cloze", rng.randint(2, 5), usable, rng, items) for n in range(count)]
    tasks += [_passages(f"passages_{n:03d}", unique, rng, items) for n in range(count)]
    texts = [text for _, text in unique]
    tasks += [polarity_task(n, texts, rng, 4 * items) for n in range(count)]
    most = min(10, len(usable))
    for n in range(count):
        tasks.append(_word_task(f"themes_{n:03d}", "themes", rng.randint(2, most), usable, rng, 2 * items))
    return tasks
