"""What serving takes, from the base model's configuration alone."""

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic import BaseModel, Field
from transformers import AutoModelForCausalLM

from abmll.errors import AbmllError
from abmll.layers import target_layers
from abmll.posterior import PosteriorConfig
from server.vllm_setup import adapter_rank, fused

# Modules whose weights several GPUs divide by inputs; the others', by outputs.
_DIVIDED_BY_INPUTS = {"o_proj", "down_proj"}


class ServingPlan(BaseModel, frozen=True):
    """Sizes of a served model; bytes are those of one GPU.

    Attributes:
        parallel: GPUs that hold the model together.
        weights: Bytes of the base model.
        adapter: Bytes of one draw.
        slots: Bytes that vLLM sets aside for the draws that run in one step.
        kv_token: Bytes of keys and values of one token.
        kv_room: Bytes that are left for keys and values.
        kv_tokens: Tokens that fit there.
        questions: Questions that fit there at a time, each with all its draws, nothing shared.
    """

    parallel: int
    weights: int = Field(description="bytes")
    adapter: int = Field(description="bytes")
    slots: int = Field(description="bytes")
    kv_token: int = Field(description="bytes")
    kv_room: int = Field(description="bytes")
    kv_tokens: int
    questions: int


def plan_serving(
    config: Any,
    posterior: PosteriorConfig,
    *,
    draws: int,
    slots: int,
    tokens: int,
    memory: int,
    utilization: float = 0.92,
    dtype: torch.dtype = torch.bfloat16,
    parallel: int = 1,
) -> ServingPlan:
    """Adds up what vLLM holds; what it needs for activations is not counted.

    Args:
        config: The base model's configuration.
        posterior: What the posterior is made of.
        draws: Draws of a question.
        slots: Draws that run in one step.
        tokens: Tokens of a question and its answer.
        memory: Of the GPU, bytes.
        utilization: The part of it that vLLM takes.
        dtype: Of weights, adapters, keys and values.
        parallel: GPUs that hold the model together (vLLM's ``tensor_parallel_size``).

    Raises:
        AbmllError: The model has no such targets, draws are of a rank that vLLM does not take, or the model's heads
            cannot be divided among so many GPUs.
    """
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    text = config.get_text_config()
    if text.num_attention_heads % parallel:
        raise AbmllError(
            f"{text.num_attention_heads} attention heads cannot be divided among {parallel} GPUs; give one of "
            f"{', '.join(str(n) for n in range(1, 65) if text.num_attention_heads % n == 0)}",
            field="tensor_parallel",
        )
    layers = target_layers(model, posterior.targets, posterior.layers)
    size, rank = dtype.itemsize, adapter_rank(posterior.draw_rank)
    adapter = sum(rank * (layer.in_features + layer.out_features) for layer in layers.values()) * size
    weights = math.ceil(sum(tensor.numel() * tensor.element_size() for tensor in model.parameters()) / parallel)
    taken = slots * _slot_entries(model, posterior, rank, parallel) * size
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kv = 2 * text.num_hidden_layers * max(1, heads // parallel) * width * size
    room = max(0, int(utilization * memory) - weights - taken)
    return ServingPlan(
        parallel=parallel,
        weights=weights,
        adapter=adapter,
        slots=taken,
        kv_token=kv,
        kv_room=room,
        kv_tokens=room // kv,
        questions=room // (kv * tokens * draws),
    )


def _slot_entries(model: Any, posterior: PosteriorConfig, rank: int, parallel: int) -> int:
    """Entries of one slot: vLLM keeps one for every module that runs fused with a target, in every block.

    Of several GPUs each has all of the factor on the side that its weights are not divided on.
    """
    runs = {fused(target) for target in posterior.targets}
    entries = 0
    for name, layer in model.named_modules():
        module = name.rsplit(".", 1)[-1]
        if isinstance(layer, torch.nn.Linear) and fused(module) in runs:
            by_rows = module in _DIVIDED_BY_INPUTS
            whole, divided = (layer.out_features, layer.in_features)[:: 1 if by_rows else -1]
            entries += rank * (whole + divided // parallel)
    return entries
