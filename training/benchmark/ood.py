"""Questions that a task's posterior was not made for: does epistemic uncertainty know?"""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from dataclasses import replace

from abmll.examples import Example
from training.tasks import Task


def nonsense(query: Sequence[Example], rng: random.Random) -> list[Example]:
    """Returns as many questions with the same options whose words are random letters, as long as they were."""

    def scramble(word: str) -> str:
        return "".join(rng.choice(string.ascii_lowercase) for _ in word)

    return [replace(e, prompt=" ".join(scramble(word) for word in e.prompt.split())) for e in query]


def foreign(query: Sequence[Example], task: Task, others: Sequence[Task], rng: random.Random) -> list[Example]:
    """Returns as many questions with the same options whose texts are from tasks of other categories.

    Args:
        query: Questions of the task.
        task: The task.
        others: Where to take texts from; tasks of its family or category are passed over.
        rng: Chooses.

    Returns:
        The questions; none where all other tasks are of its kind.
    """
    far = [other for other in others if other.family != task.family and other.category != task.category]
    if not far:
        return []
    return [replace(e, prompt=rng.choice(rng.choice(far).examples).prompt) for e in query]
