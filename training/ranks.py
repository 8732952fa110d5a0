"""Several processes that share a meta-training: each takes some of a step's tasks, all keep the same theta.

Or, where the base model does not fit one of them, they hold it together and run every pass together.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from abmll.errors import AbmllError
from abmll.together import Together

_T = TypeVar("_T")


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is; a single one by default.

    Attributes:
        rank: Number of this process, from 0; that one writes files.
        world: Number of processes.
        local: Number of this process on its machine.
        sharded: Whether they hold the base model together, a part of its weights each; every process then does all
            that the others do, but in a pass with gradients its own rows alone.
    """

    rank: int = 0
    world: int = 1
    local: int = 0
    sharded: bool = False

    @classmethod
    def join(cls, device: str | None, *, sharded: bool = False) -> Ranks:
        """Joins those that ``torchrun`` or ``accelerate launch`` started; alone where neither did.

        Args:
            device: Where training runs, see ``device``; it says how the processes talk (NCCL on GPUs, else gloo).
            sharded: Whether they are to hold the base model together.

        Raises:
            AbmllError: A single process is to hold the model together with others.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            if sharded:
                raise AbmllError(
                    "--shard-base needs several processes to share the base model; start them with "
                    "torchrun --nproc-per-node N -m server.cli ..., or leave --shard-base out",
                    field="shard_base",
                )
            return cls()
        from accelerate import PartialState

        state = PartialState(cpu=device is not None and not device.startswith("cuda"))
        return cls(state.process_index, state.num_processes, state.local_process_index, sharded)

    @property
    def main(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    @property
    def shards(self) -> int:
        """Number of parts that the base model's weights lie in."""
        return self.world if self.sharded else 1

    @property
    def together(self) -> Together | None:
        """The processes as the objective asks them, where they hold the base model together."""
        return self if self.sharded else None

    def device(self, wanted: str | None) -> str | None:
        """The device of this process: a GPU of its own where several share the work and none is named."""
        if self.world == 1 or wanted is not None or not torch.cuda.is_available():
            return wanted
        return f"cuda:{self.local}"

    def mine(self, count: int) -> range:
        """Numbers of the tasks that this process takes of a step's.

        Raises:
            AbmllError: There are fewer tasks than processes.
        """
        if self.sharded:
            return range(count)
        if count < self.world:
            raise AbmllError(
                f"tasks_per_step is {count}, too few for {self.world} processes; set it to a multiple of {self.world} "
                "in the file that --config names",
                field="tasks_per_step",
            )
        return range(self.rank, count, self.world)

    def part(self, rows: int) -> tuple[list[int], float]:
        """Rows of a pass that this process runs, see ``abmll.together``."""
        own = list(range(self.rank, rows, self.world))
        # The weights come from all processes at every pass, so that none may leave one out.
        return (own, 1.0) if own else ([0], 0.0)

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replaces tensors by their sums over all processes, the same in each of them.

        Raises:
            AbmllError: Another process has gone.
        """
        if self.world == 1:
            return
        whole = torch.cat([tensor.flatten() for tensor in tensors])
        with _together():
            dist.all_reduce(whole)
        for tensor, part in zip(tensors, whole.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def of_main(self, value: _T) -> _T:
        """Gives every process what the one that writes files has.

        Raises:
            AbmllError: Another process has gone.
        """
        if self.world == 1:
            return value
        held = [value]
        with _together():
            dist.broadcast_object_list(held)
        return held[0]

    def leave(self) -> None:
        """Parts: what follows is done by each process for itself."""
        if self.world > 1:
            dist.destroy_process_group()


ALONE = Ranks()


@contextmanager
def _together() -> Generator[None]:
    try:
        yield
    except RuntimeError as error:
        raise AbmllError(
            f"another process of this training has gone ({str(error).splitlines()[0][:120]}); start all of them again "
            "with the same command: they go on from the last checkpoint"
        ) from error
