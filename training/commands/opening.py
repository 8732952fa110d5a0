"""Opening a posterior's base model."""

from __future__ import annotations

from typing import Any

from training.settings import choose_device


def dtype_of(name: str) -> Any:
    """Returns torch's dtype of a name.

    Raises:
        AbmllError: It is neither float32 nor bfloat16.
    """
    import torch

    from abmll.errors import AbmllError

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if name not in known:
        raise AbmllError(f"dtype is {name!r}; give float32 or bfloat16", field="dtype")
    return known[name]


def open_base(posterior: Any, model: str | None, dtype: str, device: str | None) -> tuple[Any, Any, Any]:
    """Loads a posterior's base model, checks that it is the one, and attaches.

    Returns:
        The base model, its attached layers, and the posterior on the same device.

    Raises:
        AbmllError: The model cannot be had, or the posterior was made for another.
    """
    from abmll.layers import attach, check_base, fingerprint
    from training.base_model import load_base
    from training.embedded import resolve

    name = model or posterior.config.base_model
    revision = posterior.config.base_revision if name == posterior.config.base_model else None
    base = load_base(resolve(name), revision=revision, dtype=dtype_of(dtype), device=choose_device(device))
    attached = attach(base.model, posterior.config.targets, posterior.config.layers)
    check_base(posterior, fingerprint(lambda key: attached.layers[key].base.weight, attached.layers), name)
    return base, attached, posterior.map(lambda tensor: tensor.to(base.device))
