"""A random model of a known shape is one that everything else takes: it loads, is taught, and goes on with words."""

from __future__ import annotations

from pathlib import Path

import torch

from abmll.examples import Example
from abmll.layers import attach, check_base, checkpoint_fingerprint
from abmll.store import load_posterior
from training.adaptation import AdaptConfig, adapt
from training.base_model import load_base
from training.random_model import SHAPES, write_random_model


def test_a_random_model_can_be_taught_and_goes_on_with_words(tmp_path: Path) -> None:
    write_random_model(tmp_path / "base", tmp_path / "posterior", "tiny", "kronecker")
    stored = load_posterior(tmp_path / "posterior")
    check_base(stored.posterior, checkpoint_fingerprint(tmp_path / "base", stored.posterior.layers), "random")
    assert stored.calibration is not None
    base = load_base(str(tmp_path / "base"), dtype=torch.bfloat16)
    assert base.model.config.vocab_size == SHAPES["tiny"]["vocab_size"] > len(base.tokenizer)
    # RMSNorm's gradient at a zero vector explodes with the number of layers.
    assert base.model.get_input_embeddings().weight.norm(dim=1).min() > 0

    prompt = torch.tensor([base.tokenizer.encode("please tell me when the next train leaves")])
    tokens = base.model.generate(prompt, max_new_tokens=20, do_sample=False)[0, prompt.shape[1] :].tolist()
    assert len(tokens) == 20  # no token ended the text
    assert max(tokens) < len(base.tokenizer)
    assert not set(tokens) & set(base.tokenizer.all_special_ids)

    attached = attach(base.model, stored.posterior.config.targets)
    examples = [Example(f"word {n}", ("yes", "no"), n % 2) for n in range(4)]
    phi = adapt(base, attached, stored.posterior, examples, AdaptConfig(steps=2))  # raises where it diverges
    assert phi.digest() != stored.posterior.digest()
