"""The methods that the benchmark compares. To add one: write a ``Method`` in a file here, and name it below."""

from __future__ import annotations

import math

from abmll.errors import AbmllError
from training.benchmark.bayesian import Blob, Laplace, Tfb
from training.benchmark.exact import ExactBayes
from training.benchmark.meta_learned import FirstOrderMaml, Maml, Reptile
from training.benchmark.method import Method
from training.benchmark.ours import Abmll
from training.benchmark.point import Ensemble, InContext, Lora, McDropout, MultiTask, ZeroShot
from training.benchmark.world import World

OURS = ("abmll subspace", "abmll kronecker", "abmll lowrank", "abmll subspace in-context")


def catalogue(world: World | None) -> list[Method]:
    """Returns all methods; the exact predictive too where the world gives it."""
    methods: list[Method] = [
        ZeroShot(),
        InContext(),
        Lora(),
        MultiTask(),
        Reptile(),
        FirstOrderMaml(),
        Maml(),
        Ensemble(),
        McDropout(),
        Laplace(),
        Blob(),
        Tfb(),
        Abmll("subspace"),
        Abmll("kronecker"),
        Abmll("lowrank"),
        Abmll("subspace", in_context=True),
    ]
    return methods if world is None else [ExactBayes(world), *methods]


def choose(names: str | None, world: World | None) -> list[Method]:
    """Returns the methods of these names, joined by commas; all for None.

    Raises:
        AbmllError: There is no method of a name.
    """
    known = {method.name: method for method in catalogue(world)}
    if names is None:
        return list(known.values())
    wanted = [name.strip() for name in names.split(",")]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise AbmllError(f"there is no method {unknown[0]!r}; methods: {', '.join(known)}", field="methods")
    return [known[name] for name in wanted]


def ablation(betas: str) -> list[Method]:
    """Returns ABMLL with each of the weights of KL, joined by commas.

    Raises:
        AbmllError: One is not a number, or below 0.
    """
    try:
        values = [float(text) for text in betas.split(",")]
    except ValueError:
        values = []
    if not values or not all(0 <= value < math.inf for value in values):
        raise AbmllError(f"betas must be numbers from 0 on, joined by commas, not {betas!r}", field="betas")
    return [Abmll("subspace", beta=value) for value in dict.fromkeys(values)]
