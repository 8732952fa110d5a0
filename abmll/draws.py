"""Draws from a posterior that are ordinary LoRA adapters.

A dense sample M + S * E cannot be served as LoRA. With E = u v^T, u and v independent signs (Flipout,
Wen et al. 2018), a draw is B A + diag(u) S diag(v): of low rank, with exactly the first two moments of
the dense Gaussian for every layer, since E[v_j v_k] = E[u_j u_k] = 1 if j = k, else 0. In ``subspace`` the same
signs go on the core's noise, B (C + diag(u) S diag(v)) A: a draw has the mean's own rank.

Draws come in mirrored pairs (antithetic sampling, Hammersley & Morton 1956): the noise of draw 2k + 1 is that of draw
2k, negated. Each is still a draw, and what a prediction owes to the noise linearly cancels in a pair's mean. Of a
mixture the pairs take the members in turn.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from abmll.posterior import LayerPosterior, Posterior, block_number


@dataclass(frozen=True)
class Signs:
    """Sign vectors of one or more draws for one layer.

    Attributes:
        u: Entries -1 or 1, shape (..., rows of S): d_out, or the core's width.
        v: Entries -1 or 1, shape (..., columns of S): d_in, or the core's width.
        member: Which Gaussian of a mixture each draw is from, shape (...); None where there is one.
    """

    u: Tensor
    v: Tensor
    member: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Signs:
        """Returns the signs with ``function`` applied to each tensor."""
        return Signs(function(self.u), function(self.v), None if self.member is None else function(self.member))


def _random_signs(size: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    return torch.randint(0, 2, (size,), generator=generator).to(dtype) * 2 - 1


def draw_signs(posterior: Posterior, seed: int, index: int) -> dict[str, Signs]:
    """Returns the signs of draw ``index``: a function of (layer names and shapes, seed, index) alone.

    Draws 2k and 2k + 1 are mirrored.

    The parameters do not enter, so that posteriors before and after adaptation share their noise and
    differences between them are not noise.

    Returns:
        Module name to signs, in the parameters' dtype, on the CPU.
    """
    signs: dict[str, Signs] = {}
    pair, mirrored = divmod(index, 2)
    for name, layer in posterior.layers.items():
        key = f"{seed}:{pair}:{name}".encode()
        layer_seed = int.from_bytes(hashlib.sha256(key).digest()[:7], "big")
        generator = torch.Generator().manual_seed(layer_seed)
        dtype = layer.a.dtype
        rows, columns = layer.noise_shape
        u = _random_signs(rows, generator, dtype)
        member = torch.tensor(pair % layer.members) if layer.members > 1 else None
        signs[name] = Signs(-u if mirrored else u, _random_signs(columns, generator, dtype), member)
    return signs


def for_all_members(draws: int, members: int) -> int:
    """Returns so many draws, or a few more: as many pairs of each member of a mixture."""
    pairs = 2 * members
    return draws if members == 1 else -(-draws // pairs) * pairs


def stack_signs(signs: Sequence[Mapping[str, Signs]]) -> dict[str, Signs]:
    """Stacks the signs of several draws: module name to u (draws, rows), v (draws, columns), member (draws,)."""

    def stacked(name: str) -> Signs:
        members = [member for draw in signs if (member := draw[name].member) is not None]
        u, v = torch.stack([draw[name].u for draw in signs]), torch.stack([draw[name].v for draw in signs])
        return Signs(u, v, torch.stack(members) if members else None)

    return {name: stacked(name) for name in signs[0]}


def scale_factors(layer: LayerPosterior) -> tuple[Tensor, Tensor]:
    """Returns (B_S, A_S) with S = B_S A_S up to sign, shapes (d_out, k) and (k, d_in).

    k is 1 for ``kronecker``, r_s + 1 for ``lowrank``, whose offset c is the outer product of two
    constant vectors. Entries of B_S A_S may be negative: a draw's signs make |.| needless.
    """
    if layer.core is not None:
        raise ValueError("S of a subspace posterior is small and dense; it has no factors")
    if layer.family == "kronecker":
        return layer.scale["log_s"].exp()[:, None], layer.scale["log_t"].exp()[None, :]
    a, b = layer.scale["a"], layer.scale["b"]
    root = layer.offset**0.5
    return torch.cat([b, b.new_full((b.shape[0], 1), root)], dim=1), torch.cat(
        [a, a.new_full((1, a.shape[1]), root)], dim=0
    )


def drawn_core(layer: LayerPosterior, signs: Signs | None) -> Tensor:
    """Returns C + diag(u) S diag(v) of a ``subspace`` layer, shape (..., r, r) for signs (..., r).

    Without signs, the mean C; of a mixture that over its members.
    """
    core, scale = layer.mean_core if signs is None else layer.core, layer.scale["log_s"].exp()
    if core is None:
        raise ValueError("only a subspace posterior has a core")
    if signs is None:
        return core
    if layer.members > 1:
        if signs.member is None:
            raise ValueError("signs of a mixture's draws say which member each is from")
        core, scale = core[signs.member], scale[signs.member]
    return core + signs.u[..., :, None] * scale * signs.v[..., None, :]


def draw_factors(layer: LayerPosterior, signs: Signs | None) -> tuple[Tensor, Tensor]:
    """Returns a draw of one layer as LoRA factors (A, B), shapes (k, d_in) and (d_out, k).

    Without signs, the mean.
    """
    if layer.core is not None:
        return layer.a, layer.b @ drawn_core(layer, signs)
    if signs is None:
        return layer.a, layer.b
    b_scale, a_scale = scale_factors(layer)
    a = torch.cat([layer.a, a_scale * signs.v], dim=0)
    b = torch.cat([layer.b, b_scale * signs.u[:, None]], dim=1)
    return a, b


def draw(posterior: Posterior, seed: int, index: int | None) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns draw ``index`` as LoRA factors (A, B) by module name; the mean for ``index`` None."""
    signs = None if index is None else draw_signs(posterior, seed, index)
    return {
        name: draw_factors(layer, None if signs is None else signs[name]) for name, layer in posterior.layers.items()
    }


def save_adapter(
    factors: Mapping[str, tuple[Tensor, Tensor]],
    posterior: Posterior,
    folder: Path,
    *,
    rank: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes LoRA factors as a PEFT adapter (``adapter_model.safetensors``, ``adapter_config.json``).

    Args:
        factors: Module name to (A, B).
        posterior: Whose configuration says base model and targets.
        folder: Made if absent.
        rank: Pads the factors with zeros to this rank.
        dtype: Of the stored tensors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    size = rank or max(a.shape[0] for a, _ in factors.values())
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in factors.items():
        padded_a, padded_b = a.new_zeros(size, a.shape[1]), b.new_zeros(b.shape[0], size)
        padded_a[: a.shape[0]], padded_b[:, : b.shape[1]] = a.detach(), b.detach()
        tensors[f"base_model.model.{name}.lora_A.weight"] = padded_a.to("cpu", dtype).contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = padded_b.to("cpu", dtype).contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": posterior.config.base_model,
        "revision": posterior.config.base_revision,
        "r": size,
        "lora_alpha": size,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.rsplit(".", 1)[-1] for name in posterior.layers}),
        "layers_to_transform": None if posterior.config.layers == "all" else _blocks(posterior.layers),
        "inference_mode": True,
        "fan_in_fan_out": False,
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _blocks(modules: Iterable[str]) -> list[int]:
    """Numbers of the blocks that modules belong to."""
    return sorted({number for name in modules if (number := block_number(name)) is not None})


def zero_factors(posterior: Posterior) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns factors of rank 1 whose update is zero: the base model, as an adapter."""
    return {
        name: (layer.a.new_zeros(1, layer.a.shape[1]), layer.b.new_zeros(layer.b.shape[0], 1))
        for name, layer in posterior.layers.items()
    }
