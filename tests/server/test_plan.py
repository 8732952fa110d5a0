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
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from abmll.draws import draw, save_adapter
from abmll.layers import attach, init_posterior
from abmll.objective import Labelled, task_gradient
from abmll.posterior import Family, PosteriorConfig
from abmll.scoring import Question
from server.serving_plan import plan_serving
from server.vllm_setup import adapter_rank
from tests.command_line import CommandLine
from tests.two_processes import results_of, start_two
from training.adaptation import AdaptConfig, InnerLoop
from training.base_model import load_base, load_tokenizer
from training.bench import Setup
from training.embedded import BASE
from training.plan import plan_training
from training.ranks import Ranks

ROWS, TOKENS = 64, 128
# Where two processes share the base model: one that is not small beside its activations.
SHARED, SHARED_ROWS = PosteriorConfig(base_model="x"), 8
_M_MMAP_THRESHOLD = -3


def _resident(what: str) -> int:
    return int(re.findall(what + r":\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) << 10


def _give_back_at_once() -> None:
    """Has freed blocks go back to the system; else the heap keeps holes."""
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 16)


def _measure(pipe: Any, family: Family, episode: int) -> None:
    """What a process holds more of at the peak of two steps, and of the objective, than before it loads the model."""
    setup = Setup(str(BASE), "cpu", "float32", ROWS, TOKENS)
    _give_back_at_once()
    load_base(str(BASE)).model(input_ids=torch.tensor([[1]])).logits.sum()  # what the libraries take at their first use
    gc.collect()
    before = _resident("VmRSS")
    base = setup.base()
    config = PosteriorConfig(base_model="x", family=family)
    attached = attach(base.model, config.targets)
    theta, generator = init_posterior(attached, config, 0), torch.Generator().manual_seed(0)
    loop = InnerLoop(attached, theta, AdaptConfig(max_tokens=10**6))
    data = setup.data(base.model.config.vocab_size)
    for _ in range(2):
        loop.step(data, ROWS, generator)
    if episode:
        asked = data * (episode // ROWS)
        task_gradient(attached, loop.phi, theta, asked, beta=1e-3, generator=generator, max_tokens=10**6)
    pipe.send(_resident("VmHWM") - before)


@pytest.mark.parametrize(("family", "episode"), [("kronecker", 0), ("subspace", 0), ("subspace", 2 * ROWS)])
def test_training_takes_what_was_planned(family: Family, episode: int) -> None:
    config = PosteriorConfig(base_model="x", family=family)
    plan = plan_training(
        AutoConfig.from_pretrained(BASE), config, rows=ROWS, tokens=TOKENS, episode=2 * ROWS, dtype=torch.float32,
        max_tokens=10**6,
    )  # fmt: skip
    context = multiprocessing.get_context("forkserver")
    mine, other = context.Pipe()
    process = context.Process(target=_measure, args=(other, family, episode))
    process.start()
    measured = mine.recv()
    process.join()
    # The measured process has theta, without the gradient and moments that meta-training keeps.
    planned = plan.peak - plan.theta + plan.prior if episode else plan.adaptation
    of = "objective" if episode else "step"
    print(f"{family}, {of}: planned {planned / 2**20:.0f} MiB, measured {measured / 2**20:.0f}")
    assert planned == pytest.approx(measured, rel=0.15)


def _measure_shared(pipe: Any, folder: str) -> None:
    """The same in a process that holds half of the model."""
    ranks = Ranks.join("cpu", sharded=True)
    _give_back_at_once()
    question = Question((1,) * (TOKENS - 1), ((1,), (2,), (3,), (4,)))

    def two_steps(model: str) -> None:
        base = load_base(model, shards=ranks.shards)
        Path("/proc/self/clear_refs").write_text("5")  # the peak of loading, which needs files whole, is not a step's
        attached = attach(base.model, SHARED.targets, together=ranks.together)
        loop = InnerLoop(attached, init_posterior(attached, SHARED, 0), AdaptConfig(max_tokens=10**6))
        for _ in range(2):
            loop.step([Labelled(question, 0)] * SHARED_ROWS, SHARED_ROWS, torch.Generator().manual_seed(0))

    two_steps(str(BASE))  # what the libraries take at their first use
    gc.collect()
    before = _resident("VmRSS")
    two_steps(folder)
    pipe.send(_resident("VmHWM") - before)
    ranks.leave()


def test_a_step_of_two_processes_that_share_the_base_model_takes_what_was_planned(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=8192, hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    load_tokenizer(str(BASE)).save_pretrained(tmp_path)
    plan = plan_training(
        AutoConfig.from_pretrained(tmp_path), SHARED, rows=SHARED_ROWS, tokens=TOKENS, dtype=torch.float32,
        max_tokens=10**6, shards=2,
    )  # fmt: skip
    measured = max(results_of(start_two(_measure_shared, str(tmp_path))))
    planned = plan.adaptation
    print(f"planned {planned / 2**20:.0f} MiB, measured {measured / 2**20:.0f}")
    assert planned == pytest.approx(measured, rel=0.15)
    assert plan.base + plan.gathered > 0.3 * planned


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
    assert plan.kv_tokens == (int(0.92 * 2**30) - plan.weights - plan.slots) // plan.kv_token
    assert plan.questions == plan.kv_tokens // (64 * 8)


def test_the_command_tells_the_plan_and_what_is_wrong(abmll: CommandLine, tmp_path: Path) -> None:
    shown = abmll("plan", "--rows", 2, "--tokens", 16, "--gpu", "l4").out
    assert "abmll serve --model abmll-small" in shown
    # The others with two of its blocks: a plan goes through every operation.
    config = AutoConfig.from_pretrained(BASE)
    config.num_hidden_layers = 2
    config.save_pretrained(tmp_path / "shallow")
    plan = ("plan", "--model", tmp_path / "shallow", "--tokens", 16)
    told = abmll(*plan, "--rows", 2, "--json").json
    assert told["training"]["peak"] > told["training"]["base"]
    alike = abmll(*plan, "--rows", 2, "--gpu", "l4").out
    assert f"{told['training']['base_parameters']:,}" in alike
    assert "does not fit" not in shown
    # Weights and draws would fit on the whole of it, but not a question beside them in the part that vLLM takes.
    small = abmll("plan", "--rows", 1, "--episode", 1, "--tokens", 1_000_000, "--utilization", 0.05, "--gpu", "l4").out
    assert "serving does not fit on one l4 (1.1 GiB of it)" in small
    assert "abmll-small reads 1,024 tokens at most, not 1,000,000" in small
    assert told["training"]["objective"] > told["training"]["step"]  # 32 examples, as train has
    alone = abmll(*plan, "--rows", 2, "--episode", 2, "--json").json["training"]
    assert alone["peak"] < told["training"]["peak"]
    assert alone["adaptation"] == told["training"]["adaptation"]
    options = ("--layers", "last", "--revision", "main", "--dtype", "float32", "--utilization", 0.5, "--slots", 9)
    train, serve = abmll(*plan, "--rows", 2, *options, "--draws", 99, "--json").json["commands"]
    assert all(words in train for words in ("--layers last", "--revision main", "--dtype float32"))
    assert all(words in serve for words in ("--revision main", "--draws 99 --max-draws 99", "--engine vllm"))
    assert "--vllm-option gpu_memory_utilization=0.5 --vllm-option max_loras=9" in serve
    shared = abmll(*plan, "--rows", 4, "--shards", 2, "--json").json
    embedding = 2 * config.vocab_size * config.hidden_size  # tied to the head, each process has a share of two
    assert shared["training"]["base"] == (told["training"]["base"] + embedding) // 2
    assert shared["training"]["step_flops"] == told["training"]["step_flops"]  # two rows in each process
    assert shared["commands"][0].startswith("torchrun --nproc-per-node 2 -m server.cli train")
    assert shared["commands"][0].split()[-3:] == ["--shard-base", "--out", "posterior"]
    cores = (*plan, "--rows", 4, "--family", "subspace", "--steps", 7)
    plain, mixed = (abmll(*cores, *more, "--json").json for more in ((), ("--members", 4, "--components", 90)))
    one, times = plain["training"]["step_seconds"], mixed["training"]
    assert plain["training"]["adaptation_seconds"] == pytest.approx(5 * 7 * one)
    assert times["adaptation_seconds"] == pytest.approx(4 * 5 * 7 * one)
    assert times["weighing_seconds"] == pytest.approx(90 * one / 2)
    assert times["components_seconds"] == pytest.approx(90 * 34 * one)  # 96 examples, of which 4 a step: 7 * sqrt(24)
    assert "--members 4 --components 90" in mixed["commands"][0]
    assert "members" not in plain["commands"][0]
    shown = abmll(*cores, "--components", 90).out
    assert "adaptation: 90 components weighed by 4 examples" in shown
    three = abmll(*cores, "--members", 3, "--json").json
    assert three["serving"]["questions"] == abmll(*cores, "--draws", 12, "--json").json["serving"]["questions"]
    assert "--members 3 --calibration-draws 12" in three["commands"][0]
    again = abmll(*cores, "--components", 90, "--gradient-checkpointing", "--json").json["training"]
    assert again["weighing_seconds"] == pytest.approx(90 * again["step_seconds"] / 3)
    assert "not kronecker ones; give 1" in abmll(*plan, "--members", 4).refusal
    assert "not a kronecker one; give 0" in abmll(*plan, "--components", 4).refusal
    apart = abmll(*plan, "--rows", 2, "--tensor-parallel", 2, "--json").json
    assert apart["serving"]["weights"] == -(-told["serving"]["weights"] // 2)
    assert told["serving"]["slots"] / 2 < apart["serving"]["slots"] < told["serving"]["slots"]
    heads = config.num_key_value_heads
    assert apart["serving"]["kv_token"] * heads == told["serving"]["kv_token"] * max(1, heads // 2)
    assert apart["commands"][1].endswith("--engine vllm --vllm-option tensor_parallel_size=2")
    assert "attention heads cannot be divided among 5" in abmll(*plan, "--tensor-parallel", 5).refusal
    LlamaConfig(hidden_size=16384, intermediate_size=53248, num_hidden_layers=12, vocab_size=4096).save_pretrained(
        tmp_path
    )
    large = abmll("plan", "--model", tmp_path, "--rows", 2, "--tokens", 16, "--gpu", "l4", "--shards", 2).out
    assert "training: base weights gathered beside it" in large
    assert "training does not fit on each l4 (22.5 GiB)" in large
    assert "(--shards 4)" in large
    config.num_hidden_layers, config.vocab_size = 2, 512  # an embedding is not packed
    config.save_pretrained(tmp_path / "deep")
    deep = ("plan", "--model", tmp_path / "deep", "--tokens", 16, "--rows", 1)
    plain, packed = abmll(*deep, "--json").json, abmll(*deep, "--dtype", "nf4", "--json").json
    assert packed["training"]["base"] < 0.4 * plain["training"]["base"]
    assert packed["serving"] == plain["serving"]  # vLLM packs no weights so
    assert "--dtype nf4" in packed["commands"][0]
    assert "--dtype nf4" in packed["commands"][1]  # of adaptation
    assert abmll("plan", "--dtype", "float16").code == 2  # train does not take it
    assert "known: l4" in abmll(*plan, "--gpu", "abacus").refusal
    assert "linear layers are" in abmll("plan", "--targets", "x").refusal
    assert "config.json" in abmll("plan", "--model", "/nowhere").refusal
