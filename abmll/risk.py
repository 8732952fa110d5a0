"""Thresholds on confidence that keep wrong answers rare (conformal risk control)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def risk_thresholds(confidence: Sequence[Tensor], correct: Sequence[Tensor]) -> dict[str, float]:
    """Confidence that answers must pass, so that few questions of a new task get a wrong answer.

    Conformal risk control (Angelopoulos et al. 2022, arXiv 2208.02814, eq. 4): with L_i(t) the share of task i's
    questions whose answer is wrong and has a confidence above t, the smallest t at which

        (sum_i L_i(t) + 1) / (n + 1) <= risk

    bounds the expected L of a new task exchangeable with these n by ``risk``. Questions that get no answer count as
    not wrong.

    Args:
        confidence: Of each task's answers, shape (questions,).
        correct: Whether they were right, shape (questions,).

    Returns:
        Risk ("0.01" to "0.50") to threshold; risks that so few tasks cannot bound are left out.
    """
    n = len(confidence)
    wrong = torch.cat([each[~right].double() for each, right in zip(confidence, correct, strict=True)])
    share = torch.cat([torch.full((int((~right).sum()),), 1 / len(right), dtype=torch.float64) for right in correct])
    thresholds, order = torch.cat([wrong.new_zeros(1), wrong]).sort()
    above = share.sum() - torch.cat([share.new_zeros(1), share])[order].cumsum(dim=0)
    bound = (above.clamp_min(0) + 1) / (n + 1)
    found: dict[str, float] = {}
    for percent in range(1, 51):
        (enough,) = torch.nonzero(bound <= percent / 100 + 1e-12, as_tuple=True)
        if len(enough):
            found[f"{percent / 100:.2f}"] = thresholds[enough[0]].item()
    return found


def lenient_threshold(thresholds: Mapping[str, float], risk: float) -> float | None:
    """The threshold of the largest risk, as ``risk_thresholds`` names them, that is at most ``risk``; None: none is."""
    known = [float(level) for level in thresholds if float(level) <= risk + 1e-9]
    return thresholds[f"{max(known):.2f}"] if known else None
