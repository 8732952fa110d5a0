"""What a method of the benchmark is: something that learns from tasks, then predicts from a few examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from abmll.examples import Example
from training.adaptation import grown
from training.base_model import BaseModel
from training.episodes import EpisodeConfig
from training.meta import MetaConfig
from training.schedule import rate_share
from training.tasks import Task

# Rate of learning over tasks (Adam) of all LoRA factors, at its highest.
META_RATE = 1e-3
_WARMUP: int = MetaConfig.model_fields["warmup"].default

# Returns a fresh copy of the base model: a method may put adapters into it.
Load = Callable[[], BaseModel]
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Budget:
    """What every method may spend.

    Attributes:
        meta_steps: Steps of learning over tasks.
        tasks_per_step: Episodes in a step.
        episodes: How episodes are drawn.
        steps: Gradient steps of adaptation to one task, in meta-learning as in prediction.
        growth: Power of (support set / batch) that the steps of prediction grow with; 0: they are always as many.
        batch: Support examples in a gradient step, at most.
        draws: Draws (or samples, or members) in prediction.
        rank: Rank of LoRA; of a posterior's draw, where the method has draws.
        targets: Names of the adapted modules.
    """

    meta_steps: int
    tasks_per_step: int
    episodes: EpisodeConfig
    steps: int = 12
    growth: float = 0.0
    batch: int = 16
    draws: int = 8
    rank: int = 16
    targets: tuple[str, ...] = ("o_proj", "down_proj")

    def meta_rate(self, step: int, gradients: int = 1) -> float:
        """Rate of learning over tasks, which warms up and falls as ABMLL's does.

        Args:
            step: Steps that were taken before.
            gradients: Steps of the method for each of the budget's.
        """
        return META_RATE * rate_share(step, step / (gradients * self.meta_steps), gradients * _WARMUP)

    def steps_on(self, support: Sequence[object]) -> int:
        """Gradient steps of prediction from a support set."""
        return grown(self.steps, self.growth, len(support), self.batch)


class Learner(Protocol):
    """A method that has learned from the training tasks, or needs none.

    Attributes:
        parameters: Trained parameters of one task's model.
        passes: Forward passes for one answer.
    """

    parameters: int
    passes: int

    def predict(self, support: Sequence[Example], query: Sequence[Example], seed: int) -> Tensor:
        """Scores the options of questions after seeing labelled examples.

        Args:
            support: The labelled examples; perhaps none.
            query: The questions; their answers are not looked at.
            seed: Seed of whatever is random.

        Returns:
            Option scores under each draw in nats, shape (draws, queries, options), on the CPU.
        """
        ...


@runtime_checkable
class Noting(Protocol):
    """A learner that has more to say of its last prediction.

    Attributes:
        notes: Columns for the rows of results: ABMLL's KL to the prior, in nats per data point.
    """

    notes: dict[str, float]


@runtime_checkable
class Revised(Protocol):
    """A method that has given other results than now: what an earlier version measured is measured anew.

    Attributes:
        version: Counts up from 1, which is that of a method without one.
    """

    version: int


class Method(Protocol):
    """A way to learn tasks.

    Attributes:
        name: Shown in tables.
        trials: Settings that are tried on the validation tasks; those with something to tune have as many each.
    """

    name: str
    trials: Sequence[Settings]

    def learn(self, load: Load, tasks: Sequence[Task], settings: Settings, budget: Budget, seed: int) -> Learner:
        """Learns from the training tasks.

        Args:
            load: Gives a fresh base model.
            tasks: The training tasks.
            settings: One of ``trials``.
            budget: What may be spent.
            seed: Seed of learning.
        """
        ...
