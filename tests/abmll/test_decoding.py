"""Sampling by Gumbel noise is sampling from the softmax, row by row."""

from __future__ import annotations

import torch

from abmll.decoding import GumbelNoise
from abmll.sampling import Sampling

ROWS = 20_000
LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0])
IDS = torch.zeros(ROWS, 1, dtype=torch.long)


def frequencies(sampling: Sampling) -> torch.Tensor:
    seeds = [Sampling(1, seed=seed).seed_of(None) for seed in range(ROWS)]
    chosen = GumbelNoise(sampling, seeds, "cpu")(IDS, LOGITS.repeat(ROWS, 1)).argmax(dim=-1)
    return torch.bincount(chosen, minlength=4) / ROWS


def test_tokens_are_as_frequent_as_they_are_likely() -> None:
    for temperature in (0.5, 1.0, 2.0):
        expected = (LOGITS / temperature).softmax(-1)
        error = 4 * (expected * (1 - expected) / ROWS).sqrt()  # four standard errors
        assert ((frequencies(Sampling(1, temperature=temperature)) - expected).abs() < error).all()


def test_top_p_leaves_the_likeliest_tokens_that_together_have_it() -> None:
    softmax = LOGITS.softmax(-1)  # 0.64, 0.24, 0.09, 0.03
    found = frequencies(Sampling(1, temperature=1.0, top_p=0.7))
    assert found[2:].sum() == 0
    assert abs(found[0] - softmax[0] / softmax[:2].sum()) < 0.02
    assert frequencies(Sampling(1, temperature=1.0, top_p=0.5))[0] == 1


def test_a_row_is_chosen_by_its_own_seed_whatever_shares_the_batch() -> None:
    alone = GumbelNoise(Sampling(1, temperature=1.0), [7], "cpu")(IDS[:1], LOGITS[None])
    among = GumbelNoise(Sampling(1, temperature=1.0), [3, 7, 9], "cpu")(IDS[:3], LOGITS.repeat(3, 1))
    assert torch.equal(alone[0], among[1])
    assert not torch.equal(among[0], among[2])
    assert len({Sampling(1, seed=seed).seed_of(draw) for seed in range(3) for draw in (None, 0, 1)}) == 9
