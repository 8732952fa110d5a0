"""The methods that the benchmark compares. To add one: write a ``Method`` in a file here, and name it below."""

from __future__ import annotations

from abmll.errors import AbmllError
from training.benchmark.bayesian import Blob, Laplace, Tfb
from training.benchmark.exact import ExactBayes
from training.benchmark.meta_learned import FirstOrderMaml, Maml, Reptile
from training.benchmark.method import Method
from training.benchmark.ours import Abmll
from training.benchmark.point import Ensemble, InContext, Lora, McDropout, MultiTask, ZeroShot
from training.benchmark.world import World

OURS = ("abmll kronecker", "abmll lowrank")


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
        Abmll("kronecker"),
        Abmll("lowrank"),
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
