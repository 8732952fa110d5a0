"""The methods that the benchmark compares. To add one: write a ``Method`` in a file here, and name it below."""

from __future__ import annotations

import math

from abmll.errors import AbmllError
from abmll.posterior import Family, PosteriorConfig
from training.benchmark.bayesian import Blob, Laplace, Tfb
from training.benchmark.exact import ExactBayes
from training.benchmark.meta_learned import FirstOrderMaml, Maml, Reptile
from training.benchmark.method import Method
from training.benchmark.ours import Abmll
from training.benchmark.point import Ensemble, InContext, Lora, McDropout, MultiTask, ZeroShot
from training.benchmark.world import World
from training.settings import checked

OURS = (
    "abmll subspace",
    "abmll kronecker",
    "abmll lowrank",
    "abmll subspace in-context",
    "abmll subspace mixture",
    "abmll subspace own factors",
    "abmll subspace mixture components",
)

# A pair of the usual eight draws for each.
MEMBERS = 4


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
        Abmll("subspace", members=MEMBERS),
        Abmll("subspace", own_factors=True),
        Abmll("subspace", members=MEMBERS, components=True),
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


def compared(
    world: World | None, methods: str | None = None, betas: str | None = None, layers: str | None = None
) -> list[Method]:
    """Returns what a run compares: methods, or ABMLL's ablation in the weight of KL or the blocks that are Gaussian.

    Args:
        world: Where tasks are generated.
        methods: Names joined by commas; None for all.
        betas: Weights of KL joined by commas.
        layers: Choices of blocks joined by commas, see ``PosteriorConfig.layers``.

    Raises:
        AbmllError: More than one is given, or one makes no sense.
    """
    if sum(choice is not None for choice in (methods, betas, layers)) > 1:
        raise AbmllError("methods, betas and layers exclude each other; give one of them", field="methods")
    if layers is not None:
        return _over_layers(layers)
    return choose(methods, world) if betas is None else _over_betas(betas)


def _over_layers(layers: str) -> list[Method]:
    chosen = list(dict.fromkeys(text.strip() for text in layers.split(",")))
    for text in chosen:
        checked(PosteriorConfig, {"base_model": "", "layers": text})
    families: tuple[Family, ...] = ("subspace", "kronecker")
    return [Abmll(family, layers=text) for family in families for text in chosen]


def _over_betas(betas: str) -> list[Method]:
    try:
        values = [float(text) for text in betas.split(",")]
    except ValueError:
        values = []
    if not values or not all(0 <= value < math.inf for value in values):
        raise AbmllError(f"betas must be numbers from 0 on, joined by commas, not {betas!r}", field="betas")
    return [Abmll("subspace", beta=value) for value in dict.fromkeys(values)]
