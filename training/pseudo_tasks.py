"""Tasks made from plain text and from other tasks, which widen the range of tasks that meta-training sees.

Labelled tasks are few; text is plenty. Four kinds from books: which word was left out of a sentence (SMLMT, Bansal
et al. 2020), which word is a sentence's theme, which book a passage is from, and whether a passage praises
or blames. One from a family of tasks: which of them an item is from. None needs a label that a person gave.
"""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from abmll.errors import AbmllError
from abmll.examples import Example
from training.base.corpus import read_books
from training.polarity import Polarity, polarity_task
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


def _told_apart(tasks: Sequence[Task]) -> list[Task]:
    """Keeps tasks whose prompts are their own; where all items ask the same, nothing tells which task asks."""
    return [task for task in tasks if len({e.prompt for e in task.examples}) > 0.9 * len(task.examples)]


def kind_tasks(tasks: Sequence[Task], count: int, seed: int, *, items: int = 160) -> list[Task]:
    """Makes tasks that ask which task of its family an item is from: the subject of a question, the field of a request.

    Args:
        tasks: Tasks of any families; those with at least three tasks of one category serve.
        count: Number of tasks to make; fewer families than that give each several.
        seed: The same seed and tasks give the same result.
        items: Items of a task, about.

    Returns:
        Tasks of the family ``<family>_kinds`` each; none where no family has three.
    """
    rng = random.Random(seed)
    groups: defaultdict[tuple[str, str], list[Task]] = defaultdict(list)
    for task in _told_apart(tasks):
        groups[task.family, task.category].append(task)
    usable = [(family, group) for (family, _), group in sorted(groups.items()) if len(group) >= 3]
    made: list[Task] = []
    for number in range(count if usable else 0):
        family, group = usable[number % len(usable)]
        chosen = rng.sample(group, rng.randint(2, min(10, len(group))))
        names = tuple(task.name.removeprefix(f"{family}_").replace("_", " ") for task in chosen)
        examples = [
            Example(example.prompt, names, position)
            for position, task in enumerate(chosen)
            for example in rng.sample(task.examples, min(len(task.examples), items // len(chosen)))
        ]
        rng.shuffle(examples)
        kind = f"{family}_kinds"
        made.append(Task(f"{kind}_{number:03d}", kind, "topic", tuple(examples), fixed_labels=True))
    return made


def long_books(folder: Path) -> list[tuple[str, str]]:
    """Returns titles and texts of the first books of a folder's shards, those of at least 20,000 characters."""
    first = enumerate(itertools.islice(read_books(folder), _BOOKS))
    return [(_title(book, number), book) for number, book in first if len(book) >= 20_000]


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
    books = long_books(folder)
    counts: Counter[str] = Counter()
    sentences: list[str] = []
    for _, book in books:
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
    polarity = Polarity([text for _, text in unique])
    tasks += [polarity_task(n, polarity, rng, 4 * items) for n in range(count)]
    most = min(10, len(usable))
    for n in range(count):
        tasks.append(_word_task(f"themes_{n:03d}", "themes", rng.randint(2, most), usable, rng, 2 * items))
    return tasks
