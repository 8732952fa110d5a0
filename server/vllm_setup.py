"""What vLLM must be told before it starts: environment, names and ranks as it knows them, shapes of layers."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from abmll.errors import AbmllError

# vLLM builds its kernels for these ranks alone.
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# vLLM runs these projections as one, and knows LoRA targets by the fused name.
_FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}


def adapter_rank(rank: int) -> int:
    """Returns the smallest rank that vLLM supports and a draw fits in.

    Raises:
        AbmllError: The draw's rank is too large for any.
    """
    for supported in RANKS:
        if supported >= rank:
            return supported
    raise AbmllError(f"draws have rank {rank}; vLLM takes at most {RANKS[-1]}: lower the posterior's rank")


def fused(target: str) -> str:
    """Returns the name that vLLM knows a targeted module by."""
    return _FUSED.get(target, target)


def set_environment() -> None:
    """Settings that vLLM reads from the environment; what the user has set stays."""
    defaults = {
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "TOKENIZERS_PARALLELISM": "false",
        # A fork of a process that has run torch on several threads can hang at its first parallel loop.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }
    for key, value in defaults.items():
        os.environ.setdefault(key, value)


def target_shapes(model: str, revision: str | None, targets: Sequence[str], layers: str) -> dict[str, tuple[int, int]]:
    """Names and shapes (d_out, d_in) of the targeted layers, from the configuration alone."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from abmll.layers import target_layers

    config = AutoConfig.from_pretrained(model, revision=revision)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    return {
        name: (layer.out_features, layer.in_features) for name, layer in target_layers(empty, targets, layers).items()
    }
