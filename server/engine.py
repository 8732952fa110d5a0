"""What a serving engine does: log-probabilities of answers under draws of a posterior."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from abmll.posterior import Normalize, Posterior
from abmll.sampling import Sampling
from abmll.scoring import Question
from abmll.sequences import TokenScores


@dataclass(frozen=True)
class Served:
    """A posterior as engines know it.

    Attributes:
        key: Content hash of the posterior (``Posterior.digest``): equal keys, equal parameters. Names of
            adapters are made from it, so that a new version never meets an old version's prefix cache.
        posterior: The parameters, float32 on the CPU.
    """

    key: str
    posterior: Posterior


# A token of a text that is being decoded, and its log-probability under the mean, in nats before temperature.
Tell = Callable[[int, float], None]


@dataclass(frozen=True)
class EngineState:
    """What an engine reports of itself.

    Attributes:
        healthy: Whether it can answer now.
        adapters: Adapters (or draws) resident at present.
        loads: Adapters (or draws) made and loaded since the start.
        hits: Times that a needed one was resident already.
        evictions: Adapters given up for others since the start.
        queued: Questions waiting.
        mending: Whether the engine sees to its health itself; if not, one that is not healthy is started anew.
        running: Replicas that answer; None: it has none, it is one.
        wanted: Replicas that there are to be at least.
    """

    healthy: bool
    adapters: int
    loads: int
    hits: int
    evictions: int
    queued: int
    mending: bool = False
    running: int | None = None
    wanted: int = 1


class Engine(Protocol):
    """One base model, asked under draws of any number of posteriors over its layers.

    Draw ``index`` of a posterior with ``seed`` is that of ``abmll.draws.draw``; both engines return the
    same numbers (within 1e-3 nats). All methods may be called concurrently from one event loop.
    """

    name: str
    context: int

    async def start(self) -> None:
        """Loads the model and warms up; the engine answers at full speed when this returns."""
        ...

    async def close(self) -> None:
        """Frees everything; requests under way fail with ``EngineFailure``."""
        ...

    async def score(
        self, served: Served, question: Question, draws: Sequence[int], seed: int, normalize: Normalize = "sum"
    ) -> Tensor:
        """Scores each option under each draw: shape (draws, options), nats, as ``abmll.scoring.option_scores``."""
        ...

    async def generate(
        self,
        served: Served,
        prompt: Sequence[int],
        sampling: Sampling,
        tell: Tell | None = None,
    ) -> list[int]:
        """Decodes under the posterior mean.

        Ends before an end-of-text token, or as ``sampling`` says; more tokens may follow the end of a stop string.
        ``tell`` is told of each token as it comes, in the event loop.
        """
        ...

    async def sample(
        self,
        served: Served,
        prompt: Sequence[int],
        sampling: Sampling,
        draws: Sequence[int],
        seed: int,
    ) -> list[list[int]]:
        """Decodes one text under each draw, each as ``generate`` does under the mean."""
        ...

    async def score_tokens(
        self,
        served: Served,
        prompt: Sequence[int],
        tokens: Sequence[int],
        draws: Sequence[int],
        seed: int,
        others: int = 0,
    ) -> TokenScores:
        """Scores each of ``tokens`` after ``prompt`` under each draw, and as many likely ``others`` in its place."""
        ...

    async def release(self, key: str) -> None:
        """Forgets a posterior's draws, once no request needs them (its task was deleted)."""
        ...

    def state(self) -> EngineState:
        """Reports the engine's state."""
        ...
