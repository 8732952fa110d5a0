"""Tiny random models of the architectures that people have, through all that a real one goes through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from abmll.draw_scores import score_draws
from abmll.draws import draw, draw_signs, save_adapter, stack_signs
from abmll.layers import attach, check_base, checkpoint_fingerprint
from abmll.objective import data_loss
from abmll.posterior import Family, PosteriorConfig
from abmll.store import Record, load_posterior, save_posterior
from tests.architectures import ARCHITECTURES, write_model
from tests.training.conftest import rule_task
from training.adaptation import AdaptConfig, adapt
from training.base_model import load_base
from training.episodes import EpisodeConfig, label
from training.meta import MetaConfig, meta_train

FAMILIES: list[Family] = ["kronecker", "subspace"]
INNER = AdaptConfig(steps=8, learning_rate=2e-2, beta=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_is_trained_saved_drawn_and_taught(
    architecture: str, family: Family, tiny_model_folder: Path, tmp_path: Path
) -> None:
    folder = write_model(architecture, tiny_model_folder, tmp_path / "model")
    base = load_base(str(folder))
    config = PosteriorConfig(base_model=str(folder), family=family, rank=4, targets=("q_proj", "v_proj", "down_proj"))
    attached = attach(base.model, config.targets)
    meta = MetaConfig(steps=1, warmup=0, inner=INNER, episodes=EpisodeConfig(shots=(2,), queries=2))
    theta = meta_train(base, attached, [rule_task(0)], config, meta, tmp_path / "work")
    saved = save_posterior(tmp_path / "theta", theta, Record())
    stored = load_posterior(tmp_path / "theta")
    assert stored.digest == saved.digest
    check_base(stored.posterior, checkpoint_fingerprint(folder, theta.layers), architecture)

    two = rule_task(0).examples[:2]
    phi = adapt(base, attached, stored.posterior, two, INNER)
    data = label(base, config.template, two)
    with torch.no_grad():
        before, after = (data_loss(attached, posterior, data, None).item() for posterior in (theta, phi))
    assert after < before - 1e-3

    question = data[0].question
    ids = torch.tensor([[*question.prompt, *question.options[0]]])
    with torch.no_grad(), attached.using(phi, stack_signs([draw_signs(phi, 7, 3)])) as model:
        ours = model(input_ids=ids).logits
    save_adapter(draw(phi, 7, 3), phi, tmp_path / "draw")
    plain: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        alone = plain(input_ids=ids).logits
    peft: Any = PeftModel.from_pretrained(plain, str(tmp_path / "draw")).eval()
    with torch.no_grad():
        theirs = peft(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert (theirs - alone).abs().max() > 1e-2
    logs = theirs.log_softmax(-1)[0, len(question.prompt) - 1 : -1]
    whole = logs.gather(1, torch.tensor(question.options[0])[:, None]).sum()
    scored = score_draws(attached, phi, [question], [3], 7, normalize="sum")[0, 0, 0]
    assert scored.item() == pytest.approx(whole.item(), abs=1e-3)
