"""The small base model's tokenizer: byte-level BPE, trained on the corpus it will read."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from abmll.examples import Template
from training.base.corpus import read_books, task_document
from training.tasks import Task

END = "<|end|>"


def tokenizer_texts(books: Path, tasks: Sequence[Task], template: Template, *, book_limit: int) -> Iterator[str]:
    """Yields the texts that the vocabulary is made from: part of each book and the tasks, thrice.

    The tasks' weight makes room in the vocabulary for today's words, which old books lack.
    """
    for book in itertools.islice(read_books(books), book_limit):
        yield book[2_000:42_000]
    rng = random.Random(0)
    for _ in range(3):
        for task in tasks:
            yield task_document(task, template, rng, items=len(task.examples), permute=False)


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Trains a byte-level BPE tokenizer.

    Text is lower-cased: in a model this small, one embedding for a word whatever its case leaves more
    data for each. Every word is read with a space before it, for the same reason.

    Args:
        texts: Documents.
        vocabulary: Number of entries.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=3,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def as_transformers(tokenizer: Tokenizer, context: int) -> PreTrainedTokenizerFast:
    """Wraps a tokenizer in the class that transformers and vLLM load; text gets the end token before it."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
