"""Random layers and posteriors, and tiny models of several architectures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from abmll.layers import Attached, attach, init_posterior
from abmll.posterior import Family, LayerPosterior, Posterior, PosteriorConfig, init_layer

FAMILIES: list[Family] = ["lowrank", "kronecker", "subspace"]
ARCHITECTURES = {
    "llama": ("q_proj", "v_proj"),
    "llama3": ("q_proj", "v_proj"),
    "gemma2": ("q_proj", "gate_proj"),
    "mistral": ("q_proj", "o_proj", "down_proj"),
    "qwen2": ("k_proj", "up_proj"),
    "opt": ("q_proj", "fc1"),
    "gpt_neox": ("query_key_value", "dense_4h_to_h"),
}
_GROUPED: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


_EAGER: dict[str, Any] = {"attn_implementation": "eager"}
_LLAMA3_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def tiny_model(architecture: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    shared: dict[str, Any] = {"vocab_size": 96, "max_position_embeddings": 128, "pad_token_id": 0}
    layers: dict[str, Any] = {"num_hidden_layers": 2}
    heads: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4}
    model: Any = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**shared, **layers, **_GROUPED)),
        # As Llama 3.2: rotary positions rescaled, output head tied to the embedding.
        "llama3": lambda: LlamaForCausalLM(
            LlamaConfig(**shared, **layers, **_GROUPED, tie_word_embeddings=True, rope_parameters=_LLAMA3_ROPE)
        ),
        # Logits are capped, every second layer sees a window alone, and the width of a head is its own.
        "gemma2": lambda: Gemma2ForCausalLM(
            Gemma2Config(
                **shared,
                **layers,
                **_GROUPED,
                head_dim=16,
                query_pre_attn_scalar=16,
                sliding_window=8,
                final_logit_softcapping=3.0,
                **_EAGER,
            )
        ),
        "mistral": lambda: MistralForCausalLM(MistralConfig(**shared, **layers, **_GROUPED)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**shared, **layers, **_GROUPED)),
        "opt": lambda: OPTForCausalLM(
            OPTConfig(**shared, **layers, **heads, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0)
        ),
        "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**shared, **layers, **heads, intermediate_size=48)),
    }[architecture]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)  # else all logits are nearly equal
    return model.to(dtype).eval()


def random_layer(
    family: Family, d_out: int, d_in: int, seed: int, dtype: torch.dtype = torch.float64
) -> LayerPosterior:
    """A layer whose every parameter is far from its start."""
    generator = torch.Generator().manual_seed(seed)
    config = PosteriorConfig(base_model="x", family=family, rank=3, scale_rank=2, scale_init=0.2)
    layer = init_layer(d_out, d_in, config, generator, dtype)
    noise = {k: 0.3 * torch.randn(t.shape, generator=generator, dtype=dtype) for k, t in layer.tensors().items()}
    return layer.with_tensors({key: tensor + noise[key] for key, tensor in layer.tensors().items()})


def random_posterior(attached: Attached, family: Family, targets: tuple[str, ...], seed: int) -> Posterior:
    config = PosteriorConfig(
        base_model="tiny",
        targets=targets,
        layers="last" if attached.trunk else "all",
        family=family,
        rank=3,
        scale_rank=2,
        scale_init=0.05,
    )
    generator = torch.Generator().manual_seed(seed)
    dtype = next(attached.model.parameters()).dtype
    start = init_posterior(attached, config, seed)
    # Less on the scales: an entry of lowrank's |b a + c| near 0 makes KL of the order of a million.
    noise = {
        key: (0.1 if ".mean." in key else 0.05) * torch.randn(t.shape, generator=generator, dtype=dtype)
        for key, t in start.tensors().items()
    }
    return start.with_tensors({key: t.to(dtype) + noise[key] for key, t in start.tensors().items()})


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture
def llama() -> Attached:
    return attach(tiny_model("llama"), ARCHITECTURES["llama"])
