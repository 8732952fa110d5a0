"""Draws on disk as LoRA adapters, kept within a budget of bytes and never taken from a request in flight."""

from __future__ import annotations

import asyncio
import shutil
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from abmll.draws import draw, save_adapter
from abmll.errors import EngineFailure, InvalidPosterior
from server.engine import Served


@dataclass
class Adapter:
    """One draw, or the mean, as an adapter folder.

    Attributes:
        name: Unique for posterior, seed and draw.
        number: Unique positive integer.
        path: The folder; its name is unique, even if the draw is made anew.
        key: The posterior's key.
        size: Bytes on disk.
        users: Requests in flight that need it.
    """

    name: str
    number: int
    path: Path
    key: str
    size: int
    users: int = 0


class AdapterCache:
    """Writes adapters when first needed and gives up the least recently used ones past a budget.

    What is given up here stays in the engine until its own LRU drops it: its ``remove_lora`` is never
    called, for on the CPU build (0.32.0) adapters that came after it gave scores off by up to 3 nats. No
    folder and no number is used twice, so what lingers there is never asked again.

    Args:
        folder: Where the adapter folders lie; best in memory (tmpfs).
        rank: Every adapter is padded to this rank.
        dtype: Dtype of the stored factors.
        budget: Bytes to keep; in-flight adapters may exceed it for a while.
    """

    def __init__(self, folder: Path, rank: int, dtype: torch.dtype, budget: int) -> None:
        self.folder, self.rank, self.dtype, self.budget = folder, rank, dtype, budget
        self.loads = self.hits = self.evictions = 0
        self._adapters: OrderedDict[str, Adapter] = OrderedDict()
        self._making: dict[str, asyncio.Task[None]] = {}
        self._released: set[str] = set()
        self._wanted: Counter[str] = Counter()
        self._next = 1

    def __len__(self) -> int:
        return len(self._adapters)

    @asynccontextmanager
    async def holding(
        self, served: Served, seed: int, draws: Sequence[int | None]
    ) -> AsyncGenerator[list[Adapter], None]:
        """Gives the adapters of several draws and keeps them while the context lasts.

        Args:
            served: The posterior.
            seed: Seed of the draws.
            draws: Indices; None stands for the mean.

        Raises:
            InvalidPosterior: A draw is not finite.
            EngineFailure: One cannot be written.
        """
        held: list[Adapter] = []
        try:
            for index in draws:
                adapter = await self._get(served, seed, index)
                adapter.users += 1
                held.append(adapter)
            yield held
        finally:
            for adapter in held:
                adapter.users -= 1
            await self._shrink()

    async def release(self, key: str) -> None:
        """Gives up a posterior's adapters, those in flight as soon as they are done."""
        self._released.add(key)
        await self._shrink()

    async def _get(self, served: Served, seed: int, index: int | None) -> Adapter:
        name = f"{served.key}-mean" if index is None else f"{served.key}-{seed}-{index}"
        self._released.discard(served.key)
        made = False
        if name not in self._adapters:
            if name not in self._making:
                made = True
                self._making[name] = asyncio.create_task(self._make(name, served, seed, index))
            self._wanted[name] += 1  # not to be given up before this one's turn has come
            try:
                # It goes on though whoever asked is gone: all that lies in the folder is known here.
                await asyncio.shield(self._making[name])
            finally:
                self._wanted -= Counter([name])
        self.hits += not made
        self._adapters.move_to_end(name)
        return self._adapters[name]

    async def _make(self, name: str, served: Served, seed: int, index: int | None) -> None:
        number, self._next = self._next, self._next + 1
        try:
            self._adapters[name] = await asyncio.to_thread(self._write, name, number, served, seed, index)
            self.loads += 1
        finally:
            # Nobody may be left to be told of an error.
            self._making.pop(name).add_done_callback(lambda task: task.cancelled() or task.exception())

    def _write(self, name: str, number: int, served: Served, seed: int, index: int | None) -> Adapter:
        factors = draw(served.posterior, seed, index)
        # An engine takes whatever it is given: a NaN would show only as nonsense in answers.
        for module, (a, b) in factors.items():
            if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
                raise InvalidPosterior(f"draw {index} of posterior {served.key} is not finite at {module}")
            if a.shape[0] > self.rank:
                raise InvalidPosterior(
                    f"draws of posterior {served.key} have rank {a.shape[0]}; this server was started for {self.rank}"
                )
        path = self.folder / f"{number}-{name}"
        try:
            path.mkdir()  # not its parents: an engine that has been closed has no folder any more
            save_adapter(factors, served.posterior, path, rank=self.rank, dtype=self.dtype)
            size = sum(file.stat().st_size for file in path.iterdir())
        except (OSError, SafetensorError) as error:
            shutil.rmtree(path, ignore_errors=True)
            raise EngineFailure(f"a draw cannot be written to {self.folder}: {error}; free memory there") from error
        return Adapter(name, number, path, served.key, size)

    async def _shrink(self) -> None:
        total = sum(adapter.size for adapter in self._adapters.values())
        for name in list(self._adapters):
            adapter = self._adapters.get(name)
            if adapter is None or adapter.users or name in self._wanted:
                continue
            if adapter.key not in self._released and total <= self.budget:
                continue
            del self._adapters[name]
            total -= adapter.size
            self.evictions += 1
            await asyncio.to_thread(shutil.rmtree, adapter.path, ignore_errors=True)
