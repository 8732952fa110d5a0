"""What an answer is told with."""

from __future__ import annotations

import pytest
import torch

from abmll.predictive import predictive
from server.judgements import judge_options


def test_standard_errors_are_those_of_mirrored_draws() -> None:
    scores = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    judged = judge_options(["a", "b", "c"], scores, None)
    mirrored, independent = (predictive(scores, mirrored=m) for m in (True, False))
    assert judged.standard_errors == pytest.approx(mirrored.standard_errors.tolist())
    assert judged.standard_error == pytest.approx(mirrored.standard_error.item())
    assert judged.standard_error != pytest.approx(independent.standard_error.item(), rel=0.01)
