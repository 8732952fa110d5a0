"""The Gaussian posterior over LoRA updates, as data.

For a linear layer with frozen weight W0 (d_out x d_in), the update has independent Gaussian entries
with mean M = B A and standard deviation S. The global posterior theta and each task's posterior phi
have this form (ABMLL, arXiv 2508.14285, section 3).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from abmll.examples import Template

Family = Literal["lowrank", "kronecker"]
Normalize = Literal["sum", "mean"]


class PosteriorConfig(BaseModel, frozen=True):
    """What a posterior is made of and for.

    A draw's adapter has rank ``rank + scale_rank + 1`` (lowrank) or ``rank + 1`` (kronecker); engines
    load adapters of rank 1, 8, 16, 32, ..., so the defaults give 8 and 16.
    """

    base_model: str = Field(description="hub name or folder of the base model")
    base_revision: str | None = Field(default=None, description="commit or tag of the base model on the hub")
    base_fingerprint: str | None = Field(default=None, description="hash of the targeted base weights")
    targets: tuple[str, ...] = Field(default=("q_proj", "v_proj"), description="names of the targeted modules")
    family: Family = "kronecker"
    rank: int = Field(default=7, ge=1, le=256, description="rank of the mean")
    scale_rank: int = Field(default=7, ge=1, le=256, description="rank of B_sigma A_sigma (lowrank)")
    scale_init: float = Field(default=0.01, gt=0, description="standard deviation at the start; the offset c (lowrank)")
    normalize: Normalize = Field(
        default="mean", description="an option's score: log-probability of its text, or per token"
    )
    suffix: str = Field(default=Template().suffix, description="prompt template: follows the question")
    separator: str = Field(default=Template().separator, description="prompt template: stands before an option")

    @property
    def draw_rank(self) -> int:
        """Rank of a draw's adapter."""
        return self.rank + 1 + (self.scale_rank if self.family == "lowrank" else 0)

    @property
    def template(self) -> Template:
        """The text format that the posterior was trained with."""
        return Template(self.suffix, self.separator)


@dataclass(frozen=True)
class LayerPosterior:
    """Parameters of one layer's Gaussian, float32 (float64 in tests).

    Attributes:
        a: Mean factor A, shape (r, d_in).
        b: Mean factor B, shape (d_out, r).
        scale: Parameters of S. ``kronecker``: ``log_s`` (d_out,) and ``log_t`` (d_in,), S = exp(log_s)
            exp(log_t)^T. ``lowrank``: ``a`` (r_s, d_in) and ``b`` (d_out, r_s), S = |b a + c|.
        offset: c of ``lowrank``; 0 for ``kronecker``.
    """

    a: Tensor
    b: Tensor
    scale: Mapping[str, Tensor]
    offset: float = 0.0

    @property
    def family(self) -> Family:
        """The scale family, told by its parameters."""
        return "kronecker" if "log_s" in self.scale else "lowrank"

    def tensors(self) -> dict[str, Tensor]:
        """Returns all parameters by name: mean.a, mean.b and scale.*."""
        return {"mean.a": self.a, "mean.b": self.b} | {f"scale.{k}": v for k, v in self.scale.items()}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> LayerPosterior:
        """Returns a layer of the same kind with other parameters, named as by ``tensors``."""
        return replace(
            self,
            a=tensors["mean.a"],
            b=tensors["mean.b"],
            scale={key: tensors[f"scale.{key}"] for key in self.scale},
        )


@dataclass(frozen=True)
class Posterior:
    """Gaussians of all targeted layers.

    Attributes:
        config: What it is made of and for.
        layers: Module name in the base model to its Gaussian.
    """

    config: PosteriorConfig
    layers: Mapping[str, LayerPosterior]

    def tensors(self) -> dict[str, Tensor]:
        """Returns all parameters, keyed ``<module>.mean.a`` and so on, in a fixed order."""
        return {f"{name}.{key}": t for name, layer in self.layers.items() for key, t in layer.tensors().items()}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Posterior:
        """Returns a posterior of the same kind with other parameters."""
        layers = {
            name: layer.with_tensors({key: tensors[f"{name}.{key}"] for key in layer.tensors()})
            for name, layer in self.layers.items()
        }
        return replace(self, layers=layers)

    def map(self, function: Callable[[Tensor], Tensor]) -> Posterior:
        """Returns a posterior with ``function`` applied to each parameter tensor."""
        return self.with_tensors({key: function(tensor) for key, tensor in self.tensors().items()})

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(tensor.numel() for tensor in self.tensors().values())

    @property
    def weights(self) -> int:
        """Number of Gaussian weights, the sum of d_out d_in over layers."""
        return sum(layer.b.shape[0] * layer.a.shape[1] for layer in self.layers.values())

    def digest(self) -> str:
        """Hash of configuration and parameters, 16 hexadecimal digits: equal posteriors, equal digests."""
        state = hashlib.sha256(self.config.model_dump_json().encode())
        for key, tensor in self.tensors().items():
            state.update(key.encode())
            state.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return state.hexdigest()[:16]


def init_layer(
    d_out: int, d_in: int, config: PosteriorConfig, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> LayerPosterior:
    """Returns a Gaussian with mean zero and standard deviation ``config.scale_init`` in every entry.

    A is uniform as in LoRA (Hu et al. 2022), B is zero; likewise for the scale's pair in ``lowrank``.
    """

    def factor(rank: int) -> Tensor:
        bound = (1.0 / d_in) ** 0.5
        return (2 * torch.rand(rank, d_in, generator=generator, dtype=dtype) - 1) * bound

    a, b = factor(config.rank), torch.zeros(d_out, config.rank, dtype=dtype)
    if config.family == "kronecker":
        half = 0.5 * float(torch.log(torch.tensor(config.scale_init, dtype=torch.float64)))
        scale = {"log_s": torch.full((d_out,), half, dtype=dtype), "log_t": torch.full((d_in,), half, dtype=dtype)}
        return LayerPosterior(a, b, scale)
    scale = {"a": factor(config.scale_rank), "b": torch.zeros(d_out, config.scale_rank, dtype=dtype)}
    return LayerPosterior(a, b, scale, offset=config.scale_init)


def mean(layer: LayerPosterior) -> Tensor:
    """The mean M = B A, shape (d_out, d_in). Dense: for tests and small layers."""
    return layer.b @ layer.a


def signed_scale(layer: LayerPosterior) -> Tensor:
    """S up to the sign of its entries, shape (d_out, d_in). Dense: for tests and small layers."""
    if layer.family == "kronecker":
        return torch.outer(layer.scale["log_s"].exp(), layer.scale["log_t"].exp())
    return layer.scale["b"] @ layer.scale["a"] + layer.offset


def standard_deviation(layer: LayerPosterior) -> Tensor:
    """The standard deviation S, shape (d_out, d_in). Dense: for tests and small layers."""
    return signed_scale(layer).abs()
