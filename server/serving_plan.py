"""What serving takes, from the base model's configuration alone."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import BaseModel, Field
from transformers import AutoModelForCausalLM

from abmll.layers import target_layers
from abmll.posterior import PosteriorConfig
from server.vllm_setup import adapter_rank, fused


class ServingPlan(BaseModel, frozen=True):
    """Sizes of a served model.

    Attributes:
        weights: Bytes of the base model.
        adapter: Bytes of one draw.
        slots: Bytes that vLLM sets aside for the draws that run in one step.
        kv_token: Bytes of keys and values of one token.
        kv_room: Bytes that are left for keys and values.
        kv_tokens: Tokens that fit there.
        questions: Questions that fit there at a time, each with all its draws, nothing shared.
    """

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
    utilization: float = 0.9,
    dtype: torch.dtype = torch.bfloat16,
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

    Raises:
        AbmllError: The model has no such targets, or draws are of a rank that vLLM does not take.
    """
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    layers = target_layers(model, posterior.targets, posterior.layers)
    size, rank = dtype.itemsize, adapter_rank(posterior.draw_rank)
    adapter = sum(rank * (layer.in_features + layer.out_features) for layer in layers.values()) * size
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    taken = slots * _slot_entries(model, posterior, rank) * size
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kv = 2 * text.num_hidden_layers * heads * width * size
    room = max(0, int(utilization * memory) - weights - taken)
    return ServingPlan(
        weights=weights,
        adapter=adapter,
        slots=taken,
        kv_token=kv,
        kv_room=room,
        kv_tokens=room // kv,
        questions=room // (kv * tokens * draws),
    )


def _slot_entries(model: Any, posterior: PosteriorConfig, rank: int) -> int:
    """Entries of one slot: vLLM keeps one for every module that runs fused with a target, in every block."""
    runs = {fused(target) for target in posterior.targets}
    return sum(
        rank * (layer.in_features + layer.out_features)
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and fused(name.rsplit(".", 1)[-1]) in runs
    )
