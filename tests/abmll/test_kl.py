from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode

import abmll.kl
from abmll.kl import kl, kl_layer
from abmll.posterior import Family, LayerPosterior, Posterior, PosteriorConfig, mean, standard_deviation
from tests.abmll.conftest import FAMILIES, random_layer


def dense(layer: LayerPosterior) -> Normal:
    return Normal(mean(layer) if layer.core is None else layer.core, standard_deviation(layer))


def of_distributions(q: LayerPosterior, p: LayerPosterior) -> Tensor:
    return kl_divergence(dense(q), dense(p)).sum()


@pytest.mark.parametrize("shape", [(7, 11), (1, 5), (16, 3)])
def test_kl_is_that_of_the_dense_gaussians(family: Family, shape: tuple[int, int]) -> None:
    for seed in range(5):
        q, p = random_layer(family, *shape, seed), random_layer(family, *shape, 100 + seed)
        torch.testing.assert_close(kl_layer(q, p), of_distributions(q, p), rtol=1e-9, atol=1e-9)


def test_its_gradients_are_those_of_the_dense_gaussians(family: Family) -> None:
    layers = random_layer(family, 6, 9, 1), random_layer(family, 6, 9, 2)
    gradients: list[list[Tensor]] = []
    for measure in (kl_layer, of_distributions):
        leaves = [{k: t.clone().requires_grad_() for k, t in layer.tensors().items()} for layer in layers]
        q, p = (layer.with_tensors(leaf) for layer, leaf in zip(layers, leaves, strict=True))
        measure(q, p).backward()
        gradients.append([t.grad for leaf in leaves for t in leaf.values() if t.grad is not None])
    assert len(gradients[0]) == (4 if family == "subspace" else 8)  # q and p share a subspace's factors
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


def test_blocks_of_rows_sum_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    q, p = random_layer("lowrank", 37, 5, 1), random_layer("lowrank", 37, 5, 2)
    whole = kl_layer(q, p)
    monkeypatch.setattr(abmll.kl, "_BLOCK_ENTRIES", 20)
    leaf = q.b.clone().requires_grad_()
    blocked = kl_layer(q.with_tensors(q.tensors() | {"mean.b": leaf}), p)
    torch.testing.assert_close(blocked, whole)
    blocked.backward()
    assert leaf.grad is not None
    step = 1e-6 * torch.randn_like(leaf)
    moved = of_distributions(q.with_tensors(q.tensors() | {"mean.b": q.b + step}), p)
    torch.testing.assert_close(moved - whole, (leaf.grad * step).sum(), rtol=1e-3, atol=1e-9)


def test_kl_to_itself_is_zero_and_to_a_neighbour_tiny_but_positive_in_float32(family: Family) -> None:
    layer = random_layer(family, 32, 64, 1, torch.float32)
    assert kl_layer(layer, layer).item() == pytest.approx(0.0, abs=1e-6)
    near = layer.with_tensors({key: tensor + 1e-4 for key, tensor in layer.tensors().items()})
    exact = of_distributions(*(item.with_tensors({k: t.double() for k, t in item.tensors().items()})
                               for item in (near, layer)))  # fmt: skip
    assert kl_layer(near, layer).item() == pytest.approx(exact.item(), rel=1e-3)


def test_kl_is_computed_in_float32_whatever_the_parameters_and_autocast(family: Family) -> None:
    q, p = (random_layer(family, 8, 8, seed, torch.bfloat16) for seed in (1, 2))
    with torch.autocast("cpu", torch.bfloat16):
        result = kl_layer(q, p)
    assert result.dtype == torch.float32
    wide = [layer.with_tensors({k: t.double() for k, t in layer.tensors().items()}) for layer in (q, p)]
    assert result.item() == pytest.approx(of_distributions(*wide).item(), rel=1e-5)


class Operations(TorchDispatchMode):
    """Counts the operations that torch runs."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["kronecker", "subspace"])
def test_many_layers_take_few_more_operations_than_one(family: Family) -> None:
    config = PosteriorConfig(base_model="x", family=family)
    counts: list[int] = []
    for layers in (1, 16):
        q, p = (
            Posterior(config, {str(n): random_layer(family, 4, 5, seed + n) for n in range(layers)}) for seed in (0, 50)
        )
        with Operations() as operations:
            kl(q, p)
        counts.append(operations.count)
    assert counts[1] < 4 * counts[0]


def test_layers_add_up_and_must_be_the_same(family: Family) -> None:
    config = PosteriorConfig(base_model="x")
    shapes = {"a": (4, 5), "b": (4, 5), "c": (5, 4), "d": (4, 5)}
    q, p = (
        Posterior(config, {n: random_layer(family, *shape, s + ord(n)) for n, shape in shapes.items()}) for s in (0, 50)
    )
    expected = sum(of_distributions(q.layers[n], p.layers[n]) for n in shapes)
    torch.testing.assert_close(kl(q, p), torch.as_tensor(expected))
    with pytest.raises(ValueError, match="same layers"):
        kl(q, Posterior(config, {"a": p.layers["a"]}))
    with pytest.raises(ValueError, match="one scale family"):
        kl_layer(*(random_layer(each, 4, 5, 1) for each in FAMILIES[:2]))
