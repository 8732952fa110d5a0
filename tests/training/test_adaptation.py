from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from abmll.draws import draw
from abmll.errors import AbmllError, InvalidExamples, InvalidPosterior, PromptTooLong
from abmll.examples import Example
from abmll.kl import kl
from abmll.layers import Attached, init_posterior
from abmll.objective import Labelled, data_loss
from abmll.posterior import Posterior, PosteriorConfig, members_of
from abmll.scoring import Question
from tests.training.conftest import TARGETS, rule_task
from training.adaptation import AdaptConfig, adapt, task_posterior
from training.base_model import BaseModel
from training.episodes import label

CONFIG = AdaptConfig(steps=8, learning_rate=2e-2)
EXAMPLES = rule_task(0).examples[:8]


@pytest.fixture
def theta(attached: Attached) -> Posterior:
    return init_posterior(attached, PosteriorConfig(base_model="tiny", targets=TARGETS), 0)


def loss(base: BaseModel, attached: Attached, phi: Posterior) -> float:
    with torch.no_grad():
        return data_loss(attached, phi, label(base, phi.config.template, EXAMPLES), None).item()


def test_steps_grow_with_more_examples_than_a_batch_but_not_those_that_are_asked_for() -> None:
    config = AdaptConfig(steps=12, text_steps=30, batch=16)
    with_options = [Labelled(Question((1,), ((1,), (2,))), 0)] * 64
    texts = [Labelled(Question((1,), ((1,),)), 0)] * 64
    assert [config.steps_on(with_options[:count]) for count in (0, 1, 16, 32, 64)] == [0, 12, 12, 24, 48]
    assert config.steps_on(texts) == 30  # what more would do to them was not measured
    assert config.model_copy(update={"growth": 0.5}).steps_on(with_options) == 24
    assert config.model_copy(update={"growth": 0.0}).steps_on(with_options) == 12
    assert config.with_steps(7).steps_on(with_options) == config.with_steps(7).steps_on(texts) == 7


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_the_support_set_becomes_likelier(
    base: BaseModel, attached: Attached, theta: Posterior, optimizer: str
) -> None:
    config = AdaptConfig.model_validate(CONFIG.model_dump() | {"optimizer": optimizer})
    phi = adapt(base, attached, theta, EXAMPLES, config)
    assert loss(base, attached, phi) < loss(base, attached, theta)
    assert kl(phi, theta).item() > 0


def test_the_same_seed_gives_the_same_posterior(base: BaseModel, attached: Attached, theta: Posterior) -> None:
    first, again, other = (adapt(base, attached, theta, EXAMPLES, CONFIG, seed=seed) for seed in (1, 1, 2))
    assert first.digest() == again.digest() != other.digest()


def test_more_kl_keeps_it_nearer_the_prior(base: BaseModel, attached: Attached, theta: Posterior) -> None:
    distances = [
        kl(adapt(base, attached, theta, EXAMPLES, CONFIG.model_copy(update={"beta": beta})), theta).item()
        for beta in (0.0, 1e-2, 1.0)
    ]
    assert distances[0] > distances[1] > distances[2]


def test_no_steps_leave_the_prior(base: BaseModel, attached: Attached, theta: Posterior) -> None:
    phi = adapt(base, attached, theta, EXAMPLES, CONFIG.model_copy(update={"steps": 0}))
    assert phi.digest() == theta.digest()


def test_progress_is_told_and_may_stop_it(base: BaseModel, attached: Attached, theta: Posterior) -> None:
    seen: list[tuple[int, int]] = []
    adapt(base, attached, theta, EXAMPLES, CONFIG, on_step=lambda step, steps: seen.append((step, steps)))
    assert seen == [(step, 8) for step in range(8)]

    def stop(step: int, _: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adapt(base, attached, theta, EXAMPLES, CONFIG, on_step=stop)


def test_input_that_cannot_be_adapted_to(base: BaseModel, attached: Attached, theta: Posterior) -> None:
    with pytest.raises(InvalidExamples, match="at least one"):
        adapt(base, attached, theta, [], CONFIG)
    with pytest.raises(PromptTooLong, match=r"room for 25[0-9]"):
        adapt(base, attached, theta, [Example("word " * 300, ("a", "b"), 0)], CONFIG)
    with pytest.raises(InvalidExamples, match="diverged"):
        adapt(base, attached, theta, EXAMPLES, CONFIG.model_copy(update={"learning_rate": 1e30}))
    with pytest.raises(InvalidPosterior, match="malformed inner-loop settings"):
        AdaptConfig.from_record({"inner": {"steps": -1}})


def test_a_mixture_is_adapted_member_by_member(base: BaseModel, attached: Attached) -> None:
    cores = init_posterior(attached, PosteriorConfig(base_model="tiny", targets=TARGETS, family="subspace"), 0)
    one = AdaptConfig(steps=6, learning_rate=5e-2, scale_rate=5e-2, beta=1e-2, batch=4, growth=0.0)
    several = one.model_copy(update={"members": 3})
    told: list[tuple[int, int]] = []
    mixed = adapt(base, attached, cores, EXAMPLES, several, seed=1, on_step=lambda *step: told.append(step))
    assert told == [(step, 18) for step in range(18)]
    assert mixed.config.members == 3
    assert mixed.digest() == adapt(base, attached, cores, EXAMPLES, several, seed=1).digest()
    assert mixed.digest() != adapt(base, attached, cores, EXAMPLES, several, seed=2).digest()
    members = members_of(mixed)
    assert len({member.digest() for member in members}) == 3
    assert all(loss(base, attached, member) < loss(base, attached, cores) for member in members)

    def spread(config: AdaptConfig) -> float:
        found = adapt(base, attached, cores, EXAMPLES, config, seed=1)
        return sum(t.std(dim=0).mean().item() for key, t in found.tensors().items() if key.endswith("mean.core"))

    wide, near = (several.model_copy(update={"apart": apart}) for apart in (3.0, 0.1))
    assert spread(wide) > spread(several) > spread(near) > 0
    generator = torch.Generator().manual_seed(0)
    assert task_posterior(attached, cores, [], several, generator).digest() == cores.digest()


def test_only_subspace_posteriors_are_mixed(base: BaseModel, attached: Attached, theta: Posterior) -> None:
    with pytest.raises(AbmllError, match="members is 2, but only subspace") as refused:
        adapt(base, attached, theta, EXAMPLES, CONFIG.model_copy(update={"members": 2}))
    assert refused.value.field == "members"


OWN = AdaptConfig(steps=6, learning_rate=5e-2, scale_rate=5e-2, beta=1e-2, batch=4, factor_rate=4e-3, factor_examples=5)


def test_a_task_with_many_examples_has_factors_of_its_own(base: BaseModel, attached: Attached) -> None:
    cores = init_posterior(attached, PosteriorConfig(base_model="tiny", targets=TARGETS, family="subspace"), 0)
    theirs = adapt(base, attached, cores, EXAMPLES, OWN.model_copy(update={"factor_rate": 0.0}), seed=1)
    own = adapt(base, attached, cores, EXAMPLES, OWN, seed=1)
    assert loss(base, attached, own) < loss(base, attached, theirs) < loss(base, attached, cores)

    def moved(phi: Posterior) -> float:
        tensors = cores.tensors()
        return max((t - tensors[key]).abs().max().item() for key, t in phi.tensors().items() if ".shared." in key)

    assert moved(theirs) == 0
    assert 4e-3 < moved(own) < 12 * 4e-3  # Adam's steps are of about the rate's size, at most; there are twelve
    a, b = next(iter(draw(own, 0, 0).values()))
    assert a.shape[0] == b.shape[1] == own.config.draw_rank == cores.config.draw_rank
    few = EXAMPLES[:4]
    assert moved(adapt(base, attached, cores, few, OWN)) == 0
    texts = [Example(item.prompt, (item.options[item.answer],), 0) for item in EXAMPLES]
    assert moved(adapt(base, attached, cores, texts, OWN)) == 0  # what more freedom would do there was not measured


def test_parts_of_a_support_set_have_factors_of_their_own_where_the_whole_has() -> None:
    item = Labelled(Question((1,), ((1,), (2,))), 0)
    assert OWN.for_parts_of([item] * 5).factors_move([item])
    assert not OWN.for_parts_of([item] * 4).factors_move([item] * 8)


def test_only_cores_have_factors_around_them_and_members_share_theirs(
    base: BaseModel, attached: Attached, theta: Posterior
) -> None:
    with pytest.raises(AbmllError, match=r"factor_rate is .*, but only subspace") as refused:
        adapt(base, attached, theta, EXAMPLES, OWN)
    assert refused.value.field == "factor_rate"
    with pytest.raises(ValidationError, match="members share their factors"):
        AdaptConfig(members=2, factor_rate=1e-3)
