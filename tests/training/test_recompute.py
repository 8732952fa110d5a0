from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, OPTConfig

from abmll.errors import AbmllError
from training.base_model import load_base
from training.recompute import recompute_activations

IDS = torch.tensor([[5, 9, 200, 31, 7, 64], [8, 8, 90, 2, 45, 11]])


def opt() -> Any:
    """A model whose blocks drop a part of what they compute while it is in training mode."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=256, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=32
    )
    assert config.dropout > 0
    return AutoModelForCausalLM.from_config(config).eval()


def gradients(model: Any) -> tuple[float, list[torch.Tensor]]:
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return loss.item(), [weight.grad.clone() for weight in model.parameters()]


def test_blocks_run_again_in_the_backward_pass_and_give_the_same_gradients() -> None:
    model = opt()
    runs = [0]
    block = model.get_decoder().layers[0].fc1
    block.register_forward_hook(lambda *_: runs.__setitem__(0, runs[0] + 1))
    plain, plain_gradients = gradients(model)
    assert runs == [1]
    recompute_activations(model)
    again, again_gradients = gradients(model)
    assert runs == [3]
    assert again == plain
    assert all(
        torch.allclose(one, other, atol=1e-7) for one, other in zip(plain_gradients, again_gradients, strict=True)
    )
    with torch.no_grad():
        model(input_ids=IDS)
    assert runs == [4]


def test_a_model_that_computes_again_decodes_as_before(tiny_model_folder: Path) -> None:
    texts: list[list[int]] = []
    for again in (False, True):
        base = load_base(str(tiny_model_folder), gradient_checkpointing=again)
        prompt = base.tokenizer("the film was", return_tensors="pt")
        out = base.model.generate(**prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)
        texts.append(out[0].tolist())
    assert texts[0] == texts[1]
    assert len(texts[0]) > 4


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(AbmllError, match=r"no blocks .* without --gradient-checkpointing") as error:
        recompute_activations(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    assert error.value.field == "gradient_checkpointing"
