"""A base model with one PEFT LoRA adapter: what the point-estimate methods train."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from abmll.examples import Example
from abmll.objective import Labelled, micro_batches
from abmll.posterior import PosteriorConfig
from abmll.predictive import option_log_probs
from abmll.scoring import option_scores, pack
from training.base_model import BaseModel
from training.benchmark.method import Budget
from training.episodes import label, minibatch

State = dict[str, Tensor]
NORMALIZE = PosteriorConfig.model_fields["normalize"].default
TEMPLATE = PosteriorConfig(base_model="").template
MAX_TOKENS = 4096


class _Evaluated(torch.nn.Module):
    """A function of a net as a module's forward pass, for ``functional_call``."""

    def __init__(self, wrapped: torch.nn.Module, function: Callable[[], Tensor]) -> None:
        super().__init__()
        self.wrapped, self.function = wrapped, function

    def forward(self) -> Tensor:
        return self.function()


class LoraNet:
    """A model with an adapter whose weights can be taken out and put back.

    Args:
        base: A fresh base model; the adapter is put into it.
        budget: Says rank and targets.
        seed: Seed of the adapter's start.
        dropout: PEFT's dropout on the adapter's input.
    """

    def __init__(self, base: BaseModel, budget: Budget, seed: int, dropout: float = 0.0) -> None:
        self.base, self.budget = base, budget
        torch.manual_seed(seed)
        config = LoraConfig(
            r=budget.rank,
            lora_alpha=budget.rank,
            lora_dropout=dropout,
            target_modules=list(budget.targets),
            task_type="CAUSAL_LM",
        )
        wrapped: Any = get_peft_model(base.model, config)
        wrapped.eval()
        self.wrapped = wrapped
        self.weights = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}

    @property
    def parameters(self) -> int:
        """Number of trained parameters."""
        return sum(weight.numel() for weight in self.weights.values())

    def state(self) -> State:
        """Returns a copy of the adapter's weights."""
        return {name: weight.detach().clone() for name, weight in self.weights.items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Puts weights back."""
        for name, weight in self.weights.items():
            weight.copy_(state[name])

    def label(self, examples: Sequence[Example]) -> list[Labelled]:
        """Tokenizes examples in the text format that ABMLL's posteriors have by default."""
        return label(self.base, TEMPLATE, examples)

    def losses(self, data: Sequence[Labelled]) -> Tensor:
        """-log p(answer | question, options) of each example in nats, shape (n,)."""
        scores = self.option_scores(data)
        answers = torch.tensor([item.answer for item in data], device=scores.device)
        return -option_log_probs(scores).gather(-1, answers[:, None])[:, 0]

    def gradient(self, data: Sequence[Labelled]) -> State:
        """Returns the gradient of the mean loss at the present weights."""
        self.wrapped.zero_grad()
        for group in micro_batches(data, MAX_TOKENS):
            (self.losses(group).sum() / len(data)).backward()
        zero = torch.zeros((), device=self.base.device)
        return {n: zero.expand_as(w) if w.grad is None else w.grad.clone() for n, w in self.weights.items()}

    def step(self, data: Sequence[Labelled], optimizer: torch.optim.Optimizer) -> None:
        """Takes one step of an optimizer over ``weights`` on the mean loss."""
        gradient = self.gradient(data)
        for name, weight in self.weights.items():
            weight.grad = gradient[name]
        optimizer.step()

    def fit(self, support: Sequence[Labelled], steps: int, rate: float, seed: int) -> None:
        """Trains the adapter on a support set from where it stands, by Adam, as many steps as ABMLL takes."""
        if not support:
            return
        optimizer = torch.optim.AdamW(self.weights.values(), lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
        rng = random.Random(seed)
        torch.manual_seed(seed)
        for _ in range(steps):
            self.step(minibatch(support, self.budget.batch, rng), optimizer)

    def at(self, weights: Mapping[str, Tensor], function: Callable[[], Tensor]) -> Tensor:
        """Returns a function of this net at other weights, with derivatives of any order and mode in them."""
        named = {f"wrapped.{name}": tensor for name, tensor in weights.items()}
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second and no forward derivative
            return functional_call(_Evaluated(self.wrapped, function), named, ())

    @torch.no_grad()
    def scores(self, query: Sequence[Labelled]) -> Tensor:
        """Scores the options of each question, shape (n, options), in nats, on the CPU."""
        width = max(len(item.question.options) for item in query)
        result = torch.full((len(query), width), float("-inf"), dtype=torch.float64)
        place = {id(item): row for row, item in enumerate(query)}
        for group in micro_batches(query, MAX_TOKENS):
            part = self.option_scores(group).cpu().double()
            result[[place[id(item)] for item in group], : part.shape[-1]] = part
        return result

    def option_scores(self, data: Sequence[Labelled]) -> Tensor:
        """Scores the options in one pass, shape (n, options), differentiable; -inf where there are fewer."""
        batch = pack([item.question for item in data]).to(self.base.device)
        return option_scores(self.base.model, batch, NORMALIZE)
