"""Cost of a training step beside plain PEFT LoRA, or the first method named: ``python -m training.bench``.

All train the same targets of the same base model on the same number of tokens, each in a process of its own. On a CPU,
whose speed wanders, they take turns; on a GPU, which would not hold all of them, one comes after the other.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, get_args

import torch

from abmll.objective import Labelled
from abmll.posterior import Family, PosteriorConfig
from abmll.scoring import Question
from training.base_model import BaseModel, load_base
from training.embedded import resolve
from training.provenance import provenance

METHODS = ("peft-lora", *(f"abmll-{family}" for family in get_args(Family)), "maml")
WARM = 3


@dataclass(frozen=True)
class Setup:
    """What is trained: the base model, where and in what dtype, and the size of a batch."""

    model: str
    device: str
    dtype: str
    rows: int
    tokens: int

    def base(self) -> BaseModel:
        """Loads the base model."""
        return load_base(self.model, device=self.device, dtype=getattr(torch, self.dtype))

    def data(self, vocabulary: int) -> list[Labelled]:
        """Made-up questions with four options of one token; only their number and length matter."""
        ids = torch.randint(0, vocabulary, (self.rows, self.tokens), generator=torch.Generator().manual_seed(0))
        options = tuple((token,) for token in range(10, 14))
        return [Labelled(Question(tuple(row), options), number % 4) for number, row in enumerate(ids.tolist())]


def _peft_step(setup: Setup) -> Callable[[], None]:
    from peft import LoraConfig, get_peft_model

    base = setup.base()
    data = setup.data(base.model.config.vocab_size)
    lora: Any = get_peft_model(base.model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=1e-3)
    ids = torch.tensor([item.question.prompt for item in data], device=base.device)
    answers = torch.tensor([item.question.options[item.answer][0] for item in data], device=base.device)

    def step() -> None:
        logits = lora(input_ids=ids, logits_to_keep=1).logits[:, -1]
        torch.nn.functional.cross_entropy(logits.float(), answers).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _abmll_step(setup: Setup, family: Family) -> Callable[[], None]:
    from abmll.layers import attach, init_posterior
    from training.adaptation import AdaptConfig, InnerLoop

    base = setup.base()
    config = PosteriorConfig(base_model=setup.model, family=family)
    attached = attach(base.model, config.targets, config.layers)
    theta = init_posterior(attached, config, 0).map(lambda tensor: tensor.to(base.device))
    generator = torch.Generator().manual_seed(0)
    data = setup.data(base.model.config.vocab_size)
    loop = InnerLoop(attached, theta, AdaptConfig())

    def step() -> None:
        loop.step(data, len(data), generator)

    return step


def _maml_step(setup: Setup) -> Callable[[], None]:
    """One inner step on half of the rows, differentiated through by the loss on the other half."""
    from training.benchmark.lora import LoraNet
    from training.benchmark.meta_learned import descend, loss_of
    from training.benchmark.method import Budget
    from training.episodes import EpisodeConfig

    base = setup.base()
    data = setup.data(base.model.config.vocab_size)
    half = len(data) // 2
    budget = Budget(meta_steps=1, tasks_per_step=1, episodes=EpisodeConfig(), rank=8, targets=("q_proj", "v_proj"))
    net = LoraNet(base, budget, 0)
    leaves = {name: tensor.requires_grad_() for name, tensor in net.state().items()}
    optimizer = torch.optim.Adam(leaves.values(), lr=1e-3)

    def step() -> None:
        inner = descend(net, leaves, data[:half], 1, 1e-2, 0, create_graph=True)
        loss_of(net, inner, data[half:]).backward(inputs=list(leaves.values()))
        optimizer.step()
        optimizer.zero_grad()

    return step


def make_step(method: str, setup: Setup) -> Callable[[], None]:
    """Returns a function that takes one training step of a method."""
    if method == "peft-lora":
        return _peft_step(setup)
    if method == "maml":
        return _maml_step(setup)
    family: Any = method.removeprefix("abmll-")
    return _abmll_step(setup, family)


def _work(pipe: Connection, method: str, setup: Setup) -> None:
    """Takes a step for each message and answers with its seconds and the peak of memory, in MiB; None: no room."""
    cuda = setup.device.startswith("cuda")
    try:
        step = make_step(method, setup)
        while pipe.recv():  # False ends it
            begin = time.perf_counter()
            step()
            if cuda:
                torch.cuda.synchronize(setup.device)
            seconds = time.perf_counter() - begin
            pipe.send((seconds, torch.cuda.max_memory_allocated(setup.device) / 2**20 if cuda else _peak_mib()))
    except torch.OutOfMemoryError:
        pipe.send(None)


def _peak_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


class Worker:
    """A method in a process of its own."""

    def __init__(self, method: str, setup: Setup) -> None:
        context = get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_work, args=(other, method, setup))
        self._process.start()
        other.close()

    def step(self) -> tuple[float, float] | None:
        """Takes one step; its seconds and the process's peak of memory in MiB, None if it does not fit.

        Raises:
            RuntimeError: The process failed; it has printed why.
        """
        try:
            self._pipe.send(True)
            return self._pipe.recv()
        except (EOFError, OSError) as error:
            raise RuntimeError("a method's process failed; what it said stands above") from error

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(OSError):
            self._pipe.send(False)
        self._process.join()


def _rounds(methods: list[str], setup: Setup, steps: int) -> dict[str, tuple[float, float] | None]:
    """Median seconds of a step and peak of memory in MiB by method, taken in turn; None for what does not fit."""
    workers = {method: Worker(method, setup) for method in methods}
    taken: dict[str, list[tuple[float, float] | None]] = {method: [] for method in methods}
    try:
        for _ in range(steps + WARM):
            for method, worker in workers.items():
                if None not in taken[method]:
                    taken[method].append(worker.step())
    finally:
        for worker in workers.values():
            worker.close()
    found: dict[str, tuple[float, float] | None] = {}
    for method, results in taken.items():
        kept = [result for result in results if result is not None]
        fits = len(kept) == len(results)
        found[method] = (statistics.median(s for s, _ in kept[WARM:]), kept[-1][1]) if fits else None
    return found


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=None, help="base model; default: the embedded one")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the base weights")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128, help="in a row")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    given = parser.parse_args()
    setup = Setup(resolve(given.model), given.device, given.dtype, given.rows, given.tokens)
    groups = [[method] for method in given.methods] if given.device.startswith("cuda") else [given.methods]
    found = {k: v for group in groups for k, v in _rounds(group, setup, given.steps).items()}
    print(f"training step, {setup.rows} rows of {setup.tokens} tokens, {setup.dtype}; {provenance()}")
    print("| method | step ms | time ratio | peak MiB | memory ratio |\n|---|---|---|---|---|")
    first = found[given.methods[0]]
    for method, result in found.items():
        if result is None:
            print(f"| {method} | does not fit | | | |")
            continue
        (seconds, peak), (reference, least) = result, first or (math.nan, math.nan)
        print(f"| {method} | {1000 * seconds:.0f} | {seconds / reference:.2f} | {peak:.0f} | {peak / least:.2f} |")


if __name__ == "__main__":
    main()
