"""Tiny random models of the architectures that people take from the hub, with a tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, LlamaConfig, MistralConfig, Qwen2Config

_SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
# Short enough for tests' prompts to go beyond what it was trained on.
_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
ARCHITECTURES: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "llama-3.1": (LlamaConfig, {"tie_word_embeddings": False, "rope_parameters": _ROPE}),
    "llama-3.2": (LlamaConfig, {"tie_word_embeddings": True, "rope_parameters": _ROPE}),
    # A head's width is not its own to say: it follows from the others.
    "qwen2": (Qwen2Config, {"tie_word_embeddings": False, "num_attention_heads": 2, "num_key_value_heads": 1}),
    "mistral": (MistralConfig, {"tie_word_embeddings": False, "sliding_window": 16}),
    # Every second layer sees a window alone; scores of attention and logits are capped, low enough to matter here.
    "gemma-2": (
        Gemma2Config,
        {
            "sliding_window": 16,
            "query_pre_attn_scalar": 32,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 5.0,
        },
    ),
}


def write_model(architecture: str, tokenizer: Path, folder: Path) -> Path:
    """Writes a model in float32, the same each time.

    Args:
        architecture: A name in ``ARCHITECTURES``.
        tokenizer: Folder whose tokenizer it gets.
        folder: To make.
    """
    kind, more = ARCHITECTURES[architecture]
    shutil.copytree(tokenizer, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    vocabulary = len(AutoTokenizer.from_pretrained(tokenizer))
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(kind(vocab_size=vocabulary, **(_SHAPE | more), dtype="float32"))
    with torch.no_grad():
        for parameter in model.parameters():
            # Larger than at initialization, so that answers differ from uniform; biases are zero there.
            parameter.mul_(4.0) if parameter.any() else parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    return folder
