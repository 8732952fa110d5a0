"""Bayesian methods for one task at a time: Laplace-LoRA, BLoB, TFB. None learns from other tasks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp

from abmll.examples import Example
from abmll.metrics import negative_log_likelihood
from abmll.objective import Labelled
from abmll.predictive import option_log_probs
from training.benchmark.lora import LoraNet, State
from training.benchmark.method import Budget, Learner, Load, Settings
from training.benchmark.point import RATES
from training.episodes import minibatch
from training.tasks import Task


class Laplace:
    """Laplace-LoRA (Yang et al. 2024, arXiv 2308.13111): a Gaussian around a trained adapter, linearized.

    Precision = diagonal of the Fisher matrix of the support set + prior precision. Predictions are those of
    the model linearized at the adapter, f(x) + J(x) (w - w*): with the network itself, Laplace underfits.
    """

    name = "laplace-lora"
    version = 2  # the first tried no precision above 1e3, and chose that
    trials: Sequence[Settings] = (
        {"rate": 4e-3, "precision": 1e3},
        {"rate": 4e-3, "precision": 1e4},
        {"rate": 1.5e-2, "precision": 1e4},
    )

    def learn(self, load: Load, tasks: Sequence[Task], settings: Settings, budget: Budget, seed: int) -> Learner:
        """See ``Method``."""
        net = LoraNet(load(), budget, seed)
        return _Laplace(net, net.state(), settings, budget, net.parameters, 2 * budget.draws)


@dataclass
class _Laplace:
    net: LoraNet
    start: State
    settings: Settings
    budget: Budget
    parameters: int
    passes: int

    def predict(self, support: Sequence[Example], query: Sequence[Example], seed: int) -> Tensor:
        net, generator = self.net, torch.Generator().manual_seed(seed)
        net.load(self.start)
        labelled = net.label(support)
        net.fit(labelled, self.budget.steps_on(labelled), self.settings["rate"], seed)
        fisher = self._fisher(labelled, generator)
        deviation = {name: (each + self.settings["precision"]).rsqrt() for name, each in fisher.items()}
        questions = net.label(query)
        best = net.state()
        parts: list[Tensor] = []
        for _ in range(self.budget.draws):
            step = {name: d * _normal(d, generator) for name, d in deviation.items()}
            parts.append(linearized(net, best, step, questions))
        return torch.stack(parts)

    def _fisher(self, data: Sequence[Labelled], generator: torch.Generator) -> State:
        """Diagonal Fisher information, with labels drawn from the model's own predictive."""
        total = {name: torch.zeros_like(weight) for name, weight in self.net.weights.items()}
        for item in data:
            chances = option_log_probs(self.net.scores([item])).exp()
            drawn = int(torch.multinomial(chances[0], 1, generator=generator))
            for name, part in self.net.gradient([Labelled(item.question, drawn)]).items():
                total[name] += part**2
        return total


def linearized(net: LoraNet, at: State, step: State, questions: Sequence[Labelled]) -> Tensor:
    """Scores of the model linearized at weights, a step away: f(x) + J(x) step, shape (n, options)."""
    width = max(len(item.question.options) for item in questions)
    result = torch.full((len(questions), width), float("-inf"), dtype=torch.float64)
    size = net.budget.batch
    for start in range(0, len(questions), size):
        group = questions[start : start + size]

        def function(weights: State, group: Sequence[Labelled] = group) -> Tensor:
            return net.at(weights, lambda: net.option_scores(group))

        value, change, *_ = jvp(function, (at,), (step,))
        missing = value.isneginf()
        part = torch.where(missing, value, value + change.masked_fill(missing, 0.0)).detach().cpu().double()
        result[start : start + len(group), : part.shape[-1]] = part
    return result


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator).to(like.device)


class Blob:
    """BLoB (Wang et al. 2024, arXiv 2406.11675): A ~ N(M, G^4) elementwise, B a point, learned by backprop.

    Each gradient step has one sample of A; the KL to the prior N(0, sigma_p^2) counts 1 / |support|. As in the
    authors' code, G begins uniform below a small bound, and KL has steps of its own, by plain gradient descent.
    """

    name = "blob"
    version = 2
    trials: Sequence[Settings] = RATES
    prior_deviation = 0.2
    start_root = 0.05
    kl_rate = 0.01

    def learn(self, load: Load, tasks: Sequence[Task], settings: Settings, budget: Budget, seed: int) -> Learner:
        """See ``Method``."""
        net = LoraNet(load(), budget, seed)
        means = sum(weight.numel() for name, weight in net.weights.items() if ".lora_A." in name)
        return _Blob(net, net.state(), self, settings["rate"], budget, net.parameters + means, budget.draws)


@dataclass
class _Blob:
    net: LoraNet
    start: State
    method: Blob
    rate: float
    budget: Budget
    parameters: int
    passes: int

    def predict(self, support: Sequence[Example], query: Sequence[Example], seed: int) -> Tensor:
        net, generator = self.net, torch.Generator().manual_seed(seed)
        weights = {name: t.clone().requires_grad_() for name, t in self.start.items()}
        roots = {n: self._root(t, generator).requires_grad_() for n, t in self.start.items() if ".lora_A." in n}
        leaves = [*weights.values(), *roots.values()]
        optimizer = torch.optim.AdamW(leaves, lr=self.rate, weight_decay=0.0)
        towards_prior = torch.optim.SGD(leaves, lr=self.method.kl_rate)
        labelled, rng = net.label(support), random.Random(seed)
        for _ in range(self.budget.steps_on(labelled) if labelled else 0):
            batch = minibatch(labelled, self.budget.batch, rng)
            noise = {name: _normal(each, generator) for name, each in roots.items()}
            net.load(_sample(weights, roots, noise))
            gradient = net.gradient(batch)
            for name, weight in weights.items():
                weight.grad = gradient[name]
            for name, each in roots.items():
                each.grad = gradient[name] * noise[name] * 2 * each.detach()
            optimizer.step()
            towards_prior.zero_grad()
            (blob_kl(weights, roots, self.method.prior_deviation) / len(labelled)).backward()
            towards_prior.step()
        questions = net.label(query)
        parts: list[Tensor] = []
        for _ in range(self.budget.draws):
            net.load(_sample(weights, roots, {name: _normal(each, generator) for name, each in roots.items()}))
            parts.append(net.scores(questions))
        return torch.stack(parts)

    def _root(self, like: Tensor, generator: torch.Generator) -> Tensor:
        most = self.method.start_root
        return (most * (0.5**0.5 + (1 - 0.5**0.5) * torch.rand(like.shape, generator=generator))).to(like.device)


def blob_kl(weights: State, roots: State, prior: float) -> Tensor:
    """KL( N(weights, roots^4) || N(0, prior^2) ) in nats, over the entries that ``roots`` names."""
    terms: list[Tensor] = []
    for name, root in roots.items():
        variance = root**4
        ratio = (variance + weights[name] ** 2) / prior**2
        terms.append(0.5 * (ratio - 1 - (variance / prior**2).log()).sum())
    return torch.stack(terms).sum()


@torch.no_grad()
def _sample(weights: State, roots: State, noise: State) -> State:
    return {n: t + roots[n] ** 2 * noise[n] if n in roots else t for n, t in weights.items()}


class Tfb:
    """TFB (Shi et al. 2024, arXiv 2412.05723): the widest noise on a trained adapter that the support set allows.

    With B = U diag(d) V^T, A' = V^T A gets noise of deviation sigma / d_i in its row i: isotropic in the update's
    space. sigma is the largest, by bisection, that raises the support set's NLL by at most ``tolerance``.
    """

    name = "tfb"
    trials: Sequence[Settings] = RATES
    tolerance = 0.05

    def learn(self, load: Load, tasks: Sequence[Task], settings: Settings, budget: Budget, seed: int) -> Learner:
        """See ``Method``."""
        net = LoraNet(load(), budget, seed)
        return _Tfb(net, net.state(), self.tolerance, settings["rate"], budget, net.parameters + 1, budget.draws)


@dataclass
class _Tfb:
    net: LoraNet
    start: State
    tolerance: float
    rate: float
    budget: Budget
    parameters: int
    passes: int

    def predict(self, support: Sequence[Example], query: Sequence[Example], seed: int) -> Tensor:
        net = self.net
        net.load(self.start)
        labelled, questions = net.label(support), net.label(query)
        net.fit(labelled, self.budget.steps_on(labelled), self.rate, seed)
        trained = net.state()
        if not labelled:
            return net.scores(questions)[None]
        answers = torch.tensor([item.answer for item in labelled])

        def loss(sigma: float) -> float:
            parts: list[Tensor] = []
            for draw in range(self.budget.draws):
                net.load(noisy(trained, sigma, torch.Generator().manual_seed(seed * 1000 + draw)))
                parts.append(option_log_probs(net.scores(labelled)).exp())
            return negative_log_likelihood(torch.stack(parts).mean(0), answers)

        low, high = 1e-4, 1.0
        limit = loss(0.0) + self.tolerance
        for _ in range(6):
            middle = (low * high) ** 0.5
            low, high = (middle, high) if loss(middle) <= limit else (low, middle)
        draws: list[Tensor] = []
        for draw in range(self.budget.draws):
            net.load(noisy(trained, low, torch.Generator().manual_seed(seed * 1000 + 500 + draw)))
            draws.append(net.scores(questions))
        return torch.stack(draws)


@torch.no_grad()
def noisy(trained: State, sigma: float, generator: torch.Generator) -> State:
    """The adapter with noise on A, written back into the given B's basis."""
    state: dict[str, Any] = dict(trained)
    for name, a in trained.items():
        if ".lora_A." not in name:
            continue
        b = trained[name.replace(".lora_A.", ".lora_B.")]
        _, d, vt = torch.linalg.svd(b, full_matrices=False)
        deviation = sigma / d.clamp_min(1e-3 * float(d.max()) + 1e-6)
        state[name] = a + vt.T @ (deviation[:, None] * _normal(a, generator))
    return state
