"""ABMLL in the benchmark, with either scale family."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from abmll.draw_scores import score_draws
from abmll.examples import Example
from abmll.layers import Attached, attach
from abmll.posterior import Family, Posterior, PosteriorConfig
from training.adaptation import AdaptConfig, adapt_labelled
from training.base_model import BaseModel
from training.benchmark.method import META_RATE, Budget, Learner, Load, Settings
from training.episodes import label
from training.meta import MetaConfig, meta_train
from training.progress import silent
from training.tasks import Task


class Abmll:
    """Amortized Bayesian meta-learning for LoRA (arXiv 2508.14285).

    Args:
        family: Scale family of the posterior.
    """

    def __init__(self, family: Family) -> None:
        self.family: Family = family
        self.name = f"abmll {family}"
        self.trials: Sequence[Settings] = (
            {"rate": 4e-3, "beta": 1e-4},
            {"rate": 4e-3, "beta": 1e-3},
            {"rate": 1.5e-2, "beta": 1e-3},
        )

    def learn(self, load: Load, tasks: Sequence[Task], settings: Settings, budget: Budget, seed: int) -> Learner:
        """See ``Method``."""
        base = load()
        # A draw has the baselines' rank: mean, scale, and lowrank's offset together.
        rank = budget.rank - 1 if self.family == "kronecker" else (budget.rank - 1) // 2 + (budget.rank - 1) % 2
        config = PosteriorConfig(
            base_model=base.name,
            targets=budget.targets,
            family=self.family,
            rank=rank,
            scale_rank=max(1, budget.rank - 1 - rank),
        )
        inner = AdaptConfig(
            steps=budget.steps, learning_rate=settings["rate"], beta=settings["beta"], batch=budget.batch
        )
        meta = MetaConfig(
            steps=budget.meta_steps,
            tasks_per_step=budget.tasks_per_step,
            learning_rate=META_RATE,
            inner=inner,
            episodes=budget.episodes,
            seed=seed,
        )
        attached = attach(base.model, config.targets)
        with tempfile.TemporaryDirectory() as work:
            theta = meta_train(base, attached, tasks, config, meta, Path(work), progress=silent)
        theta = theta.map(lambda tensor: tensor.to(base.device))
        return _Abmll(base, attached, theta, inner, theta.parameters, budget.draws)


@dataclass
class _Abmll:
    base: BaseModel
    attached: Attached
    theta: Posterior
    inner: AdaptConfig
    parameters: int
    passes: int

    def predict(self, support: Sequence[Example], query: Sequence[Example], seed: int) -> Tensor:
        template = self.theta.config.template
        labelled = label(self.base, template, support)
        phi = adapt_labelled(self.attached, self.theta, labelled, self.inner, torch.Generator().manual_seed(seed))
        questions = [item.question for item in label(self.base, template, query)]
        return score_draws(self.attached, phi, questions, range(self.passes), seed)
