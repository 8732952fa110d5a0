"""Cost of a training step beside plain PEFT LoRA: ``python -m training.bench``.

Both train the same targets of the same base model on the same batch. Times alternate within one
process; memory is each method's own process's peak.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from training.provenance import provenance

METHODS = ("peft-lora", "abmll-kronecker", "abmll-lowrank", "abmll-subspace")
ROWS, TOKENS = 16, 128


def _peft_step(model: str) -> Callable[[], None]:
    from peft import LoraConfig, get_peft_model

    from training.base_model import load_base

    base = load_base(model)
    lora: Any = get_peft_model(base.model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=1e-3)
    ids = torch.randint(0, base.model.config.vocab_size, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    answers = torch.randint(0, base.model.config.vocab_size, (ROWS,), generator=torch.Generator().manual_seed(1))

    def step() -> None:
        logits = lora(input_ids=ids, logits_to_keep=1).logits[:, -1]
        torch.nn.functional.cross_entropy(logits.float(), answers).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _abmll_step(model: str, family: str) -> Callable[[], None]:
    from abmll.layers import attach, init_posterior
    from abmll.objective import Labelled
    from abmll.posterior import PosteriorConfig
    from abmll.scoring import Question
    from training.adaptation import AdaptConfig, InnerLoop
    from training.base_model import load_base

    base = load_base(model)
    config = PosteriorConfig(base_model=model, family=family)  # pyright: ignore[reportArgumentType] -- from METHODS
    attached = attach(base.model, config.targets, config.layers)
    theta = init_posterior(attached, config, 0)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, base.model.config.vocab_size, (ROWS, TOKENS), generator=generator).tolist()
    options = tuple((token,) for token in range(10, 14))
    data = [Labelled(Question(tuple(row), options), number % 4) for number, row in enumerate(ids)]
    loop = InnerLoop(attached, theta, AdaptConfig())

    def step() -> None:
        loop.step(data, len(data), generator)

    return step


def make_step(method: str, model: str) -> Callable[[], None]:
    """Returns a function that takes one training step of a method."""
    return _peft_step(model) if method == "peft-lora" else _abmll_step(model, method.removeprefix("abmll-"))


def _peak_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def _measure_memory(method: str, model: str) -> None:
    step = make_step(method, model)
    for _ in range(3):
        step()
    print(json.dumps(_peak_mib()))


def main() -> None:
    """Prints the table."""
    from training.embedded import resolve

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=None, help="base model; default: the embedded one")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--memory-of", choices=METHODS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    model = resolve(arguments.model)
    if arguments.memory_of:
        _measure_memory(arguments.memory_of, model)
        return
    peaks: dict[str, float] = {}
    for method in METHODS:
        command = [sys.executable, "-m", "training.bench", "--model", model, "--memory-of", method]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[method] = json.loads(done.stdout.splitlines()[-1])
    steps = {method: make_step(method, model) for method in METHODS}
    times: dict[str, list[float]] = {method: [] for method in METHODS}
    for number in range(arguments.steps + 3):
        for method, step in steps.items():
            begin = time.perf_counter()
            step()
            if number >= 3:
                times[method].append(time.perf_counter() - begin)
    reference = statistics.median(times["peft-lora"])
    print(f"training step, {ROWS} rows of {TOKENS} tokens; {provenance()}")
    print("| method | step ms | time ratio | peak MiB | memory ratio |\n|---|---|---|---|---|")
    for method in METHODS:
        median = statistics.median(times[method])
        print(
            f"| {method} | {1000 * median:.0f} | {median / reference:.2f} "
            f"| {peaks[method]:.0f} | {peaks[method] / peaks['peft-lora']:.2f} |"
        )


if __name__ == "__main__":
    main()
