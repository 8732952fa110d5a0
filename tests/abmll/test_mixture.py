"""Posteriors that are mixtures of several Gaussians over a core."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from abmll.draw_scores import score_draws
from abmll.draws import draw, draw_signs, drawn_core
from abmll.errors import InvalidPosterior
from abmll.kl import kl
from abmll.layers import Attached, attach
from abmll.posterior import Posterior, PosteriorConfig, mean, members_of, mixture
from abmll.scoring import Question
from abmll.store import Record, load_global, load_posterior, save_posterior
from tests.abmll.conftest import random_posterior, tiny_model

TARGETS = ("q_proj", "v_proj")
QUESTIONS = [Question((5, 9, 33), ((2, 71), (14,))), Question((8,), ((60,), (90, 3), (7,)))]


@pytest.fixture
def attached() -> Attached:
    return attach(tiny_model("llama"), TARGETS)


@pytest.fixture
def members(attached: Attached) -> list[Posterior]:
    """Three that share their factors."""
    first, *others = (random_posterior(attached, "subspace", TARGETS, seed) for seed in range(3))
    shared = {key: tensor for key, tensor in first.tensors().items() if ".shared." in key}
    return [first, *(other.with_tensors(other.tensors() | shared) for other in others)]


def test_pairs_of_draws_take_the_members_in_turn(attached: Attached, members: list[Posterior]) -> None:
    mixed = mixture(members)
    for index in range(8):
        own = draw(members[index // 2 % 3], 7, index)
        for name, (a, b) in draw(mixed, 7, index).items():
            assert torch.equal(a, own[name][0])
            assert torch.equal(b, own[name][1])
    apart = [score_draws(attached, member, QUESTIONS, range(8), 7) for member in members]
    together = score_draws(attached, mixed, QUESTIONS, range(8), 7)
    expected = torch.stack([apart[index // 2 % 3][index] for index in range(8)])
    torch.testing.assert_close(together, expected)
    assert not torch.allclose(apart[0][2, 0, 0], together[2, 0, 0])
    torch.testing.assert_close(score_draws(attached, mixed, QUESTIONS, [5, 2], 7), expected[[5, 2]])  # any of them


def test_draws_of_the_last_blocks_alone_are_those_of_the_members() -> None:
    attached = attach(tiny_model("llama"), TARGETS, "last")
    one, two = (random_posterior(attached, "subspace", TARGETS, seed) for seed in range(2))
    two = two.with_tensors(two.tensors() | {k: t for k, t in one.tensors().items() if ".shared." in k})
    together = score_draws(attached, mixture([one, two]), QUESTIONS, range(4), 0)
    torch.testing.assert_close(together[:2], score_draws(attached, one, QUESTIONS, [0, 1], 0))
    torch.testing.assert_close(together[2:], score_draws(attached, two, QUESTIONS, [2, 3], 0))


def test_its_mean_is_that_of_the_members(attached: Attached, members: list[Posterior]) -> None:
    mixed = mixture(members)
    for name, layer in mixed.layers.items():
        expected = torch.stack([mean(member.layers[name]) for member in members]).mean(dim=0)
        torch.testing.assert_close(mean(layer), expected)
        a, b = draw(mixed, 0, None)[name]
        torch.testing.assert_close(b @ a, expected)
    found = score_draws(attached, mixed, QUESTIONS, [], 0)
    cores = {
        f"{name}.mean.core": layer.core.mean(dim=0) for name, layer in mixed.layers.items() if layer.core is not None
    }
    averaged = members[0].with_tensors(members[0].tensors() | cores)
    torch.testing.assert_close(found, score_draws(attached, averaged, QUESTIONS, [], 0))


def test_it_falls_apart_into_its_members(attached: Attached, members: list[Posterior]) -> None:
    mixed = mixture(members)
    assert mixed.config.members == 3
    assert [member.digest() for member in members_of(mixed)] == [member.digest() for member in members]
    assert members_of(members[0]) == [members[0]]
    assert mixture(members[:1]) is members[0]
    assert mixed.weights == members[0].weights
    with pytest.raises(ValueError, match="mixture of mixtures"):
        mixture([mixed, members[0]])
    with pytest.raises(ValueError, match="share their factors"):
        mixture([members[0], random_posterior(attached, "subspace", TARGETS, 9)])
    with pytest.raises(ValueError, match="which member"):
        drawn_core(next(iter(mixed.layers.values())), next(iter(draw_signs(members[0], 0, 0).values())))
    with pytest.raises(ValueError, match="no closed form"):
        kl(mixed, members[0])


def test_only_cores_can_be_mixed(attached: Attached) -> None:
    with pytest.raises(ValidationError, match="only a subspace posterior"):
        PosteriorConfig(base_model="x", family="kronecker", members=2)
    whole = random_posterior(attached, "kronecker", TARGETS, 0)
    with pytest.raises(ValidationError, match="only a subspace posterior"):
        mixture([whole, whole])


def test_signs_do_not_depend_on_how_many_members_there_are(members: list[Posterior]) -> None:
    one, three = draw_signs(members[0], 3, 4), draw_signs(mixture(members), 3, 4)
    for name, signs in three.items():
        assert torch.equal(signs.u, one[name].u)
        assert torch.equal(signs.v, one[name].v)
        assert (one[name].member, signs.member) == (None, torch.tensor(2))


def test_it_is_stored_whole_and_checked(members: list[Posterior], tmp_path: Path) -> None:
    mixed = mixture(members)
    saved = save_posterior(tmp_path / "mixed", mixed, Record(task="t"), None)
    save_posterior(tmp_path / "global", mixed, Record(), None)
    with pytest.raises(InvalidPosterior, match="a global posterior is one Gaussian"):
        load_global(tmp_path / "global")
    found = load_posterior(tmp_path / "mixed")
    assert found.digest == saved.digest == mixed.digest() != members[0].digest()
    assert found.posterior.config.members == 3
    assert all(torch.equal(t, mixed.tensors()[key]) for key, t in found.posterior.tensors().items())
    assert "a mixture of 3" in (tmp_path / "mixed" / "CARD.md").read_text()
    save_posterior(tmp_path / "one", members[0], Record(task="t"), None)
    assert "mixture" not in (tmp_path / "one" / "CARD.md").read_text()
    wrong = replace(mixed, config=mixed.config.model_copy(update={"members": 2}))
    save_posterior(tmp_path / "wrong", wrong, Record(task="t"), None)
    with pytest.raises(InvalidPosterior, match=r"\(3, 3, 3\) torch.float32, not \(2, 3, 3\)"):
        load_posterior(tmp_path / "wrong")
