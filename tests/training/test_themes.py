from __future__ import annotations

import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from abmll.examples import Template
from training.base.corpus import read_books
from training.base.pretrain import KINDS, PretrainConfig, Rows
from training.base.themes import IGNORED, Themes
from training.base.tokenizer import train_tokenizer
from training.polarity import label_names


@pytest.fixture(scope="module")
def tokenizer(books: Path) -> Tokenizer:
    return train_tokenizer(list(read_books(books)), 600)


@pytest.fixture(scope="module")
def tokens(books: Path, tokenizer: Tokenizer) -> np.ndarray:
    texts = tokenizer.encode_batch(list(read_books(books)), add_special_tokens=False)
    return np.concatenate([np.asarray(text.ids, dtype=np.uint16) for text in texts])


def test_themes_are_whole_words_of_the_passage_or_cut_from_it(tokenizer: Tokenizer, tokens: np.ndarray) -> None:
    themes = Themes(tokenizer, tokens, [], 3)
    rng = random.Random(0)
    drawn = [themes.draw(rng, from_texts=False) for _ in range(300)]
    found = [passage for passage in drawn if passage.themes]
    assert len(found) > 50
    kept = 0
    for passage in found:
        assert len(set(passage.themes)) == len(passage.themes) <= 3
        assert all(tokenizer.decode([token])[1:].isalpha() for token in passage.themes)
        inside = [token in passage.ids for token in passage.themes]
        assert all(inside) or not any(inside)
        kept += all(inside)
    assert 0.3 < kept / len(found) < 0.7


def test_texts_are_drawn_whole_or_cut_at_the_longest(tokenizer: Tokenizer, tokens: np.ndarray) -> None:
    texts = [tokens[:20].tolist(), tokens[100:400].tolist()]
    themes = Themes(tokenizer, tokens, texts, 2)
    rng = random.Random(1)
    starts = {tuple(themes.draw(rng, from_texts=True).ids[:1]) for _ in range(40)}
    assert starts <= {tuple(text[i : i + 1]) for text in texts for i in range(4)}


def test_a_row_of_themes_has_its_answers_after_the_template(
    tokenizer: Tokenizer, tokens: np.ndarray, books: Path
) -> None:
    config = PretrainConfig(row_tokens=128, batch_rows=3, task_share=0.0, theme_share=1.0, theme_words=4)
    ids, is_answer, kind, others = next(iter(Rows(config, tokenizer, tokens, [], Template(), books)))
    assert ids.shape == is_answer.shape == (3, 129)
    assert others.shape == (3, 129, 3)
    assert kind.tolist() == [KINDS.index("themes")] * 3
    suffix = tokenizer.encode("\nAnswer:", add_special_tokens=False).ids
    places = is_answer.nonzero().tolist()
    assert places
    for row, place in places:
        assert ids[row, place - len(suffix) : place].tolist() == suffix
    assert bool((others[~is_answer] == IGNORED).all())
    assert bool((others[is_answer] != IGNORED).any())
    assert not (others == ids[..., None])[is_answer].any()
    assert torch.equal(ids, next(iter(Rows(config, tokenizer, tokens, [], Template(), books)))[0])


def test_a_token_that_a_word_goes_on_from_is_no_theme(tokenizer: Tokenizer, tokens: np.ndarray) -> None:
    rng = random.Random(2)
    themes = Themes(tokenizer, tokens, [], 9)
    found = {word for _ in range(300) for word in themes.draw(rng, from_texts=False).themes}
    word = min(found, key=tokens.tolist().count)  # a rare one stays rare with the text's own counts
    letter = tokenizer.encode("q", add_special_tokens=False).ids[0]
    for text, expected in (([word] * 3, [word]), ([word, letter] * 3, [])):
        assert Themes(tokenizer, tokens, [text], 1).draw(rng, from_texts=True).themes == expected


def test_a_row_of_polarity_names_its_labels_the_same_throughout(
    tokenizer: Tokenizer, tokens: np.ndarray, books: Path
) -> None:
    config = PretrainConfig(row_tokens=800, batch_rows=3, task_share=0.0, polarity_share=1.0)
    ids, is_answer, kind, others = next(iter(Rows(config, tokenizer, tokens, [], Template(), books)))
    assert kind.tolist() == [KINDS.index("polarity")] * 3
    assert bool((others == IGNORED).all())
    for row, answers in zip(ids, is_answer, strict=True):
        text = tokenizer.decode(row.tolist())
        given = re.findall(r"answer: ([a-z ]+)\n", text.lower())
        assert given
        assert any(set(given) <= set(label_names(number)) for number in range(8))
        assert answers.sum() >= len(given)
