"""Gradient checkpointing: what a model's blocks remember for the backward pass is computed again there."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from abmll.errors import AbmllError


def recompute_activations(model: nn.Module) -> None:
    """Makes a model's blocks keep their inputs alone where gradients are wanted, to save memory.

    transformers' own way wants the model in training mode: some models then have dropout, and all forget their
    cache of keys and values, so that they cannot decode. This one changes nothing where no gradient is wanted.

    Args:
        model: A model of transformers.

    Raises:
        AbmllError: Its code does not say which of its modules are blocks.
    """
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        raise AbmllError(
            f"{type(model).__name__} has no blocks whose activations could be computed again; train without "
            "--gradient-checkpointing",
            field="gradient_checkpointing",
        )
    for block in blocks:
        block.forward = partial(_recomputed, block.forward)


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # Nothing in there is random: signs are drawn before.
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
