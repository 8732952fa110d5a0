"""Methods with one set of weights, and what is built on it: no training, in-context, LoRA, ensembles, dropout."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from abmll.examples import Example
from abmll.objective import Labelled
from abmll.scoring import Question, tokenize
from training.base_model import BaseModel
from training.benchmark.lora import TEMPLATE, LoraNet, State
from training.benchmark.method import Budget, Learner, Load, Settings
from training.episodes import sample_episode
from training.tasks import Task

# Rates of adaptation that every gradient method tries.
RATES: tuple[Settings, ...] = ({"rate": 1e-3}, {"rate": 4e-3}, {"rate": 1.5e-2})


class ZeroShot:
    """The base model, as it is; the examples are not looked at."""

    name = "zero-shot"
    trials: Sequence[Settings] = ({},)

    def learn(self, load: Load, tasks: Sequence[Task], settings: Settings, budget: Budget, seed: int) -> Learner:
        """See ``Method``."""
        net = LoraNet(load(), budget, seed)  # an adapter at its start changes nothing
        return Adapted(net, net.state(), lambda net, support, seed: None, parameters=0)


class InContext:
    """The base model, with the examples in the prompt; the oldest are left out where they do not fit."""

    name = "in-context"
    version = 2  # the first had a text's beginning before each example
    trials: Sequence[Settings] = ({},)

    def learn(self, load: Load, tasks: Sequence[Task], settings: Settings, budget: Budget, seed: int) -> Learner:
        """See ``Method``."""
        return _InContext(load(), budget)


class _InContext:
    parameters = 0
    passes = 1

    def __init__(self, base: BaseModel, budget: Budget) -> None:
        self.net = LoraNet(base, budget, 0)

    def predict(self, support: Sequence[Example], query: Sequence[Example], seed: int) -> Tensor:
        return self.net.scores(label_in_context(self.net.base, support, query))[None]


def label_in_context(base: BaseModel, support: Sequence[Example], query: Sequence[Example]) -> list[Labelled]:
    """Tokenizes questions with labelled examples before them; the first are left out where they do not fit."""
    shots = [in_context(base, example) for example in support]
    opening = len(base.tokenizer.encode("", add_special_tokens=True))  # tokens that every text begins with
    questions: list[Labelled] = []
    for example in query:
        own = tokenize(base.tokenizer, TEMPLATE, example.prompt, example.options, base.context)
        room = base.context - own.longest
        before: list[int] = []
        for shot in reversed(shots):
            if len(before) + len(shot) > room:
                break
            before = [*shot, *before]
        prompt = (*own.prompt[:opening], *before, *own.prompt[opening:])
        questions.append(Labelled(Question(prompt, own.options), example.answer))
    return questions


def in_context(base: BaseModel, example: Example) -> list[int]:
    """Tokens of a labelled example as it stands before a question: prompt, right answer, line's end."""
    answer = TEMPLATE.option(example.options[example.answer]) + "\n"
    texts = (TEMPLATE.prompt(example.prompt), answer)
    return [token for text in texts for token in base.tokenizer.encode(text, add_special_tokens=False)]


Fit = Callable[[LoraNet, list[Labelled], int], None]


@dataclass
class Adapted:
    """Starts from a state, fits to the support set, predicts with one set of weights."""

    net: LoraNet
    start: State
    fit: Fit
    parameters: int
    passes: int = 1

    def predict(self, support: Sequence[Example], query: Sequence[Example], seed: int) -> Tensor:
        """See ``Learner``."""
        self.net.load(self.start)
        self.fit(self.net, self.net.label(support), seed)
        return self.net.scores(self.net.label(query))[None]


def fitted(budget: Budget, rate: float) -> Fit:
    """Returns adaptation by the budget's gradient steps."""
    return lambda net, support, seed: net.fit(support, budget.steps_on(support), rate, seed)


def adapted(net: LoraNet, start: State, fit: Fit) -> Adapted:
    """Returns a learner that adapts from a start."""
    return Adapted(net, start, fit, net.parameters)


class Lora:
    """A LoRA adapter per task (PEFT), from its usual start."""

    name = "lora"
    trials: Sequence[Settings] = RATES

    def learn(self, load: Load, tasks: Sequence[Task], settings: Settings, budget: Budget, seed: int) -> Learner:
        """See ``Method``."""
        net = LoraNet(load(), budget, seed)
        return adapted(net, net.state(), fitted(budget, settings["rate"]))


class MultiTask:
    """One LoRA adapter trained on all tasks' examples together, then on the task's own."""

    name = "multi-task lora"
    version = 2  # the first learned over tasks at one rate
    trials: Sequence[Settings] = RATES

    def learn(self, load: Load, tasks: Sequence[Task], settings: Settings, budget: Budget, seed: int) -> Learner:
        """See ``Method``."""
        net = LoraNet(load(), budget, seed)
        optimizer = torch.optim.AdamW(net.weights.values(), weight_decay=0.0)
        # A meta-learning step has K gradients of adaptation and one of the objective for each of its tasks.
        gradients = budget.steps + 1
        for step in range(budget.meta_steps * gradients):
            optimizer.param_groups[0]["lr"] = budget.meta_rate(step, gradients)
            rng = random.Random(f"{seed}:{step}")
            batch: list[Example] = []
            for _ in range(budget.tasks_per_step):
                episode = sample_episode(tasks, budget.episodes, rng)
                batch += [*episode.support, *episode.query][: budget.batch]
            net.step(net.label(batch), optimizer)
        return adapted(net, net.state(), fitted(budget, settings["rate"]))


class Ensemble:
    """Several LoRA adapters per task, from different starts and in different orders (deep ensemble)."""

    name = "lora ensemble"
    trials: Sequence[Settings] = RATES
    members = 5

    def learn(self, load: Load, tasks: Sequence[Task], settings: Settings, budget: Budget, seed: int) -> Learner:
        """See ``Method``."""
        net = LoraNet(load(), budget, seed)
        starts = [LoraNet(load(), budget, seed * self.members + member).state() for member in range(self.members)]
        return _Ensemble(net, starts, fitted(budget, settings["rate"]), net.parameters * self.members, self.members)


@dataclass
class _Ensemble:
    net: LoraNet
    starts: list[State]
    fit: Fit
    parameters: int
    passes: int

    def predict(self, support: Sequence[Example], query: Sequence[Example], seed: int) -> Tensor:
        labelled, questions = self.net.label(support), self.net.label(query)
        parts: list[Tensor] = []
        for number, start in enumerate(self.starts):
            self.net.load(start)
            self.fit(self.net, labelled, seed * len(self.starts) + number)
            parts.append(self.net.scores(questions))
        return torch.stack(parts)


class McDropout:
    """A LoRA adapter per task trained with dropout, which stays on in prediction (Gal & Ghahramani 2016)."""

    name = "mc dropout"
    trials: Sequence[Settings] = RATES
    dropout = 0.1

    def learn(self, load: Load, tasks: Sequence[Task], settings: Settings, budget: Budget, seed: int) -> Learner:
        """See ``Method``."""
        net = LoraNet(load(), budget, seed, self.dropout)
        return _McDropout(net, net.state(), fitted(budget, settings["rate"]), net.parameters, budget.draws)


@dataclass
class _McDropout:
    net: LoraNet
    start: State
    fit: Fit
    parameters: int
    passes: int

    def predict(self, support: Sequence[Example], query: Sequence[Example], seed: int) -> Tensor:
        self.net.load(self.start)
        self.net.wrapped.train()  # base models here have no dropout of their own
        try:
            self.fit(self.net, self.net.label(support), seed)
            torch.manual_seed(seed)
            questions = self.net.label(query)
            return torch.stack([self.net.scores(questions) for _ in range(self.passes)])
        finally:
            self.net.wrapped.eval()
