"""Cross-validation within a support set: what is held out in turn, so that it can be scored by what did not see it."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from abmll.calibration import HeldOut

FOLDS = 4


def folds_of(support: int) -> int:
    """Number of folds for a support set; 0 where it is too small to leave something out."""
    return 0 if support < 2 else min(FOLDS, support)


def folds(questions: Sequence[Hashable], seed: int) -> list[tuple[list[int], list[int]]]:
    """Splits a support set into folds, each to be held out once.

    Examples that ask the same are in the same fold: where one is held out, its twins must not be learnt from.

    Args:
        questions: What each example asks.
        seed: Of the shuffling: users list labels in turn, and unshuffled, a fold could hold all of one label.

    Returns:
        For each fold the places to learn from, and those held out; none for fewer than two different questions.
    """
    groups: dict[Hashable, list[int]] = {}
    for place, question in enumerate(questions):
        groups.setdefault(question, []).append(place)
    shuffled = list(groups.values())
    random.Random(seed).shuffle(shuffled)
    count = folds_of(len(shuffled))
    parts = [shuffled[fold::count] for fold in range(count)]
    found: list[tuple[list[int], list[int]]] = []
    for part in parts:
        rest = [group for group in shuffled if group not in part]
        found.append(([place for group in rest for place in group], [place for group in part for place in group]))
    return found


def held_out(
    questions: Sequence[Hashable], answers: Sequence[int], seed: int, score: Callable[[list[int], list[int]], Tensor]
) -> HeldOut | None:
    """Scores each example by what has learnt from the other folds (cross-validation).

    Args:
        questions: What each example asks.
        answers: The right option of each.
        seed: Of ``folds``.
        score: Given the places to learn from and those held out, scores these: shape (draws, held out, options).

    Returns:
        Option scores (draws, n, options) in nats and answers (n,); None for fewer than two different questions.
    """
    parts = [(left_out, score(rest, left_out)) for rest, left_out in folds(questions, seed)]
    if not parts:
        return None
    first, width = parts[0][1], max(part.shape[-1] for _, part in parts)
    scores = torch.full((len(first), len(questions), width), float("-inf"), dtype=first.dtype)
    for left_out, part in parts:
        scores[:, left_out, : part.shape[-1]] = part
    return scores, torch.tensor(answers)
