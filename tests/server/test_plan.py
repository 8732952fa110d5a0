"""A plan, against what a step really takes."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from abmll.draws import draw, save_adapter
from abmll.layers import attach, init_posterior
from abmll.posterior import Family, PosteriorConfig
from server.serving_plan import plan_serving
from server.vllm_setup import adapter_rank
from tests.command_line import CommandLine
from training.base_model import load_base
from training.embedded import BASE
from training.plan import plan_training

ROWS, TOKENS = 64, 128
_M_MMAP_THRESHOLD = -3


def _resident(what: str) -> int:
    return int(re.findall(what + r":\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) << 10


def _measure(pipe: Any, family: Family) -> None:
    """What a process holds more of at the peak of two steps than before it loads the model."""
    from training.adaptation import AdaptConfig, InnerLoop
    from training.bench import Setup

    setup = Setup(str(BASE), "cpu", "float32", ROWS, TOKENS)
    # Freed blocks go back at once; else the heap keeps holes.
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 16)
    load_base(str(BASE)).model(input_ids=torch.tensor([[1]])).logits.sum()  # what the libraries take at their first use
    gc.collect()
    before = _resident("VmRSS")
    base = setup.base()
    config = PosteriorConfig(base_model="x", family=family)
    attached = attach(base.model, config.targets)
    loop = InnerLoop(attached, init_posterior(attached, config, 0), AdaptConfig(max_tokens=10**6))
    for _ in range(2):
        loop.step(setup.data(base.model.config.vocab_size), ROWS, torch.Generator().manual_seed(0))
    pipe.send(_resident("VmHWM") - before)


@pytest.mark.parametrize("family", ["kronecker", "subspace"])
def test_a_step_takes_what_was_planned(family: Family) -> None:
    config = PosteriorConfig(base_model="x", family=family)
    plan = plan_training(
        AutoConfig.from_pretrained(BASE), config, rows=ROWS, tokens=TOKENS, dtype=torch.float32, max_tokens=10**6
    )
    context = multiprocessing.get_context("forkserver")
    mine, other = context.Pipe()
    process = context.Process(target=_measure, args=(other, family))
    process.start()
    measured = mine.recv()
    process.join()
    # The measured process has theta, without the gradient and moments that meta-training keeps.
    planned = plan.peak - plan.theta
    print(f"{family}: planned {planned / 2**20:.0f} MiB, measured {measured / 2**20:.0f}")
    assert planned == pytest.approx(measured, rel=0.15)


def test_operations_are_those_of_the_matrices() -> None:
    config, posterior = AutoConfig.from_pretrained(BASE), PosteriorConfig(base_model="x")
    plan = plan_training(config, posterior, rows=4, tokens=64)
    base = load_base(str(BASE)).model
    blocks = sum(p.numel() for name, p in base.named_parameters() if p.dim() == 2 and ".layers." in name)
    # Forward, and backward through all but the first block's keys and values: two operations an entry and token each.
    assert 2 * 2 * blocks * 4 * 64 * 0.85 < plan.step_flops < 2 * 2 * blocks * 4 * 64 * 1.6
    again = plan_training(config, posterior, rows=4, tokens=64, checkpointing=True)
    assert again.step_flops > 1.2 * plan.step_flops
    assert again.step < plan.step


def test_a_draw_and_the_weights_take_what_was_planned(tmp_path: Path) -> None:
    config = PosteriorConfig(base_model="x")
    plan = plan_serving(
        AutoConfig.from_pretrained(BASE), config, draws=8, slots=9, tokens=64, memory=2**30, dtype=torch.float32
    )
    base = load_base(str(BASE))
    posterior = init_posterior(attach(base.model, config.targets), config, 0)
    save_adapter(draw(posterior, 0, 0), posterior, tmp_path, rank=adapter_rank(config.draw_rank))
    adapter = load_file(tmp_path / "adapter_model.safetensors")
    assert plan.adapter == sum(tensor.nbytes for tensor in adapter.values())
    assert plan.weights == sum(p.nbytes for p in base.model.parameters())
    cache = base.model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=True).past_key_values
    assert plan.kv_token == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) // 3
    assert plan.kv_tokens == (int(0.9 * 2**30) - plan.weights - plan.slots) // plan.kv_token
    assert plan.questions == plan.kv_tokens // (64 * 8)


def test_the_command_tells_the_plan_and_what_is_wrong(abmll: CommandLine) -> None:
    told = abmll("plan", "--rows", 2, "--tokens", 16, "--json").json
    assert told["training"]["peak"] > told["training"]["base"]
    assert told["commands"][1].startswith("abmll serve --model abmll-small")
    shown = abmll("plan", "--rows", 2, "--tokens", 16, "--gpu", "l4").out
    assert f"{told['training']['base_parameters']:,}" in shown
    assert "does not fit" not in shown
    # Weights and draws would fit on the whole of it, but not a question beside them in the part that vLLM takes.
    small = abmll("plan", "--rows", 1, "--tokens", 1_000_000, "--utilization", 0.05, "--gpu", "l4").out
    assert "serving does not fit on one l4 (1.1 GiB of it)" in small
    options = ("--layers", "last", "--revision", "main", "--dtype", "float32", "--utilization", 0.5, "--slots", 9)
    train, serve = abmll("plan", "--rows", 2, "--tokens", 16, *options, "--draws", 99, "--json").json["commands"]
    assert all(words in train for words in ("--layers last", "--revision main", "--dtype float32"))
    assert all(words in serve for words in ("--revision main", "--draws 99 --max-draws 99", "--engine vllm"))
    assert "--vllm-option gpu_memory_utilization=0.5 --vllm-option max_loras=9" in serve
    packed = abmll("plan", "--rows", 2, "--tokens", 16, "--dtype", "nf4", "--json").json
    assert packed["training"]["base"] < 0.7 * told["training"]["base"]
    assert packed["serving"] == told["serving"]  # vLLM packs no weights so
    assert "--dtype nf4" in packed["commands"][0]
    assert "--dtype nf4" in packed["commands"][1]  # of adaptation
    assert abmll("plan", "--dtype", "float16").code == 2  # train does not take it
    assert "known: l4" in abmll("plan", "--gpu", "abacus").refusal
    assert "linear layers are" in abmll("plan", "--targets", "x").refusal
    assert "config.json" in abmll("plan", "--model", "/nowhere").refusal
