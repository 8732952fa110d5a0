"""Uncertainty over what free-text answers mean, not over how they are worded (semantic entropy)."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

import torch
from torch import Tensor

from abmll.predictive import Predictive, predictive

_ARTICLES = {"a", "an", "the"}
# Before a digit a point or a minus is part of a number. Relations and operations are what an answer says, and so are
# the marks that vowels are written with in many scripts, and the joiners between letters.
_MARK = re.compile(r"[^\w\s](?!\d)")
_SAYS, _JOINERS = {"Mn", "Mc", "Me", "Sm"}, "\u200c\u200d"


def normalized(text: str) -> str:
    """A text without case, punctuation, English articles and spare white space (after Rajpurkar et al. 2016).

    A mark before a digit stays, as in -5 and 3.5, and what is an article alone or punctuation alone; so do signs such
    as + and <. Letters that Unicode writes in two ways are equal.
    """
    plain = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
    words = _MARK.sub(lambda mark: mark[0] if _says(mark[0]) else "", plain).split()
    return " ".join([word for word in words if word not in _ARTICLES] or words or plain.split())


def _says(mark: str) -> bool:
    return unicodedata.category(mark) in _SAYS or mark in _JOINERS


def group_meanings(texts: Sequence[str]) -> list[int]:
    """Numbers the meanings of texts in the order of their first appearance; equal once normalized is equal in meaning.

    Args:
        texts: Answers to one question.

    Returns:
        For each text the number of its meaning, from 0.
    """
    numbers: dict[str, int] = {}
    return [numbers.setdefault(normalized(text), len(numbers)) for text in texts]


def meaning_predictive(log_probs: Tensor, meanings: Sequence[int]) -> Predictive:
    """The predictive distribution over the meanings of the texts that were found, and over the rest as one more.

    A draw's p(meaning) is the sum of p(text | x, phi_s) over the meaning's texts, at least; entropies are split over
    draws as those of options are: aleatoric is within a draw, epistemic between draws. Semantic entropy (Farquhar et
    al. 2024, eq. 5) divides by the probability of all found texts instead; that makes the likeliest of a few texts look
    certain where nearly all that the model might say was not found. To take the rest as one can only lower entropies.

    Args:
        log_probs: log p(text | x, phi_s) in nats, shape (draws, texts); draws 2k and 2k + 1 are mirrored.
        meanings: Number of each text's meaning; every number from 0 to the largest occurs. No text stands twice or is
            the beginning of another.

    Returns:
        Probabilities of the meanings by their numbers, and of the rest last.
    """
    index = torch.tensor(meanings, device=log_probs.device)
    each = log_probs.double()
    of_meaning = [each[:, index == number].logsumexp(dim=1) for number in range(max(meanings) + 1)]
    rest = torch.log1p(-each.exp().sum(dim=1).clamp(max=1.0))
    return predictive(torch.stack([*of_meaning, rest], dim=1), mirrored=True)
