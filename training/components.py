"""Components of a prior: the posteriors of tasks that a global posterior was learnt from."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from abmll.errors import AbmllError
from abmll.layers import Attached
from abmll.posterior import Components, Family, Posterior
from training.adaptation import AdaptConfig, task_posterior
from training.base_model import BaseModel as Base
from training.episodes import label
from training.progress import Progress
from training.tasks import Task, spread_over_families

# Of each task, at most, that its component is adapted to; and fewest.
MOST_EXAMPLES = 96
FEWEST_EXAMPLES = 16
# On 16 unseen tasks of the generated world, 96 examples each, 24 or 36 steps came as near to exact Bayes as 72.
_GROWTH = 0.5


def check_components(count: int, family: Family) -> None:
    """Checks that a posterior of a family can have so many components; to be asked before hours of work.

    Raises:
        AbmllError: It cannot.
    """
    if count and family != "subspace":
        raise AbmllError(
            f"components is {count}, but only a subspace posterior has some, not a {family} one; give 0",
            field="components",
        )


def choose_tasks(tasks: Sequence[Task], count: int, seed: int) -> list[Task]:
    """Chooses tasks to be components: with options and examples enough, spread over the families.

    Raises:
        AbmllError: There is none, though some are wanted.
    """
    fit = [task for task in tasks if not task.is_free_text and len(task.examples) >= FEWEST_EXAMPLES]
    if count and not fit:
        raise AbmllError(
            f"no training task has {FEWEST_EXAMPLES} examples with options, for a component; give 0 components",
            field="components",
        )
    return spread_over_families(fit, seed)[:count]


def settings_of_one(config: AdaptConfig) -> AdaptConfig:
    """The inner loop of a component: one Gaussian around theta's factors, whose steps grow with its examples."""
    return config.model_copy(update={"members": 1, "factor_rate": 0.0, "growth": _GROWTH})


def with_task_components(
    base: Base,
    attached: Attached,
    theta: Posterior,
    tasks: Sequence[Task],
    config: AdaptConfig,
    seed: int,
    progress: Progress,
) -> Posterior:
    """Adapts the global posterior to tasks that it was learnt from, and returns it with these as its components.

    Args:
        base: Model and tokenizer.
        attached: The same model, attached.
        theta: The global posterior, ``subspace``, on the model's device; components that it has are replaced.
        tasks: The tasks, with options, perhaps none; of each at most ``MOST_EXAMPLES``, drawn at random, are looked at.
        config: Inner-loop settings; of them ``settings_of_one`` are taken.
        seed: Seed of the examples and of adaptation.
        progress: Shows progress.

    Raises:
        AbmllError: Adaptation to a task diverged.
    """
    alone = theta.with_components(None)
    if not tasks:
        return alone
    of_one = settings_of_one(config)
    found: list[dict[str, torch.Tensor]] = []
    with progress("components", total=len(tasks)) as bar:
        for number, task in enumerate(tasks, start=1):
            rng = random.Random(f"{seed}:{task.name}")
            some = rng.sample(task.examples, min(MOST_EXAMPLES, len(task.examples)))
            generator = torch.Generator().manual_seed(seed)
            phi = task_posterior(attached, alone, label(base, theta.config.template, some), of_one, generator).tensors()
            if not all(tensor.isfinite().all() for tensor in phi.values()):
                raise AbmllError(
                    f"adaptation to task {task.name} diverged, so it is no component; lower the inner learning_rate, "
                    "or give 0 components",
                    field="components",
                )
            found.append({name: phi[f"{name}.mean.core"] for name in theta.layers})
            bar.update(number, {})
    cores = {name: torch.stack([own[name] for own in found]) for name in theta.layers}
    names, families = tuple(task.name for task in tasks), tuple(task.family for task in tasks)
    return theta.with_components(Components(names, families, cores))
