"""A base model of a known shape with random weights, and a posterior for it: ``python -m training.random_model``.

For speed and memory where the real weights cannot be had; its answers mean nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerBase

from abmll.layers import attach, init_posterior
from abmll.posterior import Family, PosteriorConfig
from abmll.store import Record, load_posterior, save_posterior
from training.embedded import BASE, POSTERIOR

# As the model's own configuration on the hub says; tiny is for tests.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "tiny": {
        "vocab_size": 16384,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
    },
}


@torch.no_grad()
def write_random_model(folder: Path, posterior: Path, shape: str, family: Family, device: str = "cpu") -> None:
    """Writes a bf16 base model with the embedded model's tokenizer, and a posterior over its q_proj and v_proj.

    Its weights are drawn as for training from nothing; a token that the tokenizer does not know, or that ends a text,
    is never the likeliest. The posterior is the starting one with every number moved a little, so that draws do
    something, and has the embedded posterior's calibration, so that adaptation does all that it does elsewhere.

    Args:
        folder: Of the model.
        posterior: Folder of the posterior.
        shape: A name in ``SHAPES``.
        family: Of the posterior.
        device: Where to draw the weights.
    """
    torch.manual_seed(0)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(BASE)
    # No padding token: its embedding would be zero, at which RMSNorm's gradient explodes.
    config = LlamaConfig(**SHAPES[shape], bos_token_id=0, eos_token_id=0)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.lm_head.weight[len(tokenizer) :] = 0
    model.lm_head.weight[tokenizer.all_special_ids] = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    about = PosteriorConfig(base_model=str(folder), family=family, rank=8)
    start = init_posterior(attach(model, about.targets), about, 0)
    noise = torch.Generator().manual_seed(0)
    moved = start.map(lambda tensor: tensor + 1e-3 * torch.randn(tensor.shape, generator=noise))
    save_posterior(posterior, moved, Record(), load_posterior(POSTERIOR).calibration)


def main() -> None:
    """Writes both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="gets the folders base and posterior")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--family", choices=get_args(Family), default="kronecker")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    write_random_model(given.folder / "base", given.folder / "posterior", given.shape, given.family, given.device)


if __name__ == "__main__":
    main()
