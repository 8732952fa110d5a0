from __future__ import annotations

import pytest
import torch

from abmll.examples import Example
from abmll.layers import Attached, init_posterior
from abmll.objective import data_loss
from abmll.posterior import Posterior, PosteriorConfig, members_of
from tests.training.conftest import TARGETS, rule_task
from training.adaptation import COMPONENT_EXAMPLES, AdaptConfig, task_components, task_posterior
from training.base_model import BaseModel
from training.components import Components, beginning, log_likelihood
from training.episodes import label
from training.progress import silent

CONFIG = AdaptConfig(steps=4, learning_rate=5e-2, scale_rate=5e-2, beta=1e-2)
EXAMPLES = rule_task(0).examples


@pytest.fixture
def theta(attached: Attached) -> Posterior:
    return init_posterior(attached, PosteriorConfig(base_model="tiny", targets=TARGETS, family="subspace"), 0)


@pytest.fixture
def components(theta: Posterior) -> Components:
    generator = torch.Generator().manual_seed(0)
    cores = {name: 6 * torch.randn(9, *layer.noise_shape, generator=generator) for name, layer in theta.layers.items()}
    return Components(cores)


def at(theta: Posterior, components: Components, number: int) -> Posterior:
    means = {f"{name}.mean.core": cores[number] for name, cores in components.cores.items()}
    return theta.with_tensors(theta.tensors() | means)


def by_one(
    base: BaseModel, attached: Attached, theta: Posterior, components: Components, examples: tuple[Example, ...]
) -> torch.Tensor:
    support = label(base, theta.config.template, examples)
    with torch.no_grad():
        nats = [data_loss(attached, at(theta, components, number), support, None) for number in range(components.count)]
    return -torch.stack(nats).double()


def test_components_are_as_likely_as_posteriors_at_their_means(
    base: BaseModel, attached: Attached, theta: Posterior, components: Components
) -> None:
    support = label(base, theta.config.template, EXAMPLES[:5])
    found = log_likelihood(attached, theta, components, support)
    expected = by_one(base, attached, theta, components, EXAMPLES[:5])
    assert found.shape == (9,)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert expected.std() > 0.1  # they differ, so that no other order of them would do
    torch.testing.assert_close(log_likelihood(attached, theta, components.only(torch.tensor([7])), support), found[7:8])


def test_components_whose_weight_is_negligible_are_left_out(
    base: BaseModel, attached: Attached, theta: Posterior, components: Components
) -> None:
    found = log_likelihood(attached, theta, components, label(base, theta.config.template, EXAMPLES))
    first, every = (by_one(base, attached, theta, components, examples) for examples in (EXAMPLES[:16], EXAMPLES))
    kept = found.isfinite()
    assert 0 < kept.sum() < 9
    torch.testing.assert_close(found[kept], every[kept], atol=1e-3, rtol=1e-4)
    assert 0.5 * (first[kept] - first.max()).min() >= -6
    assert (0.5 * every).softmax(dim=0)[~kept].sum() < 0.01


def test_a_task_begins_at_a_mean_of_the_components_that_its_examples_leave_likely(
    theta: Posterior, components: Components
) -> None:
    generator = torch.Generator().manual_seed(0)
    sure = torch.full((9,), -torch.inf, dtype=torch.float64)
    sure[3] = -5.0
    only = beginning(theta, components, sure, generator)
    torch.testing.assert_close(only.tensors(), at(theta, components, 3).tensors())
    two = torch.where(torch.arange(9) < 2, 0.0, -torch.inf).double()
    begun = [beginning(theta, components, two, generator) for _ in range(300)]
    assert len({posterior.digest() for posterior in begun}) > 5
    for name, layer in theta.layers.items():
        cores = torch.stack([posterior.tensors()[f"{name}.mean.core"] for posterior in begun])
        expected, apart = components.cores[name][:2].mean(dim=0), components.cores[name][0] - components.cores[name][1]
        torch.testing.assert_close(cores.mean(dim=0), expected, atol=0.4, rtol=0)
        # Of 16 of two cores, each as likely as the other, the mean has a standard deviation of their distance / 8.
        torch.testing.assert_close(cores.std(dim=0), apart.abs() / 8, atol=0.2, rtol=0.2)
        assert torch.equal(begun[0].layers[name].scale["log_s"], layer.scale["log_s"])


def test_adaptation_starts_there_and_is_held_there(
    base: BaseModel, attached: Attached, theta: Posterior, components: Components
) -> None:
    support = label(base, theta.config.template, EXAMPLES[:16])
    likeliest = int(log_likelihood(attached, theta, components, support).argmax())
    alone = components.only(torch.tensor([likeliest]))

    def distance(config: AdaptConfig, given: Components | None) -> float:
        generator = torch.Generator().manual_seed(0)
        phi = task_posterior(attached, theta, support, config, generator, components=given)
        assert phi.config.members == config.members
        return max(
            (layer.core - alone.cores[name][0]).abs().max().item()
            for member in members_of(phi)
            for name, layer in member.layers.items()
            if layer.core is not None
        )

    free, held = (CONFIG.model_copy(update={"steps": 40, "beta": beta}) for beta in (0.0, 10.0))
    assert distance(held, alone) < distance(free, alone) < distance(free, None)
    still = CONFIG.model_copy(update={"learning_rate": 1e-9, "members": 2})
    assert distance(still, alone) < 1e-4


def test_without_options_or_examples_there_is_nothing_to_weigh_them_by(
    base: BaseModel, attached: Attached, theta: Posterior, components: Components
) -> None:
    texts = [Example(example.prompt, (example.options[example.answer],), 0) for example in EXAMPLES[:4]]
    support = label(base, theta.config.template, texts)
    with_them, without = (
        task_posterior(attached, theta, support, CONFIG, torch.Generator().manual_seed(0), components=given)
        for given in (components, None)
    )
    assert with_them.digest() == without.digest() != theta.digest()
    generator = torch.Generator().manual_seed(0)
    assert task_posterior(attached, theta, [], CONFIG, generator, components=components).digest() == theta.digest()


def test_components_are_posteriors_of_the_tasks(base: BaseModel, attached: Attached, theta: Posterior) -> None:
    long = rule_task(1, COMPONENT_EXAMPLES + 4).examples
    tasks = [rule_task(0).examples, long, long[:COMPONENT_EXAMPLES]]
    config = CONFIG.model_copy(update={"growth": 0.0, "members": 4})
    found = task_components(base, attached, theta, tasks, config, 1, silent)
    assert found.count == 3
    alone = CONFIG.model_copy(update={"growth": 1.0})
    generator = torch.Generator().manual_seed(1)
    phi = task_posterior(attached, theta, label(base, theta.config.template, tasks[0]), alone, generator)
    for name, cores in found.cores.items():
        assert torch.equal(cores[0], phi.tensors()[f"{name}.mean.core"])
        assert torch.equal(cores[1], cores[2])
