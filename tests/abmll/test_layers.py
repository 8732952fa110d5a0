from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from abmll.draws import Signs
from abmll.errors import PosteriorMismatch
from abmll.layers import (
    VariationalLinear,
    attach,
    check_base,
    checkpoint_fingerprint,
    fingerprint,
    init_posterior,
    target_layers,
)
from abmll.posterior import Family, PosteriorConfig, mean, standard_deviation
from tests.abmll.conftest import ARCHITECTURES, random_layer, random_posterior, tiny_model

_FIVE = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=5, num_attention_heads=1)


class _Sizes(TorchDispatchMode):
    """Sizes of all tensors that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else (result,):
            if isinstance(item, Tensor) and not func.is_view:
                self.seen.add(item.numel())
        return result


def test_the_pass_is_that_of_the_dense_update(family: Family) -> None:
    layer = random_layer(family, 5, 7, 1)
    generator = torch.Generator().manual_seed(0)
    linear = VariationalLinear(torch.nn.Linear(7, 5, dtype=torch.float64))
    u, v = (torch.randint(0, 2, (3, n), generator=generator).double() * 2 - 1 for n in layer.noise_shape)
    x = torch.randn(3, 4, 7, generator=generator, dtype=torch.float64)
    linear.posterior, linear.signs = layer, Signs(u, v)
    # |S| is S up to a sign of each entry; with S as it is made, the pass must agree exactly.
    scale = standard_deviation(layer)
    if family == "lowrank":
        scale = layer.scale["b"] @ layer.scale["a"] + layer.offset
    for row in range(3):
        noise = u[row][:, None] * scale * v[row]
        if layer.core is not None:
            noise = layer.b @ noise @ layer.a
        weight = linear.base.weight + mean(layer) + noise
        torch.testing.assert_close(linear(x)[row], x[row] @ weight.T + linear.base.bias)


def test_no_tensor_of_the_weights_size_is_made_forward_or_backward(family: Family) -> None:
    d_out, d_in = 37, 53
    layer = random_layer(family, d_out, d_in, 1, torch.float32)
    leaves = {key: tensor.clone().requires_grad_() for key, tensor in layer.tensors().items()}
    linear = VariationalLinear(torch.nn.Linear(d_in, d_out).requires_grad_(False))
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.randint(0, 2, (2, n), generator=generator).float() * 2 - 1 for n in layer.noise_shape)
    linear.posterior, linear.signs = layer.with_tensors(leaves), Signs(u, v)
    x = torch.randn(2, 3, d_in, generator=generator, requires_grad=True)
    with _Sizes() as sizes:
        linear(x).square().sum().backward()
    assert all(leaf.grad is not None for leaf in leaves.values())
    assert x.grad is not None
    assert max(sizes.seen) < d_out * d_in
    with _Sizes() as sizes:
        mean(layer)
    assert d_out * d_in in sizes.seen  # the measure would have seen it


def test_attaching_freezes_and_detaching_gives_the_model_back() -> None:
    model = tiny_model("llama")
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        before = model(ids).logits
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    attached = attach(model, ("q_proj", "v_proj"))
    posterior = random_posterior(attached, "kronecker", ("q_proj", "v_proj"), 1)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, before)
        with attached.using(posterior) as used:
            assert not torch.allclose(used(ids).logits, before)
        torch.testing.assert_close(model(ids).logits, before)
    attached.detach()
    assert {key: tensor.shape for key, tensor in model.state_dict().items()} == {k: t.shape for k, t in weights.items()}
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[key])


def test_targets_that_are_not_there_or_not_linear_are_refused_by_name() -> None:
    with pytest.raises(PosteriorMismatch, match=r"query.*linear layers are.*q_proj"):
        attach(tiny_model("llama"), ("q_proj", "query"))
    with pytest.raises(PosteriorMismatch, match="Embedding"):
        attach(tiny_model("llama"), ("embed_tokens",))


@pytest.mark.parametrize(
    ("layers", "count"), [("all", 5), ("last", 1), ("top-1%", 1), ("top-20%", 1), ("top-21%", 2), ("top-100%", 5)]
)
def test_the_top_blocks_are_chosen_by_share(layers: str, count: int) -> None:
    found = target_layers(LlamaForCausalLM(_FIVE), ("q_proj", "down_proj"), layers)
    assert {name.split(".")[2] for name in found} == {"0", "1", "2", "3", "4"} - {str(i) for i in range(5 - count)}
    assert len(found) == 2 * count


@pytest.mark.parametrize("layers", ["top-0%", "top-101%", "first", "top-25", ""])
def test_layers_that_make_no_sense_are_refused(layers: str) -> None:
    with pytest.raises(ValidationError, match="layers"):
        PosteriorConfig(base_model="x", layers=layers)


def test_a_posterior_over_other_layers_is_refused() -> None:
    attached = attach(tiny_model("llama"), ("q_proj", "v_proj"))
    other = random_posterior(attach(tiny_model("llama"), ("q_proj",)), "kronecker", ("q_proj",), 1)
    with pytest.raises(PosteriorMismatch), attached.using(other):
        pass


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_posterior_knows_its_base_model_from_memory_and_from_disk(architecture: str, tmp_path: Any) -> None:
    targets = ARCHITECTURES[architecture]
    model = tiny_model(architecture)
    model.save_pretrained(tmp_path)
    attached = attach(model, targets)
    posterior = init_posterior(attached, PosteriorConfig(base_model="tiny", targets=targets), 0)
    actual = fingerprint(lambda key: attached.layers[key].base.weight, attached.layers)
    check_base(posterior, actual, "tiny")
    check_base(posterior, checkpoint_fingerprint(tmp_path, posterior.layers), "tiny")
    half = tiny_model(architecture, torch.bfloat16)
    again = attach(half, targets)
    check_base(posterior, fingerprint(lambda key: again.layers[key].base.weight, again.layers), "tiny in bf16")
    with torch.no_grad():
        next(iter(attached.layers.values())).base.weight[0, 0] += 1.0
    with pytest.raises(PosteriorMismatch, match="made for tiny"):
        check_base(posterior, fingerprint(lambda key: attached.layers[key].base.weight, attached.layers), "other")


def test_gradient_memory_is_that_of_the_posterior_alone() -> None:
    attached = attach(tiny_model("llama"), ("q_proj", "v_proj"))
    posterior = random_posterior(attached, "kronecker", ("q_proj", "v_proj"), 1)
    leaves = {key: tensor.requires_grad_() for key, tensor in posterior.tensors().items()}
    with attached.using(posterior.with_tensors(leaves)) as model:
        model(torch.arange(1, 9)[None]).logits.sum().backward()
    gc.collect()
    assert all(parameter.grad is None for parameter in attached.model.parameters())
    assert all(leaf.grad is not None for key, leaf in leaves.items() if ".mean." in key)
