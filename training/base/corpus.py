"""The text that the small base model learns from: books, and the training families' own items."""

from __future__ import annotations

import hashlib
import json
import lzma
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from abmll.errors import AbmllError
from abmll.examples import Example, Template
from training.episodes import keep_items
from training.splits import Split
from training.tasks import Task

BOOK_MARK = "<|book|>"


def read_books(folder: Path) -> Iterator[str]:
    """Yields the books of a folder of xz shards (``*.txt.xz``, books parted by a line ``<|book|>``).

    Raises:
        AbmllError: The folder has no shard.
    """
    shards = sorted(folder.glob("*.txt.xz"))
    if not shards:
        raise AbmllError(f"{folder} holds no *.txt.xz shard of books", field="books")
    for shard in shards:
        with lzma.open(shard, "rt", encoding="utf-8") as stream:
            lines: list[str] = []
            for line in stream:
                if line.strip() == BOOK_MARK:
                    yield "".join(lines)
                    lines = []
                else:
                    lines.append(line)
            if lines:
                yield "".join(lines)


def in_pretraining(task: Task, example: Example) -> bool:
    """Whether an item belongs to the half of its task that pre-training may see with its answer.

    The other half is kept for meta-training, so that its likelihoods are those of text not yet seen.
    """
    key = "\x00".join([task.name, example.prompt, *example.options]).encode()
    return hashlib.sha256(key).digest()[0] % 2 == 0


def unseen_items(model: Path, tasks: Sequence[Task]) -> list[Task]:
    """Returns tasks without the items that a model made by ``abmll pretrain`` saw with their answers.

    Args:
        model: The model's folder; for any other model the tasks are returned as they are.
        tasks: Training tasks.
    """
    record = model / "training.json"
    if not record.is_file():
        return list(tasks)
    seen = set(json.loads(record.read_text(encoding="utf-8")).get("tasks", []))
    return keep_items(tasks, lambda task, example: task.name not in seen or not in_pretraining(task, example))


def pretraining_tasks(tasks: Sequence[Task], split: Split) -> list[Task]:
    """Returns the tasks whose text may be pre-trained on: training families, BIG-bench's excluded.

    BIG-bench and BIG-bench Hard ask not to be part of any pre-training corpus.
    """
    return [task for task in split.select(tasks, "train") if not task.name.startswith(("bbh_", "bigbench_"))]


def task_items(task: Task, template: Template, rng: random.Random, items: int, permute: bool) -> list[tuple[str, str]]:
    """Returns several items of one task as the model reads them: prompt, and right answer with a line's end.

    Args:
        task: The task.
        template: The text format.
        rng: Chooses the items and the permutation.
        items: How many items.
        permute: Whether the labels of a fixed-label task change their meaning for this document, so
            that the answer must be read off the preceding items.
    """
    chosen = list(task.examples)
    rng.shuffle(chosen)
    options = list(chosen[0].options)
    if permute and task.fixed_labels:
        rng.shuffle(options)
    texts: list[tuple[str, str]] = []
    for example in chosen[:items]:
        names = options if task.fixed_labels else example.options
        texts.append((template.prompt(example.prompt), template.option(names[example.answer]) + "\n"))
    return texts


def task_document(task: Task, template: Template, rng: random.Random, items: int, permute: bool) -> str:
    """Returns several items of one task in a row, as ``task_items``."""
    return "".join(prompt + answer for prompt, answer in task_items(task, template, rng, items, permute))


def encode_books(folder: Path, tokenizer: Tokenizer, cache: Path, limit: int | None = None) -> np.ndarray:
    """Tokenizes all books into one array, kept in ``cache`` for the next time.

    Args:
        folder: The book shards.
        tokenizer: The model's tokenizer.
        cache: An ``.npy`` file; its name should change with the tokenizer.
        limit: At most this many books.

    Returns:
        Token ids, shape (tokens,), uint16; every book starts with the end-of-text token.
    """
    if cache.is_file():
        return np.load(cache, mmap_mode="r")
    end = tokenizer.token_to_id("<|end|>")
    pieces: list[np.ndarray] = []
    for number, book in enumerate(read_books(folder)):
        if limit is not None and number >= limit:
            break
        paragraphs = [book[start : start + 20_000] for start in range(0, len(book), 20_000)]
        ids = [end]
        for encoding in tokenizer.encode_batch(paragraphs, add_special_tokens=False):
            ids.extend(encoding.ids)
        pieces.append(np.asarray(ids, dtype=np.uint16))
    tokens = np.concatenate(pieces)
    cache.parent.mkdir(parents=True, exist_ok=True)
    partial = cache.with_name(cache.name + ".partial")
    with partial.open("wb") as stream:
        np.save(stream, tokens)
    partial.replace(cache)
    return tokens


def corpus_digest(books: Path, tasks: Sequence[Task]) -> str:
    """Returns a short hash of what a corpus consists of, to tell caches apart."""
    names = [f"{shard.name}:{shard.stat().st_size}" for shard in sorted(books.glob("*.txt.xz"))]
    names += [f"{task.name}:{len(task.examples)}" for task in tasks]
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()[:12]
