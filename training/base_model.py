"""Loading the base model and its tokenizer, from the hub or from a folder."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.distributed.configuration_utils import DistributedConfig

from abmll.errors import AbmllError
from abmll.layers import Weights, checkpoint_weights
from training.four_bits import NF4, quantization, settle
from training.hub import brief, fetch
from training.recompute import recompute_activations


@dataclass(frozen=True)
class BaseModel:
    """A causal language model ready to take a posterior.

    Attributes:
        name: Hub name or folder.
        model: The transformers model, in eval mode.
        tokenizer: Its tokenizer, with a pad token.
        context: The most tokens that it takes.
        revision: Its commit on the hub; None for a folder.
        weights: Its weights as its files have them, where they are packed in the model; else None.
    """

    name: str
    model: Any
    tokenizer: Any
    context: int
    revision: str | None = None
    weights: Weights | None = None

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return next(self.model.parameters()).device


# Of a base model's frozen weights; nf4: in 4 bits, see ``training.four_bits``.
WeightsDtype = torch.dtype | Literal["nf4"]


def weights_dtype(name: str) -> WeightsDtype:
    """Returns what ``load_base`` takes for the dtype of a name, such as ``bfloat16`` or ``nf4``."""
    return NF4 if name == NF4 else getattr(torch, name)


def context_of(config: Any) -> int:
    """The most tokens that a model of this configuration takes."""
    return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 2048


def load_base(
    name: str,
    *,
    revision: str | None = None,
    dtype: WeightsDtype = torch.float32,
    device: str = "cpu",
    context: int | None = None,
    gradient_checkpointing: bool = False,
    shards: int = 1,
) -> BaseModel:
    """Loads a causal language model from the hub or a folder; safetensors weights only.

    Args:
        name: Hub name or folder.
        revision: Commit, tag or branch on the hub.
        dtype: Of the frozen weights.
        device: Where to put them.
        context: The most tokens to take; the model's own limit by default.
        gradient_checkpointing: Recompute activations in the backward pass, to save memory.
        shards: Processes that hold the weights together, all of torch.distributed's group (FSDP2); each gathers a
            block's weights when it runs it.

    Raises:
        AbmllError: The model cannot be had; the message says what to do.
    """
    packed = quantization() if dtype == NF4 else None
    if shards > 1:
        check_shared(dtype)
    found = fetch(name, revision)
    tokenizer = load_tokenizer(name, revision=revision)
    with _told(f"cannot load the base model {name}"):
        config = AutoConfig.from_pretrained(found.folder, trust_remote_code=False)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            found.folder,
            dtype=torch.bfloat16 if packed else dtype,
            quantization_config=packed,
            device_map={"": device} if packed else None,
            use_safetensors=True,
            attn_implementation=attention(config),
            trust_remote_code=False,
            output_loading_info=True,
            distributed_config=DistributedConfig(fsdp_size=shards) if shards > 1 else None,
        )
    model, info = loaded
    if missing := sorted(info["missing_keys"]):  # transformers would go on with random numbers in their place
        raise AbmllError(
            f"the files of {name} lack {len(missing)} of the model's weights, such as {missing[0]}; copy or download "
            "the model again",
            field="model",
        )
    limit = context_of(config)
    if context is not None and context > limit:
        raise AbmllError(f"context {context} exceeds the {limit} positions of {name}", field="context")
    # Of the maker's advice on decoding only what ends a text: a penalty on repetition, say, makes other probabilities
    # than the model's, and vLLM is told of none.
    advice = model.generation_config
    model.generation_config = GenerationConfig(
        bos_token_id=advice.bos_token_id, eos_token_id=advice.eos_token_id, pad_token_id=advice.pad_token_id
    )
    model.eval()
    if gradient_checkpointing:
        recompute_activations(model)
    if packed is not None:
        settle(model)
    elif shards > 1:
        _settle(model)
    else:
        model.to(device)
    weights = None if packed is None else checkpoint_weights(Path(found.folder))
    return BaseModel(name, model, tokenizer, context or limit, found.commit, weights)


def check_shared(dtype: WeightsDtype) -> None:
    """Checks that processes can hold weights of a type together.

    Raises:
        AbmllError: They cannot.
    """
    if dtype == NF4:
        raise AbmllError(
            "weights in 4 bits are not shared by processes: give dtype bfloat16, or let each process have all of them",
            field="dtype",
        )


def _settle(model: Any) -> None:
    """Runs a sharded model once as a whole: it is then one unit, whichever of its parts is called later."""
    from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

    model.requires_grad_(False)  # before the first pass, which settles what has gradients
    with torch.no_grad():
        model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=model.device))
    head = model.get_output_embeddings()
    if not isinstance(head, FSDPModule):
        # Tied to the embedding, its weights belong to the whole model, and would not be gathered for a call of its own.
        model.through_head = head.forward
        register_fsdp_forward_method(model, "through_head")
        head.forward = model.through_head


def load_tokenizer(name: str, *, revision: str | None = None) -> Any:
    """Loads a base model's tokenizer; one without a pad token pads with its end of text.

    Args:
        name: Hub name or folder of the model.
        revision: Commit, tag or branch on the hub.

    Raises:
        AbmllError: It cannot be had.
    """
    found = fetch(name, revision)
    with _told(f"cannot load the tokenizer of {name}"):
        tokenizer: Any = AutoTokenizer.from_pretrained(found.folder, trust_remote_code=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def attention(config: Any) -> str:
    """Which of transformers' codes for attention a model is run by.

    Args:
        config: The model's configuration.
    """
    # sdpa leaves the cap on attention's scores (Gemma 2) out in silence; vLLM does not.
    return "sdpa" if getattr(config, "attn_logit_softcapping", None) is None else "eager"


@contextmanager
def _told(what: str) -> Generator[None]:
    """Turns what transformers raises into a line."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        raise AbmllError(f"{what}: {brief(error)}; check its files", field="model") from error
