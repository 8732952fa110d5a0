"""Uncertainty of texts: whole, and token by token."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from abmll.predictive import entropy
from abmll.sequences import TokenScores, sequence_predictive, token_predictive


def test_sequence_uncertainty_of_draws_that_agree_is_aleatoric() -> None:
    log_probs = torch.tensor([[-1.0, -2.0, -0.5]]).expand(4, 3)
    result = sequence_predictive(log_probs)
    assert result.probability == pytest.approx(math.exp(-3.5))
    assert result.per_token == pytest.approx(math.exp(-3.5 / 3))
    assert result.total == pytest.approx(result.aleatoric) == pytest.approx(3.5 / 3)
    assert result.epistemic == pytest.approx(0.0, abs=1e-12)
    assert result.standard_error == pytest.approx(0.0, abs=1e-12)


@given(st.lists(st.lists(st.floats(-30, 0), min_size=2, max_size=2), min_size=1, max_size=8))
def test_sequence_uncertainty_adds_up_and_is_bounded(rows: list[list[float]]) -> None:
    result = sequence_predictive(torch.tensor(rows, dtype=torch.float64))
    assert result.total == pytest.approx(result.aleatoric + result.epistemic, abs=1e-9)
    assert 0 <= result.epistemic <= math.log(len(rows)) / 2 + 1e-9
    assert 0 <= result.probability <= result.per_token <= 1 + 1e-12


def test_importance_weighted_epistemic_has_the_mutual_information_as_its_mean() -> None:
    """Exact sum over all sequences of one token, against total - aleatoric from the distributions."""
    each = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.2, 0.2, 0.6]], dtype=torch.float64)
    mean = each.mean(0)
    exact = torch.special.entr(mean).sum() - torch.special.entr(each).sum(1).mean()
    estimate = sum(float(mean[y]) * sequence_predictive(each[:, y : y + 1].log()).epistemic for y in range(3))
    assert estimate == pytest.approx(float(exact))


def random_scores(draws: int, tokens: int, vocabulary: int, likely: int, seed: int = 0) -> tuple[TokenScores, Tensor]:
    """Scores of a text of random tokens, and the draws' whole distributions, shape (draws, tokens, vocabulary)."""
    generator = torch.Generator().manual_seed(seed)
    every = torch.randn(draws, tokens, vocabulary, generator=generator, dtype=torch.float64).mul(2).log_softmax(-1)
    text = torch.randint(0, vocabulary, (tokens,), generator=generator)
    others = every.mean(0).topk(likely, dim=-1).indices
    picked = every.gather(-1, text[None, :, None].expand(draws, tokens, 1)).squeeze(-1)
    return TokenScores(text, picked, others, every.gather(-1, others.expand(draws, tokens, likely))), every


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 5), st.integers(0, 100))
def test_probabilities_of_tokens_multiply_to_that_of_the_text(draws: int, tokens: int, likely: int, seed: int) -> None:
    scores, _ = random_scores(draws, tokens, 6, likely, seed)
    whole, each = sequence_predictive(scores.log_probs), token_predictive(scores)
    assert each.probability.log().sum().exp().item() == pytest.approx(whole.probability, rel=1e-9)
    torch.testing.assert_close(each.total, each.aleatoric + each.epistemic)


def test_uncertainty_of_a_token_is_that_of_the_draws_that_foresaw_the_text() -> None:
    """All of the vocabulary is told: entropies by hand, with the draws weighed by Bayes's rule."""
    scores, every = random_scores(draws=3, tokens=4, vocabulary=5, likely=5)
    found = token_predictive(scores)
    belief = torch.full((3,), 1 / 3, dtype=torch.float64)
    for at, token in enumerate(scores.tokens.tolist()):
        each = every[:, at].exp()
        mean = belief @ each
        assert found.probability[at].item() == pytest.approx(mean[token].item())
        assert found.total[at].item() == pytest.approx(entropy(mean).item())
        assert found.epistemic[at].item() == pytest.approx((entropy(mean) - belief @ entropy(each)).item())
        torch.testing.assert_close(found.others[at], mean[scores.others[at]])
        belief = belief * each[:, token]
        belief /= belief.sum()


def test_tokens_that_are_not_told_apart_take_doubt_away_but_never_add_any() -> None:
    full, _ = random_scores(draws=4, tokens=6, vocabulary=40, likely=40)
    some, _ = random_scores(draws=4, tokens=6, vocabulary=40, likely=30)
    whole, part = token_predictive(full), token_predictive(some)
    assert (part.total <= whole.total + 1e-12).all()
    assert (part.epistemic <= whole.epistemic + 1e-12).all()
    assert (part.epistemic > 0.5 * whole.epistemic).all()


def test_draws_that_agree_have_nothing_to_learn_about_a_token() -> None:
    scores, _ = random_scores(draws=1, tokens=3, vocabulary=8, likely=3)
    same = TokenScores(
        scores.tokens, scores.log_probs.expand(4, 3), scores.others, scores.other_log_probs.expand(4, 3, 3)
    )
    assert token_predictive(same).epistemic.max().item() == pytest.approx(0.0, abs=1e-12)
