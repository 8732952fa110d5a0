"""The Gaussian posterior over LoRA updates, as data.

For a linear layer with frozen weight W0 (d_out x d_in), the update has independent Gaussian entries
with mean M = B A and standard deviation S. The global posterior theta and each task's posterior phi
have this form (ABMLL, arXiv 2508.14285, section 3); families ``lowrank`` and ``kronecker`` differ in S.

In the third family, ``subspace``, the update is B C A: the factors belong to theta, tasks share them (but for those
with many examples, where that is chosen), and a task's Gaussian is over the small core C, as in LoRA-XS (Balazy et
al. 2024, arXiv 2405.17604) and in variational inference in a subspace (ScalaBL, Samplawski et al. 2025, arXiv
2506.21408). There are few enough Gaussian weights for KL to count beside a handful of labels. A task's posterior may
be a mixture of several such Gaussians, equal in weight, as deep ensembles are (Wilson & Izmailov 2020, arXiv
2002.08791, section 3.2).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor

from abmll.examples import Template

Family = Literal["lowrank", "kronecker", "subspace"]
Normalize = Literal["sum", "mean"]

_RANK: dict[Family, int] = {"lowrank": 7, "kronecker": 7, "subspace": 16}
_SCALE_INIT: dict[Family, float] = {"lowrank": 0.01, "kronecker": 0.01, "subspace": 0.3}


class PosteriorConfig(BaseModel, frozen=True, allow_inf_nan=False):
    """What a posterior is made of and for.

    A draw's adapter has rank ``rank + scale_rank + 1`` (lowrank), ``rank + 1`` (kronecker) or ``rank``
    (subspace); engines load adapters of rank 1, 8, 16, 32, ..., which the defaults fit.
    """

    base_model: str = Field(description="hub name or folder of the base model")
    base_revision: str | None = Field(default=None, description="commit or tag of the base model on the hub")
    base_fingerprint: str | None = Field(default=None, description="hash of the targeted base weights")
    targets: tuple[str, ...] = Field(default=("q_proj", "v_proj"), description="names of the targeted modules")
    layers: str = Field(
        default="all",
        pattern=r"^(all|last|top-([1-9]\d?|100)%)$",
        description="the model's blocks whose targets are Gaussian: all, last, or the top share, such as top-25%; the "
        "blocks below are run once for all draws",
    )
    family: Family = "kronecker"
    rank: int = Field(
        default_factory=lambda given: _RANK[given.get("family", "kronecker")],
        ge=1,
        le=256,
        description="rank of the mean; width of the core (subspace)",
    )
    scale_rank: int = Field(default=7, ge=1, le=256, description="rank of B_sigma A_sigma (lowrank)")
    scale_init: float = Field(
        default_factory=lambda given: _SCALE_INIT[given.get("family", "kronecker")],
        gt=0,
        description="standard deviation at the start, of the update's entries or of the core's; the offset c (lowrank)",
    )
    normalize: Normalize = Field(
        default="mean", description="an option's score: log-probability of its text, or per token"
    )
    members: int = Field(
        default=1, ge=1, le=32, description="Gaussians that it is a mixture of, equal in weight; subspace alone"
    )
    suffix: str = Field(default=Template().suffix, description="prompt template: follows the question")
    separator: str = Field(default=Template().separator, description="prompt template: stands before an option")

    @model_validator(mode="after")
    def _of_cores(self) -> PosteriorConfig:
        if self.members > 1 and self.family != "subspace":
            raise ValueError(f"members is {self.members}; only a subspace posterior can be a mixture: give 1")
        return self

    @property
    def draw_rank(self) -> int:
        """Rank of a draw's adapter."""
        return {
            "lowrank": self.rank + self.scale_rank + 1,
            "kronecker": self.rank + 1,
            "subspace": self.rank,
        }[self.family]

    @property
    def template(self) -> Template:
        """The text format that the posterior was trained with."""
        return Template(self.suffix, self.separator)


def block_number(module: str) -> int | None:
    """Number of the block that a module belongs to: the first number in its name; None where there is none."""
    return next((int(part) for part in module.split(".") if part.isdigit()), None)


@dataclass(frozen=True)
class LayerPosterior:
    """Parameters of one layer's Gaussian, float32 (float64 in tests).

    Attributes:
        a: Factor A, shape (r, d_in).
        b: Factor B, shape (d_out, r).
        scale: Parameters of S. ``kronecker``: ``log_s`` (d_out,) and ``log_t`` (d_in,), S = exp(log_s)
            exp(log_t)^T. ``lowrank``: ``a`` (r_s, d_in) and ``b`` (d_out, r_s), S = |b a + c|.
            ``subspace``: ``log_s`` (r, r), S = exp(log_s), of the core.
        offset: c of ``lowrank``; 0 for the others.
        core: Mean of the core C, shape (r, r); ``subspace`` only. Of a mixture, those of its members, shape
            (members, r, r), as ``log_s`` is then.
    """

    a: Tensor
    b: Tensor
    scale: Mapping[str, Tensor]
    offset: float = 0.0
    core: Tensor | None = None

    @property
    def family(self) -> Family:
        """The scale family, told by its parameters."""
        if self.core is not None:
            return "subspace"
        return "kronecker" if "log_s" in self.scale else "lowrank"

    @property
    def noise_shape(self) -> tuple[int, int]:
        """Shape of S: that of the update, or of the core."""
        return (self.b.shape[0], self.a.shape[1]) if self.core is None else (self.core.shape[-2], self.core.shape[-1])

    @property
    def members(self) -> int:
        """Gaussians that it is a mixture of."""
        return 1 if self.core is None or self.core.dim() == 2 else len(self.core)

    @property
    def mean_core(self) -> Tensor | None:
        """Mean of the core, of a mixture that over its members, shape (r, r); None where there is no core."""
        return self.core if self.core is None or self.members == 1 else self.core.mean(dim=0)

    def tensors(self) -> dict[str, Tensor]:
        """Returns all parameters by name: mean.* and scale.* are a task's own, shared.* mostly theta's."""
        scale = {f"scale.{k}": v for k, v in self.scale.items()}
        if self.core is not None:
            return {"shared.a": self.a, "shared.b": self.b, "mean.core": self.core} | scale
        return {"mean.a": self.a, "mean.b": self.b} | scale

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> LayerPosterior:
        """Returns a layer of the same kind with other parameters, named as by ``tensors``."""
        kind = "mean" if self.core is None else "shared"
        return replace(
            self,
            a=tensors[f"{kind}.a"],
            b=tensors[f"{kind}.b"],
            scale={key: tensors[f"scale.{key}"] for key in self.scale},
            core=None if self.core is None else tensors["mean.core"],
        )


@dataclass(frozen=True)
class Components:
    """Means of the posteriors of tasks that a global posterior was learnt from, see ``abmll.components``.

    Attributes:
        tasks: Names of the tasks.
        families: Their families.
        cores: Module name to their cores, shape (tasks, r, r), around the global posterior's factors.
    """

    tasks: tuple[str, ...]
    families: tuple[str, ...]
    cores: Mapping[str, Tensor]

    def only(self, chosen: Sequence[int]) -> Components:
        """Returns some of them, by their numbers."""
        cores = {name: own[list(chosen)] for name, own in self.cores.items()}
        tasks, families = (tuple(own[number] for number in chosen) for own in (self.tasks, self.families))
        return Components(tasks, families, cores)


@dataclass(frozen=True)
class Posterior:
    """Gaussians of all targeted layers.

    Attributes:
        config: What it is made of and for.
        layers: Module name in the base model to its Gaussian.
        components: Of a global posterior, what a new task's prior is a mixture of; None: its Gaussian alone.
    """

    config: PosteriorConfig
    layers: Mapping[str, LayerPosterior]
    components: Components | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Returns all parameters, keyed ``<module>.mean.a`` and so on, in a fixed order."""
        return {f"{name}.{key}": t for name, layer in self.layers.items() for key, t in layer.tensors().items()}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Posterior:
        """Returns a posterior of the same kind with other parameters, and no components."""
        layers = {
            name: layer.with_tensors({key: tensors[f"{name}.{key}"] for key in layer.tensors()})
            for name, layer in self.layers.items()
        }
        return Posterior(self.config, layers)

    def with_components(self, components: Components | None) -> Posterior:
        """Returns the same posterior with these components.

        Raises:
            ValueError: It is no single Gaussian over cores.
        """
        if components is not None and (self.config.family != "subspace" or self.config.members > 1):
            raise ValueError("only a subspace posterior that is no mixture has components")
        return replace(self, components=components if components is not None and components.tasks else None)

    def unfamiliar_with(self, family: str) -> Posterior:
        """Returns the same posterior without the components of a family: its tasks may share items."""
        if self.components is None or family not in self.components.families:
            return self
        others = [number for number, own in enumerate(self.components.families) if own != family]
        return self.with_components(self.components.only(others))

    def map(self, function: Callable[[Tensor], Tensor]) -> Posterior:
        """Returns a posterior with ``function`` applied to each parameter tensor, those of components too."""
        mapped = self.with_tensors({key: function(tensor) for key, tensor in self.tensors().items()})
        if self.components is None:
            return mapped
        cores = {name: function(own) for name, own in self.components.cores.items()}
        return replace(mapped, components=replace(self.components, cores=cores))

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(tensor.numel() for tensor in self.tensors().values())

    @property
    def weights(self) -> int:
        """Number of Gaussian weights, over all layers: d_out d_in each, or those of the core."""
        return sum(math.prod(layer.noise_shape) for layer in self.layers.values())

    def digest(self) -> str:
        """Hash of configuration and parameters, 16 hexadecimal digits: equal posteriors, equal digests."""
        # Posteriors of before there was a choice of layers, or of members, keep their digests.
        usual = {"layers": "all", "members": 1}
        untold = {name for name, value in usual.items() if getattr(self.config, name) == value}
        state = hashlib.sha256(self.config.model_dump_json(exclude=untold).encode())
        cores: Mapping[str, Tensor] = {}
        if self.components is not None:
            cores = self.components.cores
            state.update(json.dumps([self.components.tasks, self.components.families]).encode())
        for key, tensor in (self.tensors() | {f"{name}.components": own for name, own in cores.items()}).items():
            state.update(key.encode())
            state.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return state.hexdigest()[:16]


def init_layer(
    d_out: int, d_in: int, config: PosteriorConfig, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> LayerPosterior:
    """Returns a Gaussian with mean zero and standard deviation ``config.scale_init`` in every entry.

    A is uniform as in LoRA (Hu et al. 2022), B is zero; likewise for the scale's pair in ``lowrank``. In
    ``subspace`` B is uniform too and the core zero: a core between zeros would have no gradient.
    """

    def uniform(rows: int, columns: int, fan: int) -> Tensor:
        return (2 * torch.rand(rows, columns, generator=generator, dtype=dtype) - 1) / fan**0.5

    def factor(rank: int) -> Tensor:
        return uniform(rank, d_in, d_in)

    a, b = factor(config.rank), torch.zeros(d_out, config.rank, dtype=dtype)
    if config.family == "subspace":
        core = torch.zeros(config.rank, config.rank, dtype=dtype)
        scale = {"log_s": torch.full_like(core, math.log(config.scale_init))}
        return LayerPosterior(a, uniform(d_out, config.rank, d_out), scale, core=core)
    if config.family == "kronecker":
        half = 0.5 * float(torch.log(torch.tensor(config.scale_init, dtype=torch.float64)))
        scale = {"log_s": torch.full((d_out,), half, dtype=dtype), "log_t": torch.full((d_in,), half, dtype=dtype)}
        return LayerPosterior(a, b, scale)
    scale = {"a": factor(config.scale_rank), "b": torch.zeros(d_out, config.scale_rank, dtype=dtype)}
    return LayerPosterior(a, b, scale, offset=config.scale_init)


def mean(layer: LayerPosterior) -> Tensor:
    """The update's mean, B A or B C A, shape (d_out, d_in). Dense: for tests and small layers."""
    core = layer.mean_core
    return layer.b @ layer.a if core is None else layer.b @ core @ layer.a


def mixture(members: Sequence[Posterior]) -> Posterior:
    """Returns the mixture of posteriors, equal in weight, that share their factors and differ in their cores.

    Raises:
        ValueError: One of them is a mixture itself, or has other factors.
    """
    if any(member.config.members > 1 for member in members):
        raise ValueError("a mixture of mixtures is not supported")
    if len(members) == 1:
        return members[0]
    config = PosteriorConfig.model_validate(members[0].config.model_dump() | {"members": len(members)})
    each = [member.tensors() for member in members]
    if any(not torch.equal(t, each[0][key]) for own in each[1:] for key, t in own.items() if ".shared." in key):
        raise ValueError("members share their factors, and these do not")
    stacked = {
        key: tensor if ".shared." in key else torch.stack([tensors[key] for tensors in each])
        for key, tensor in each[0].items()
    }
    return replace(members[0].with_tensors(stacked), config=config)


def members_of(posterior: Posterior) -> list[Posterior]:
    """Returns the Gaussians that a posterior is a mixture of; of a single one itself."""
    if posterior.config.members == 1:
        return [posterior]
    config, tensors = posterior.config.model_copy(update={"members": 1}), posterior.tensors()
    return [
        replace(
            posterior.with_tensors({key: t if ".shared." in key else t[number] for key, t in tensors.items()}),
            config=config,
        )
        for number in range(posterior.config.members)
    ]


def signed_scale(layer: LayerPosterior) -> Tensor:
    """S up to the sign of its entries, of ``noise_shape``; of a mixture each member's. Dense: for tests."""
    if layer.core is not None:
        return layer.scale["log_s"].exp()
    if layer.family == "kronecker":
        return torch.outer(layer.scale["log_s"].exp(), layer.scale["log_t"].exp())
    return layer.scale["b"] @ layer.scale["a"] + layer.offset


def standard_deviation(layer: LayerPosterior) -> Tensor:
    """The standard deviation S, of ``noise_shape``, of a mixture each member's. Dense: for tests and small layers."""
    return signed_scale(layer).abs()
