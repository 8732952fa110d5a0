"""Adaptation: from the global posterior and a support set to a task posterior."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import BaseModel, Field, ValidationError, model_validator

from abmll.components import Known, beginning, log_likelihood
from abmll.errors import AbmllError, InvalidExamples, InvalidPosterior
from abmll.examples import Example, check_one_kind
from abmll.layers import Attached
from abmll.objective import Labelled, task_gradient
from abmll.posterior import Family, Posterior, mixture
from training.base_model import BaseModel as Base
from training.episodes import label, minibatch
from training.settings import MAX_STEPS


class AdaptConfig(BaseModel, frozen=True, allow_inf_nan=False):
    """Settings of the inner loop, the same in meta-training and in adaptation."""

    steps: int = Field(
        default=10, ge=0, le=MAX_STEPS, description="K, gradient steps on as many examples as a batch, or fewer"
    )
    text_steps: int | None = Field(
        default=None, ge=0, le=MAX_STEPS, description="K on examples without options; as many by default"
    )
    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rate: float = Field(default=5e-3, gt=0, description="alpha of the means")
    scale_rate: float = Field(default=1e-2, ge=0, description="alpha of the scales' parameters")
    factor_rate: float = Field(
        default=0.0,
        ge=0,
        description="alpha of the factors around a core, for examples with options: a task then has factors of its "
        "own; with 0 they stay theta's. subspace alone, and no mixture",
    )
    factor_examples: int = Field(
        default=17, ge=1, description="fewest examples of a task that has factors of its own: more than a batch"
    )
    beta: float = Field(default=1e-4, ge=0, description="weight of KL")
    batch: int = Field(default=16, ge=1, description="support examples in a step; all of them if fewer")
    growth: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="power of (support set / batch) that K grows with, for examples with options: with 1 each is "
        "looked at as often as in a set of a batch's size, with 0 there are always K steps",
    )
    max_tokens: int = Field(default=4096, ge=64, description="padded tokens in one forward pass")
    members: int = Field(
        default=1,
        ge=1,
        le=32,
        description="Gaussians that a task's posterior is a mixture of, each adapted by itself and begun at a draw "
        "from the prior: so many times the work; subspace alone. Meta-training has one",
    )
    apart: float = Field(
        default=1.0, ge=0, description="how many of the prior's standard deviations such a draw lies from its mean"
    )

    @model_validator(mode="after")
    def _one_way_apart(self) -> AdaptConfig:
        if self.members > 1 and self.factor_rate > 0:
            raise ValueError(
                f"members is {self.members} and factor_rate {self.factor_rate:g}; members share their factors: give "
                "one of the two"
            )
        return self

    def steps_on(self, support: Sequence[Labelled]) -> int:
        """Gradient steps on a support set."""
        if not support:
            return 0
        if support[0].is_free_text:
            return self.steps if self.text_steps is None else self.text_steps
        return grown(self.steps, self.growth, len(support), self.batch)

    def factors_move(self, support: Sequence[Labelled]) -> bool:
        """Whether a task with such a support set has factors of its own."""
        return self.factor_rate > 0 and len(support) >= self.factor_examples and not support[0].is_free_text

    def for_parts_of(self, support: Sequence[Labelled]) -> AdaptConfig:
        """The same settings, by which parts of a support set have factors of their own where the whole has."""
        return self.model_copy(update={"factor_examples": 1} if self.factors_move(support) else {"factor_rate": 0.0})

    def with_steps(self, steps: int) -> AdaptConfig:
        """The same settings with so many steps, whatever the examples."""
        return self.model_copy(update={"steps": steps, "text_steps": None, "growth": 0.0})

    @classmethod
    def from_record(cls, training: Mapping[str, Any]) -> AdaptConfig:
        """Returns the settings that a global posterior was meta-trained with.

        Raises:
            InvalidPosterior: The record's settings are malformed.
        """
        try:
            return cls.model_validate(training.get("inner", {}))
        except ValidationError as error:
            raise InvalidPosterior(f"the posterior's record has malformed inner-loop settings: {error}") from error


def grown(steps: int, growth: float, examples: int, batch: int) -> int:
    """Gradient steps on a support set, where there are ``steps`` on at most a batch of examples.

    Args:
        steps: K.
        growth: Power of (examples / batch) that K grows with, see ``AdaptConfig``.
        examples: Size of the support set.
        batch: Support examples in a step.
    """
    return round(steps * max(1.0, examples / batch) ** growth)


def family_settings(family: Family) -> dict[str, float]:
    """Inner-loop settings that differ from ``AdaptConfig``'s defaults for a scale family.

    A core's entries are of another size than a factor's, and its KL is a sum over few weights.
    """
    return {"learning_rate": 5e-2, "scale_rate": 5e-2, "beta": 1e-2} if family == "subspace" else {}


class InnerLoop:
    """Gradient steps on one task's phi, begun at theta and held near it by KL.

    phi^{k+1} = phi^k - alpha grad [ -E_q log p(support | phi) + beta KL(q(phi) || p(phi | theta)) ]
    (arXiv 2508.14285, algorithm 1), with Adam's scaling of the gradient or without. The factors around a core stay as
    they are in theta, or are a point estimate of the task's own (``factors_move``), of which KL, over cores, says
    nothing: what holds them near theta's is that they begin there and have few steps.

    Args:
        attached: The model.
        theta: The prior.
        config: Settings.
        start: Where phi begins, of theta's kind; theta itself by default.
        factors_move: Whether the task has factors of its own.

    Attributes:
        shared: Sum over the steps of the data term's gradient in the shared parameters, by name.
    """

    def __init__(
        self,
        attached: Attached,
        theta: Posterior,
        config: AdaptConfig,
        start: Posterior | None = None,
        *,
        factors_move: bool = False,
    ) -> None:
        self.attached, self.theta, self.config = attached, theta, config
        self.leaves = {key: tensor.detach().clone() for key, tensor in (start or theta).tensors().items()}
        self.shared = {key: torch.zeros_like(leaf) for key, leaf in self.leaves.items() if ".shared." in key}
        rates = {".mean.": config.learning_rate, ".scale.": config.scale_rate}
        if factors_move:
            rates[".shared."] = config.factor_rate
        groups = [
            {"params": [leaf for key, leaf in self.leaves.items() if kind in key], "lr": rate}
            for kind, rate in rates.items()
        ]
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.Adam(groups, betas=(0.9, 0.99)) if config.optimizer == "adam" else torch.optim.SGD(groups)
        )

    @property
    def phi(self) -> Posterior:
        """The task posterior at present."""
        return self.theta.with_tensors(self.leaves)

    def step(self, data: Sequence[Labelled], total: int, generator: torch.Generator) -> tuple[float, float]:
        """Takes one step.

        Args:
            data: Part of the support set.
            total: Size of the whole support set, which KL is spread over.
            generator: Source of the signs.

        Returns:
            Data term and beta KL, nats per data point, before the step.
        """
        config = self.config
        result = task_gradient(
            self.attached,
            self.phi,
            self.theta,
            data,
            beta=config.beta * len(data) / total,
            generator=generator,
            max_tokens=config.max_tokens,
        )
        for key, leaf in self.leaves.items():
            leaf.grad = result.data[key] + result.kl_q[key]
        for key, gradient in self.shared.items():
            gradient += result.data[key]
        self.optimizer.step()
        return result.data_nats, result.kl_nats


def run_inner(
    attached: Attached,
    theta: Posterior,
    support: Sequence[Labelled],
    config: AdaptConfig,
    generator: torch.Generator,
    on_step: Callable[[int, int], None] | None = None,
    start: Posterior | None = None,
) -> InnerLoop:
    """Runs the inner loop on tokenized examples; it stays at ``start`` (``theta``) for no examples or no steps."""
    loop = InnerLoop(attached, theta, config, start, factors_move=config.factors_move(support))
    order = random.Random(int(torch.randint(0, 2**31, (), generator=generator)))
    steps = config.steps_on(support)
    for step in range(steps):
        if on_step is not None:
            on_step(step, steps)
        loop.step(minibatch(support, config.batch, order), len(support), generator)
    return loop


def of_part(on_step: Callable[[int, int], None] | None, part: int, parts: int) -> Callable[[int, int], None] | None:
    """Returns what is told of the steps of one of several equal parts, and tells of those of all."""
    return None if on_step is None else lambda step, steps: on_step(part * steps + step, parts * steps)


def task_posterior(
    attached: Attached,
    theta: Posterior,
    support: Sequence[Labelled],
    config: AdaptConfig,
    generator: torch.Generator,
    on_step: Callable[[int, int], None] | None = None,
    known: Known | None = None,
) -> Posterior:
    """Adapts to tokenized examples: one Gaussian, or a mixture of ``config.members``, each by an inner loop of its own.

    The members begin at draws from the prior and are held near its mean by KL all the same: where they end differs as
    far as the examples leave it open. With components (``abmll.components``), where there are options, one Gaussian or
    several begin where the examples make it likely, and are held near there. Without examples or steps it is ``theta``.

    Args:
        attached: The model.
        theta: The global posterior, on the model's device.
        support: The support set.
        config: Settings.
        generator: Source of all chance.
        on_step: Called before each step with (step, steps) of all members.
        known: See ``log_likelihood``; of this theta.

    Raises:
        AbmllError: See ``check_family``.
    """
    check_family(config, theta.config.family)
    members, steps = config.members, config.steps_on(support)
    if steps == 0:
        return theta.with_components(None)
    components, likelihood = theta.components, None
    if components is not None and not support[0].is_free_text:
        # No step is done yet; who wants to stop can.
        told = None if on_step is None else functools.partial(on_step, 0, members * steps)
        likelihood = log_likelihood(attached, theta, components, support, config.max_tokens, told, known)
    found: list[Posterior] = []
    for number in range(members):
        prior, start = theta, None
        if components is not None and likelihood is not None:
            prior = start = beginning(theta, components, likelihood, generator)
        elif members > 1:
            start = _drawn_start(theta, config.apart, generator)
        report = of_part(on_step, number, members)
        phi = run_inner(attached, prior, support, config, generator, report, start).phi
        found.append(phi.map(torch.Tensor.detach))  # without its gradients
    return mixture(found)


def check_family(config: AdaptConfig, family: Family, draws: int | None = None) -> None:
    """Checks that posteriors of a family can be what is to be made, and draws stand for all of its members alike.

    Raises:
        AbmllError: A mixture, or factors of a task's own, are asked for of another family than ``subspace``, or draws
            are no multiple of a mixture's pairs.
    """
    if config.members > 1 and family != "subspace":
        raise AbmllError(
            f"members is {config.members}, but only subspace posteriors can be mixtures, not {family} ones; give 1",
            field="members",
        )
    if config.factor_rate > 0 and family != "subspace":
        raise AbmllError(
            f"factor_rate is {config.factor_rate:g}, but only subspace posteriors have factors beside their Gaussian; "
            f"those of {family} ones learn at learning_rate: give 0",
            field="factor_rate",
        )
    if draws is not None and config.members > 1 and draws % (2 * config.members):
        raise AbmllError(
            f"draws is {draws}; give a multiple of {2 * config.members}: a pair for each of {config.members} members",
            field="draws",
        )


def _drawn_start(theta: Posterior, apart: float, generator: torch.Generator) -> Posterior:
    """Theta with each core at a draw from it, so many standard deviations away."""
    tensors = theta.tensors()
    for name, layer in theta.layers.items():
        core, key = layer.core, f"{name}.mean.core"
        assert core is not None
        noise = torch.randn(core.shape, generator=generator).to(core)
        tensors[key] = core + apart * layer.scale["log_s"].exp() * noise
    return theta.with_tensors(tensors)


def adapt(
    base: Base,
    attached: Attached,
    prior: Posterior,
    examples: Sequence[Example],
    config: AdaptConfig,
    *,
    seed: int = 0,
    on_step: Callable[[int, int], None] | None = None,
    known: Known | None = None,
) -> Posterior:
    """Adapts a posterior to a task from labelled examples.

    Args:
        base: Model and tokenizer.
        attached: The same model, attached.
        prior: The global posterior theta, on the model's device.
        examples: The support set.
        config: Inner-loop settings.
        seed: The same seed and examples give the same posterior.
        on_step: Called before each step with (step, steps); what it raises ends the adaptation.
        known: See ``log_likelihood``; of this prior.

    Returns:
        The task posterior phi.

    Raises:
        InvalidExamples: There are no examples, they are of two kinds, or adaptation diverged on them.
        PromptTooLong: An example exceeds the model's context.
        AbmllError: See ``check_family``.
    """
    if not examples:
        raise InvalidExamples("adaptation needs at least one labelled example", field="examples")
    check_one_kind(examples)
    support = label(base, prior.config.template, examples)
    generator = torch.Generator().manual_seed(seed)
    phi = task_posterior(attached, prior, support, config, generator, on_step, known)
    if not all(torch.isfinite(tensor).all() for tensor in phi.tensors().values()):
        raise InvalidExamples("adaptation diverged on these examples; lower learning_rate or steps", field="examples")
    return phi
