"""Draws as PEFT adapters."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file

from abmll.draws import draw, draw_signs, save_adapter, stack_signs, zero_factors
from abmll.layers import attach
from abmll.posterior import Family, PosteriorConfig, mean
from tests.abmll.conftest import ARCHITECTURES, random_posterior, tiny_model

IDS = torch.tensor([[5, 9, 33, 2, 71, 14], [8, 8, 1, 60, 90, 3]])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("index", "layers"), [(0, "all"), (3, "last"), (None, "all")])
def test_peft_gives_a_draw_the_same_logits(
    architecture: str, family: Family, index: int | None, layers: str, tmp_path: Path
) -> None:
    targets = ARCHITECTURES[architecture]
    attached = attach(tiny_model(architecture), targets, layers)
    posterior = random_posterior(attached, family, targets, 1)
    signs = None if index is None else stack_signs([draw_signs(posterior, 7, index)] * len(IDS))
    with torch.no_grad(), attached.using(posterior, signs) as model:
        ours = model(input_ids=IDS).logits
    save_adapter(draw(posterior, 7, index), posterior, tmp_path)
    plain = tiny_model(architecture)
    with torch.no_grad():
        base = plain(input_ids=IDS).logits
    peft: Any = PeftModel.from_pretrained(plain, str(tmp_path)).eval()
    with torch.no_grad():
        theirs = peft(input_ids=IDS).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert len([name for name, _ in peft.named_parameters() if "lora_A" in name]) == len(posterior.layers)
    assert (theirs - base).abs().max() > 1e-2  # the adapter was loaded at all


def test_a_zero_adapter_is_the_base_model(tmp_path: Path) -> None:
    plain = tiny_model("llama")
    attached = attach(tiny_model("llama"), ("q_proj", "v_proj"))
    posterior = random_posterior(attached, "kronecker", ("q_proj", "v_proj"), 1)
    save_adapter(zero_factors(posterior), posterior, tmp_path, rank=8)
    with torch.no_grad():
        base = plain(input_ids=IDS).logits
        assert torch.equal(PeftModel.from_pretrained(plain, str(tmp_path)).eval()(input_ids=IDS).logits, base)


def test_a_draw_is_a_function_of_posterior_seed_and_index(family: Family) -> None:
    attached = attach(tiny_model("llama"), ("q_proj", "v_proj"))
    posterior = random_posterior(attached, family, ("q_proj", "v_proj"), 1)
    name = next(iter(posterior.layers))
    first = draw(posterior, 3, 5)[name]
    torch.manual_seed(99)
    for a, b in zip(first, draw(posterior, 3, 5)[name], strict=True):
        assert torch.equal(a, b)
    for other in (draw(posterior, 3, 6), draw(posterior, 4, 5)):
        assert not torch.equal(first[1], other[name][1])
    layers = [draw_signs(posterior, 3, 5)[key].v for key in posterior.layers]
    assert not torch.equal(layers[0], layers[1])


def test_a_pair_of_draws_has_the_mean_as_its_mean(family: Family) -> None:
    attached = attach(tiny_model("llama"), ("q_proj", "v_proj"))
    posterior = random_posterior(attached, family, ("q_proj", "v_proj"), 1)
    for name, layer in posterior.layers.items():
        pair = [draw(posterior, 3, index)[name] for index in (4, 5)]
        updates = [b @ a for a, b in pair]
        assert not torch.allclose(updates[0], mean(layer))
        torch.testing.assert_close((updates[0] + updates[1]) / 2, mean(layer))


def test_adapters_are_padded_to_the_rank_and_say_so(family: Family, tmp_path: Path) -> None:
    attached = attach(tiny_model("llama"), ("q_proj", "v_proj"))
    posterior = random_posterior(attached, family, ("q_proj", "v_proj"), 1)
    factors = draw(posterior, 0, 0)
    assert {a.shape[0] for a, _ in factors.values()} == {posterior.config.draw_rank}
    save_adapter(factors, posterior, tmp_path, rank=16, dtype=torch.bfloat16)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (16, 16, ["q_proj", "v_proj"])
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(16 in tensor.shape for tensor in tensors.values())


def test_default_ranks_fit_what_engines_load() -> None:
    assert PosteriorConfig(base_model="x", family="kronecker").draw_rank == 8
    assert PosteriorConfig(base_model="x", family="lowrank").draw_rank <= 16
    assert PosteriorConfig(base_model="x", family="subspace").draw_rank == 16


@pytest.mark.parametrize("revision", ["5f0b02c", None])
def test_an_adapter_names_its_base_model_and_the_revision_of_it(revision: str | None, tmp_path: Path) -> None:
    attached = attach(tiny_model("llama"), ("q_proj", "v_proj"))
    posterior = random_posterior(attached, "kronecker", ("q_proj", "v_proj"), 1)
    pinned = posterior.config.model_copy(update={"base_model": "someone/llama", "base_revision": revision})
    save_adapter(draw(posterior, 0, 0), replace(posterior, config=pinned), tmp_path)
    config = PeftConfig.from_pretrained(str(tmp_path))
    assert (config.base_model_name_or_path, config.revision) == ("someone/llama", revision)
