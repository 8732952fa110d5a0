"""The exact Bayes predictive as a method of the benchmark: the bound that no method can better on average."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from abmll.examples import Example
from training.benchmark.method import Budget, Learner, Load, Settings
from training.benchmark.world import World
from training.tasks import Task


class ExactBayes:
    """Knows all rules of the generated world and their prior, and nothing else.

    Args:
        world: The world that the tasks are from.
    """

    name = "exact bayes"
    trials: Sequence[Settings] = ({},)
    parameters = 0
    passes = 0

    def __init__(self, world: World) -> None:
        self.world = world

    def learn(self, load: Load, tasks: Sequence[Task], settings: Settings, budget: Budget, seed: int) -> Learner:
        """See ``Method``."""
        return self

    def predict(self, support: Sequence[Example], query: Sequence[Example], seed: int) -> Tensor:
        """See ``Learner``: log-probabilities, one draw."""
        return self.world.exact(support, query).log()[None]
