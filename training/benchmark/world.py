"""A generated world of tasks whose exact Bayes predictive is known (DESIGN section 3).

A question describes one of 256 scenes by four words, one for each attribute. A task is a hidden rule that says
which scenes are "yes"; answers are wrong with a known probability. Rules come from a finite, weighted set: those
that look at one attribute, and conjunctions of two and their complements. The predictive given labelled examples
is the vote of all rules, weighted by prior and likelihood: what no learner can better on average.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from abmll.examples import Example
from abmll.predictive import entropy
from training.tasks import Task

ATTRIBUTES: tuple[tuple[str, ...], ...] = (
    ("red", "blue", "green", "white"),
    ("dog", "horse", "bird", "cat"),
    ("river", "church", "garden", "mill"),
    ("morning", "evening", "night", "noon"),
)
OPTIONS = ("yes", "no")
NOISE = 0.1
SIMPLE_SHARE = 0.6
_TEXT = "the {} {} by the {} at {}"


class World:
    """All scenes and all rules.

    Args:
        noise: Chance that an answer, in the support as in the query set, is the wrong one.

    Attributes:
        noise: As given.
        prompts: The scenes' texts.
        labels: Whether a rule says yes to a scene, shape (rules, scenes), float64.
        prior: Prior probability of each rule, shape (rules,), float64.
    """

    def __init__(self, noise: float = NOISE) -> None:
        if not 0 < noise < 0.5:
            raise ValueError(f"noise is a chance between 0 and 0.5, not {noise}")
        self.noise = noise
        scenes = list(itertools.product(*(range(len(words)) for words in ATTRIBUTES)))
        self.prompts = [
            _TEXT.format(*(words[value] for words, value in zip(ATTRIBUTES, scene, strict=True))) for scene in scenes
        ]
        self._index = {prompt: number for number, prompt in enumerate(self.prompts)}
        values = torch.tensor(scenes)
        one = [
            torch.isin(values[:, attribute], torch.tensor(chosen))
            for attribute in range(len(ATTRIBUTES))
            for size in (1, 2, 3)
            for chosen in itertools.combinations(range(4), size)
        ]
        both = [
            torch.isin(values[:, first], torch.tensor(left)) & torch.isin(values[:, second], torch.tensor(right))
            for first, second in itertools.combinations(range(len(ATTRIBUTES)), 2)
            for left in itertools.combinations(range(4), 2)
            for right in itertools.combinations(range(4), 2)
        ]
        both += [~rule for rule in both]
        self.labels = torch.stack([*one, *both]).double()
        simple = torch.full((len(one),), SIMPLE_SHARE / len(one), dtype=torch.float64)
        self.prior = torch.cat([simple, torch.full((len(both),), (1 - SIMPLE_SHARE) / len(both), dtype=torch.float64)])

    def tasks(self, count: int, seed: int, items: int = 96) -> list[Task]:
        """Draws tasks from the prior; each is a family of its own.

        Args:
            count: Number of tasks.
            seed: The same seed gives the same tasks.
            items: Labelled scenes of each, drawn with noise, without repetition.
        """
        rng = random.Random(seed)
        made: list[Task] = []
        for number in range(count):
            rule = rng.choices(range(len(self.prior)), self.prior.tolist())[0]
            examples: list[Example] = []
            for scene in rng.sample(range(len(self.prompts)), items):
                yes = bool(self.labels[rule, scene]) ^ (rng.random() < self.noise)
                examples.append(Example(self.prompts[scene], OPTIONS, 0 if yes else 1))
            name = f"world_{seed}_{number:03d}"
            made.append(Task(name, name, "world", tuple(examples), fixed_labels=True, licence="generated"))
        return made

    def exact(self, support: Sequence[Example], query: Sequence[Example]) -> Tensor:
        """The exact Bayes predictive p(answer | scene, support).

        p(y | x, D) = sum_r p(y | x, r) p(r) prod_n p(y_n | x_n, r) / sum_r p(r) prod_n p(y_n | x_n, r)

        Args:
            support: Labelled scenes.
            query: Scenes; their answers are not looked at.

        Returns:
            Probabilities of ``OPTIONS``, shape (queries, 2), float64.
        """
        yes = self.labels * (1 - self.noise) + (1 - self.labels) * self.noise
        evidence = self.prior.log()
        for example in support:
            chance = yes[:, self._index[example.prompt]]
            evidence = evidence + (chance if example.answer == 0 else 1 - chance).log()
        weights = evidence.softmax(dim=0)
        predicted = weights @ yes[:, [self._index[example.prompt] for example in query]]
        return torch.stack([predicted, 1 - predicted], dim=-1)

    def epistemic(self, exact: Tensor) -> Tensor:
        """Mutual information of answer and rule in nats, shape (queries,): every rule leaves the noise's entropy.

        Args:
            exact: From ``exact``.
        """
        return (entropy(exact) - entropy(torch.tensor([self.noise, 1 - self.noise], dtype=torch.float64))).clamp_min(0)
