"""Base weights in 4 bits: NF4 of bitsandbytes (QLoRA, Dettmers et al. 2023, arXiv 2305.14314)."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from abmll.errors import AbmllError

# What ``dtype`` says for it. All that is no linear layer's weight is bfloat16, and so are the products.
NF4 = "nf4"

_BLOCK = 64  # entries that share a scale
_SCALES = 256  # scales that share one of their own (double quantization)
_CODE_BYTES = 4 * (16 + _SCALES + 1)  # the 16 values of 4 bits, the 256 of a scale, and the scales' mean


def check_installed() -> None:
    """Checks that there is what packs weights.

    Raises:
        AbmllError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise AbmllError(
            "base weights in 4 bits need bitsandbytes: pip install 'abmll[nf4]', or give dtype bfloat16", field="dtype"
        )


def quantization() -> Any:
    """Returns what transformers quantizes a model by while it loads it.

    Raises:
        AbmllError: bitsandbytes is not installed.
    """
    check_installed()
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def settle(model: Any) -> None:
    """Keeps a loaded model's weights as they were packed.

    After a pass without gradients on some CPUs, bitsandbytes 0.50 packs them otherwise, for an operation that has no
    gradient: later gradients through it are wrong, with a warning and no error.
    """
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


@dataclass(frozen=True)
class Packing:
    """What packing a model's weights changes, in bytes.

    Attributes:
        saved: The model's weights are smaller by so much.
        unpacked: The largest weight, unpacked while its layer runs.
    """

    saved: int
    unpacked: int


def packing(model: Any) -> Packing:
    """Returns what packing would change; packed are all linear layers' weights but the output embeddings'.

    Args:
        model: A transformers model in bfloat16.
    """
    output = model.get_output_embeddings()
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and layer is not output]
    sizes = [layer.weight.nbytes for layer in layers]
    return Packing(sum(sizes) - sum(_packed_bytes(layer.weight.numel()) for layer in layers), max(sizes))


def _packed_bytes(entries: int) -> int:
    scales = -(-entries // _BLOCK)
    return -(-entries // 2) + scales + 4 * -(-scales // _SCALES) + _CODE_BYTES
