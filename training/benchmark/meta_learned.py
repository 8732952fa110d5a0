"""Meta-learned starting points of a LoRA adapter: Reptile, first-order and second-order MAML."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from abmll.objective import Labelled
from training.benchmark.lora import LoraNet, State
from training.benchmark.method import Budget, Learner, Load, Settings
from training.benchmark.point import RATES, adapted, fitted
from training.episodes import minibatch, sample_episode
from training.tasks import Task

# From a net at the start's weights, support and query to the gradient of the start.
Outer = Callable[[LoraNet, State, list[Labelled], list[Labelled], int], State]


def _meta_train(net: LoraNet, tasks: Sequence[Task], budget: Budget, seed: int, outer: Outer) -> State:
    """Learns a start by Adam on the gradients that ``outer`` gives for one episode each."""
    leaves = {name: tensor.requires_grad_() for name, tensor in net.state().items()}
    optimizer = torch.optim.Adam(leaves.values(), betas=(0.9, 0.99))
    for step in range(budget.meta_steps):
        optimizer.param_groups[0]["lr"] = budget.meta_rate(step)
        total = {name: torch.zeros_like(tensor) for name, tensor in leaves.items()}
        for number in range(budget.tasks_per_step):
            episode = sample_episode(tasks, budget.episodes, random.Random(f"{seed}:{step}:{number}"))
            start = {name: leaf.detach().clone() for name, leaf in leaves.items()}
            net.load(start)
            gradient = outer(net, start, net.label(episode.support), net.label(episode.query), step)
            for name, part in gradient.items():
                total[name] += part / budget.tasks_per_step
        norm = torch.stack([part.norm() for part in total.values()]).norm()
        for name, leaf in leaves.items():
            leaf.grad = total[name] / norm.clamp_min(1.0)
        optimizer.step()
    return {name: leaf.detach().clone() for name, leaf in leaves.items()}


class Reptile:
    """Moves the start towards what tasks adapt to (Nichol et al. 2018, arXiv 1803.02999)."""

    name = "reptile"
    version = 2  # the first learned over tasks at one rate, as did those of the others below
    trials: Sequence[Settings] = RATES

    def learn(self, load: Load, tasks: Sequence[Task], settings: Settings, budget: Budget, seed: int) -> Learner:
        """See ``Method``."""
        rate: float = settings["rate"]

        def outer(net: LoraNet, start: State, support: list[Labelled], query: list[Labelled], step: int) -> State:
            # Reptile has no query set: it adapts to all the examples there are.
            net.fit([*support, *query], budget.steps, rate, step)
            scale = 1 / (rate * budget.steps)  # in the units of a gradient, so that one meta-rate serves
            return {name: (start[name] - weight.detach()) * scale for name, weight in net.weights.items()}

        net = LoraNet(load(), budget, seed)
        start = _meta_train(net, tasks, budget, seed, outer)
        return adapted(net, start, fitted(budget, rate))


class FirstOrderMaml:
    """MAML without second derivatives (Finn et al. 2017, arXiv 1703.03400, section 5.2)."""

    name = "fomaml"
    version = 2
    trials: Sequence[Settings] = RATES

    def learn(self, load: Load, tasks: Sequence[Task], settings: Settings, budget: Budget, seed: int) -> Learner:
        """See ``Method``."""

        def outer(net: LoraNet, start: State, support: list[Labelled], query: list[Labelled], step: int) -> State:
            net.fit(support, budget.steps, settings["rate"], step)
            return net.gradient(query)

        net = LoraNet(load(), budget, seed)
        start = _meta_train(net, tasks, budget, seed, outer)
        return adapted(net, start, fitted(budget, settings["rate"]))


class Maml:
    """MAML with second derivatives through plain gradient steps (Finn et al. 2017)."""

    name = "maml"
    version = 3  # the first looked at 16 examples of a larger support set, always the same
    # Plain gradient descent wants larger rates than Adam.
    trials: Sequence[Settings] = ({"rate": 0.03}, {"rate": 0.1}, {"rate": 0.3})

    def learn(self, load: Load, tasks: Sequence[Task], settings: Settings, budget: Budget, seed: int) -> Learner:
        """See ``Method``."""
        rate: float = settings["rate"]

        def outer(net: LoraNet, start: State, support: list[Labelled], query: list[Labelled], step: int) -> State:
            leaves = {name: tensor.requires_grad_() for name, tensor in start.items()}
            inner = descend(net, leaves, support, budget.steps, rate, step, create_graph=True)
            gradients = torch.autograd.grad(loss_of(net, inner, query), list(leaves.values()))
            return dict(zip(leaves, gradients, strict=True))

        def fit(net: LoraNet, support: list[Labelled], seed: int) -> None:
            leaves = {name: tensor.requires_grad_() for name, tensor in net.state().items()}
            found = descend(net, leaves, support, budget.steps_on(support), rate, seed, create_graph=False)
            net.load({name: tensor.detach() for name, tensor in found.items()})

        net = LoraNet(load(), budget, seed)
        start = _meta_train(net, tasks, budget, seed, outer)
        return adapted(net, start, fit)


def loss_of(net: LoraNet, weights: State, data: Sequence[Labelled]) -> Tensor:
    """Mean loss at given weights, twice differentiable in them."""
    return net.at(weights, lambda: net.losses(data).mean())


def descend(
    net: LoraNet,
    weights: State,
    support: Sequence[Labelled],
    steps: int,
    rate: float,
    seed: int,
    *,
    create_graph: bool,
) -> State:
    """Takes plain gradient steps on the support set; with ``create_graph`` they can be differentiated."""
    rng = random.Random(seed)
    for _ in range(steps if support else 0):
        loss = loss_of(net, weights, minibatch(support, net.budget.batch, rng))
        gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=create_graph)
        weights = {name: w - rate * g for (name, w), g in zip(weights.items(), gradients, strict=True)}
    return weights
