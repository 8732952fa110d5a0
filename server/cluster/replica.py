"""One engine in a process of Ray Serve."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ray import ObjectRef

from abmll.errors import EngineFailure
from abmll.posterior import Normalize, Posterior, PosteriorConfig
from abmll.sampling import Sampling
from abmll.scoring import Question
from abmll.sequences import TokenScores
from server.cache import ByteCache, tensor_bytes
from server.clock import start_clock
from server.engine import Engine, EngineState, Served
from server.loading import make_engine
from server.settings import Settings

_T = TypeVar("_T")


@dataclass(frozen=True)
class Asked:
    """Of which posterior a replica is asked.

    Attributes:
        key: Its content hash.
        posterior: Where Ray has it; read by a replica that meets it for the first time.
        released: Keys that are not needed any more, the newest of them.
    """

    key: str
    posterior: ObjectRef[Posterior]
    released: tuple[str, ...]


@dataclass(frozen=True)
class Told:
    """What a replica answers.

    Attributes:
        value: What the engine's method returned.
        queued: Seconds that it waited in the engine's own queue.
        replica: Which one answered.
        state: How its engine is now.
    """

    value: Any
    queued: float
    replica: str
    state: EngineState


class Replica:
    """A started engine, its methods callable through a handle of Ray Serve.

    Args:
        settings: The server's settings, as JSON.
        config: Kind of the posteriors, as JSON.
    """

    async def __init__(self, settings: str, config: str) -> None:
        self._settings = Settings.model_validate_json(settings)
        self._engine: Engine = make_engine(self._settings, PosteriorConfig.model_validate_json(config))
        self._posteriors: ByteCache[str, Posterior] = ByteCache(
            self._settings.cache, lambda posterior: tensor_bytes(posterior.tensors().values())
        )
        self._released: set[str] = set()
        self._name = f"{os.uname().nodename}:{os.getpid()}"
        await self._engine.start()

    async def check_health(self) -> None:
        """Called by Ray Serve, which replaces a replica whose engine has died.

        Raises:
            EngineFailure: It has.
        """
        if not self._engine.state().healthy:
            raise EngineFailure("the replica's engine has died")

    async def __del__(self) -> None:
        await self._engine.close()

    async def context(self) -> int:
        """The most tokens that the engine takes."""
        return self._engine.context

    async def score(
        self, asked: Asked, question: Question, draws: Sequence[int], seed: int, normalize: Normalize
    ) -> Told:
        """See ``Engine.score``."""
        return await self._ask(asked, lambda served: self._engine.score(served, question, draws, seed, normalize))

    async def sample(
        self, asked: Asked, prompt: Sequence[int], sampling: Sampling, draws: Sequence[int], seed: int
    ) -> Told:
        """See ``Engine.sample``."""
        return await self._ask(asked, lambda served: self._engine.sample(served, prompt, sampling, draws, seed))

    async def score_tokens(
        self, asked: Asked, prompt: Sequence[int], tokens: Sequence[int], draws: Sequence[int], seed: int, others: int
    ) -> Told:
        """See ``Engine.score_tokens``."""

        def work(served: Served) -> Coroutine[Any, Any, TokenScores]:
            return self._engine.score_tokens(served, prompt, tokens, draws, seed, others)

        return await self._ask(asked, work)

    async def generate(self, asked: Asked, prompt: Sequence[int], sampling: Sampling) -> Told:
        """See ``Engine.generate``."""
        return await self._ask(asked, lambda served: self._engine.generate(served, prompt, sampling))

    async def stream(
        self, asked: Asked, prompt: Sequence[int], sampling: Sampling
    ) -> AsyncGenerator[tuple[int, float] | Told]:
        """As ``generate``, but gives each token as it comes, and at last what ``generate`` gives."""
        tokens: asyncio.Queue[tuple[int, float] | None] = asyncio.Queue()

        async def work(served: Served) -> list[int]:
            try:
                return await self._engine.generate(
                    served, prompt, sampling, lambda token, log_prob: tokens.put_nowait((token, log_prob))
                )
            finally:
                tokens.put_nowait(None)

        running = asyncio.ensure_future(self._ask(asked, work))
        try:
            while (token := await tokens.get()) is not None:
                yield token
            yield await running
        finally:
            running.cancel()

    async def _ask(self, asked: Asked, work: Callable[[Served], Coroutine[Any, Any, _T]]) -> Told:
        for key in set(asked.released) - self._released:
            self._posteriors.pop(key)
            await self._engine.release(key)
        self._released = set(asked.released)
        posterior = self._posteriors.find(asked.key)
        if posterior is None:
            posterior = await asked.posterior
            self._posteriors.put(asked.key, posterior)
        clock = start_clock()
        value = await work(Served(asked.key, posterior))
        return Told(value, clock.queued, self._name, self._engine.state())
