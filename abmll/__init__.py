"""Amortized Bayesian meta-learning for LoRA: the method; ``abmll.load`` gives a posterior ready to be asked."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["load"]  # pyright: ignore[reportUnsupportedDunderAll] -- given by __getattr__


def __getattr__(name: str) -> Any:
    """Hands ``load`` on from ``training``, which builds on this package: it cannot be imported at the top."""
    if name == "load":
        return import_module("training.notebook").load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
