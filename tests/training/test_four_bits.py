"""Base weights in 4 bits: gradients, the base model's identity, what they take, and what is refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import abmll
from abmll.errors import AbmllError
from abmll.layers import attach, checkpoint_fingerprint, init_posterior
from abmll.posterior import PosteriorConfig
from tests.training.conftest import TARGETS, rule_task
from training.adaptation import AdaptConfig
from training.base_model import load_base
from training.embedded import BASE
from training.evaluation import EvalConfig, predict_tasks
from training.four_bits import packing


def unpacked(model: Any) -> Any:
    """The same model with each packed weight written out."""
    plain = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.bfloat16)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            weight: Any = layer.weight
            plain.get_submodule(name).weight.data = dequantize_4bit(weight.data, weight.quant_state)
    return plain.requires_grad_(False)


def test_passes_and_gradients_are_those_of_the_written_out_weights_after_passes_without_gradients_too() -> None:
    base = load_base(str(BASE), dtype="nf4")
    plain = unpacked(base.model)
    ids = torch.arange(5, 125).view(3, 40)
    embedded = plain.get_input_embeddings()(ids).detach()

    def gradient(model: Any) -> tuple[Tensor, Tensor]:
        x = embedded.clone().requires_grad_()
        logits = model(inputs_embeds=x).logits
        logits.float().logsumexp(-1).sum().backward()
        assert x.grad is not None
        return logits.detach(), x.grad

    expected = gradient(plain)
    for _ in range(2):
        for found, wanted in zip(gradient(base.model), expected, strict=True):
            assert torch.equal(found, wanted)
        with torch.no_grad():
            assert torch.equal(base.model(inputs_embeds=embedded).logits, expected[0])


def test_the_model_takes_what_was_planned_and_keeps_its_identity() -> None:
    base = load_base(str(BASE), dtype="nf4")
    plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(BASE), dtype=torch.bfloat16)
    held = sum(parameter.nbytes for parameter in base.model.parameters())
    for layer in base.model.modules():
        state: Any = getattr(getattr(layer, "weight", None), "quant_state", None)
        if state is not None:
            inner = state.state2
            held += sum(part.nbytes for part in (state.absmax, state.code, state.offset, inner.absmax, inner.code))
    before = sum(parameter.nbytes for parameter in plain.parameters())
    assert before - packing(plain).saved == held
    assert packing(plain).unpacked == max(layer.weight.nbytes for layer in plain.model.layers[0].mlp.children()
                                          if isinstance(layer, nn.Linear))  # fmt: skip

    config = PosteriorConfig(base_model="x", targets=TARGETS)
    attached = attach(base.model, TARGETS, weights=base.weights)
    prints = init_posterior(attached, config, 0).config.base_fingerprint
    assert prints == checkpoint_fingerprint(BASE, attached.layers)
    assert prints == attach(load_base(str(BASE)).model, TARGETS).fingerprint()


def test_a_task_is_learnt_over_them_as_over_the_weights_themselves() -> None:
    """The global posterior was made over the weights themselves: the base model is still its own."""
    options = ["lights", "music", "alarm"]
    said = {
        "turn on the lamp in the kitchen": "lights",
        "play the new album by that band": "music",
        "wake me up at half past six": "alarm",
        "it is too dark in here": "lights",
        "skip this song please": "music",
        "remind me in ten minutes to look at the oven": "alarm",
    }
    records = [{"prompt": prompt, "options": options, "answer": answer} for prompt, answer in said.items()]
    asked = ["could you dim the lamp in the bedroom", "put on something to dance to", "wake me at eight"]
    plain, packed = (
        abmll.load(device="cpu", dtype=dtype).adapt(records, task="home").predict(asked, options).frame()
        for dtype in ("float32", "nf4")
    )
    assert list(packed["answer"]) == list(plain["answer"]) == options
    difference = (packed["confidence"] - plain["confidence"]).abs().max()
    assert 0 < difference < 0.2


def test_processes_share_the_work_and_change_nothing(tiny_model_folder: Path) -> None:
    base = load_base(str(tiny_model_folder), dtype="nf4")
    attached = attach(base.model, TARGETS, weights=base.weights)
    theta = init_posterior(attached, PosteriorConfig(base_model="tiny", targets=TARGETS), 0)
    tasks, inner = [rule_task(number) for number in range(2)], AdaptConfig(steps=2, learning_rate=2e-2)
    config = EvalConfig(shots=(4,), queries=6, draws=2)
    alone, shared = (predict_tasks(base, attached, theta, tasks, inner, config, jobs=jobs) for jobs in (1, 2))
    for one, other in zip(alone, shared, strict=True):
        torch.testing.assert_close(one.scores, other.scores, atol=5e-2, rtol=5e-2)  # bfloat16, and threads round


def test_what_cannot_be_is_told(monkeypatch: pytest.MonkeyPatch, tiny_model_folder: Path) -> None:
    with pytest.raises(AbmllError, match="let each process have all of them"):
        load_base(str(tiny_model_folder), dtype="nf4", shards=2)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(AbmllError, match=r"pip install 'abmll\[nf4\]'") as caught:
        load_base(str(tiny_model_folder), dtype="nf4")
    assert caught.value.field == "dtype"
