"""What vLLM must be told before it starts: environment, names and ranks as it knows them, shapes of layers."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from abmll.errors import AbmllError

# vLLM builds its kernels for these ranks alone.
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Follow from the posterior, or from options of ``abmll serve``.
_OURS = {
    "model",
    "revision",
    "max_model_len",
    "enable_lora",
    "max_lora_rank",
    "lora_target_modules",
    "max_logprobs",
    "logprobs_mode",
    "worker_extension_cls",
}
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


def parse_options(texts: Sequence[str], option: str = "--vllm-option") -> dict[str, Any]:
    """Reads arguments such as those of vLLM's engine: ``NAME=VALUE``, the value as JSON where it is JSON.

    Raises:
        AbmllError: One has no name or no value, or is given twice.
    """
    options: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name or not equals:
            example = "gpu_memory_utilization=0.5" if option == "--vllm-option" else "GPU=1"
            raise AbmllError(f"{option} {text} is not NAME=VALUE, such as {example}")
        name = name.replace("-", "_")
        if name in options:
            raise AbmllError(f"{option} {name} is given twice")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


def check_options(options: Mapping[str, Any]) -> None:
    """Checks the names of arguments of vLLM's engine.

    Raises:
        AbmllError: vLLM has no such argument, or it is not the user's to set.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs

    known = [field.name for field in dataclasses.fields(AsyncEngineArgs)]
    for name in options:
        if name in _OURS:
            raise AbmllError(f"--vllm-option {name} is set by abmll itself; leave it out")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else "see vLLM's engine arguments"
            raise AbmllError(f"vLLM's engine has no argument {name}; {hint}")


def set_environment() -> None:
    """Settings that vLLM reads from the environment; what the user has set stays."""
    defaults = {
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "TOKENIZERS_PARALLELISM": "false",
        # The scores that tests hold against the torch engine's are those of this one.
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        # A fork of a process that has run torch on several threads can hang at its first parallel loop.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }
    for key, value in defaults.items():
        os.environ.setdefault(key, value)


def target_shapes(model: str, revision: str | None, targets: Sequence[str], layers: str) -> dict[str, tuple[int, int]]:
    """Names and shapes (d_out, d_in) of the targeted layers, from the configuration alone.

    Raises:
        AbmllError: The model cannot be had, or has no such targets.
    """
    from transformers import AutoModelForCausalLM

    from abmll.layers import target_layers
    from training.plan import read_config

    config = read_config(model, revision)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    return {
        name: (layer.out_features, layer.in_features) for name, layer in target_layers(empty, targets, layers).items()
    }
