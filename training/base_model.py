"""Loading the base model and its tokenizer, from the hub or from a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from abmll.errors import AbmllError


@dataclass(frozen=True)
class BaseModel:
    """A causal language model ready to take a posterior.

    Attributes:
        name: Hub name or folder.
        model: The transformers model, in eval mode.
        tokenizer: Its tokenizer, with a pad token.
        context: The most tokens that it takes.
    """

    name: str
    model: Any
    tokenizer: Any
    context: int

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return next(self.model.parameters()).device


def load_base(
    name: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    context: int | None = None,
    gradient_checkpointing: bool = False,
) -> BaseModel:
    """Loads a causal language model from the hub or a folder; safetensors weights only.

    Args:
        name: Hub name or folder.
        revision: Commit or tag on the hub.
        dtype: Of the frozen weights.
        device: Where to put them.
        context: The most tokens to take; the model's own limit by default.
        gradient_checkpointing: Recompute activations in the backward pass, to save memory.

    Raises:
        AbmllError: The model cannot be had; the message says what to do.
    """
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
        tokenizer: Any = AutoTokenizer.from_pretrained(name, revision=revision)
        model: Any = AutoModelForCausalLM.from_pretrained(
            name, revision=revision, dtype=dtype, use_safetensors=True, attn_implementation="sdpa"
        )
    except (OSError, ValueError) as error:
        hint = "check the folder" if Path(name).exists() else "check the name, your access and HF_TOKEN, or download it"
        raise AbmllError(f"cannot load the base model {name}: {error}; {hint}", field="model") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 2048
    if context is not None and context > limit:
        raise AbmllError(f"context {context} exceeds the {limit} positions of {name}", field="context")
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()  # transformers checkpoints in training mode only; the models served have no dropout
    else:
        model.eval()
    return BaseModel(name, model.to(device), tokenizer, context or limit)
