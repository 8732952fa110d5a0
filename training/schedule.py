"""The rate of learning over tasks: what share of the full one a step has."""

from __future__ import annotations

import math

_LEAST = 0.05


def rate_share(step: int, over: float, warmup: int) -> float:
    """Share of the full rate: a linear warm-up times a cosine that falls from 1 to 0.05.

    Args:
        step: Steps that were taken before.
        over: How much of the training is over, 0 to 1.
        warmup: Steps of the warm-up.
    """
    warm = min(1.0, (step + 1) / max(1, warmup))
    return warm * (_LEAST + (1 - _LEAST) * 0.5 * (1 + math.cos(math.pi * over)))
