"""What training takes, from the base model's configuration alone: a step done on tensors without contents."""

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic import BaseModel, Field
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from abmll.errors import AbmllError
from abmll.kl import kl
from abmll.layers import attach
from abmll.objective import Labelled, backward_data
from abmll.posterior import Posterior, PosteriorConfig, init_layer
from abmll.scoring import Question
from training.base_model import WeightsDtype, attention, check_shared
from training.episodes import EpisodeConfig
from training.four_bits import NF4, Packing, packing
from training.hub import brief, fetch
from training.live_memory import LiveMemory
from training.ranks import Ranks
from training.recompute import recompute_activations

# theta, where it began (hyperprior), its gradient and Adam's two moments.
_OF_THETA = 5
# A question of the step has so many options of one token.
_OPTIONS = 4
# The largest support set with a query set.
EPISODE = max(EpisodeConfig().shots) + EpisodeConfig().queries


class TrainingPlan(BaseModel, frozen=True):
    """Sizes of a gradient step of a task's posterior, of the objective, and of what meta-training keeps beside them.

    Attributes:
        shards: Processes that hold the base model together; bytes and operations are those of one.
        base_parameters: Of the base model, frozen.
        posterior_parameters: Of one posterior.
        base: Bytes of the base model's weights and buffers; of a process's share, where several hold it together.
        gathered: Bytes of the weights that such a process has whole at a time beside its share.
        prior: Bytes of the global posterior alone, as adaptation has it.
        theta: Bytes of the global posterior with its gradient and optimizer.
        phi: Bytes of a task's posterior with its gradient and optimizer.
        step: Bytes that a step takes besides at its peak: activations, gradients, the KL term.
        objective: The same of meta-training's objective, which looks at support and query together.
        step_flops: Floating-point operations of a step, a multiplication and addition counted as two.
    """

    shards: int
    base_parameters: int
    posterior_parameters: int
    base: int = Field(description="bytes")
    gathered: int = Field(description="bytes")
    prior: int = Field(description="bytes")
    theta: int = Field(description="bytes")
    phi: int = Field(description="bytes")
    step: int = Field(description="bytes")
    objective: int = Field(description="bytes")
    step_flops: int

    @property
    def peak(self) -> int:
        """Bytes at the peak of meta-training."""
        return self.base + self.gathered + self.theta + self.phi + max(self.step, self.objective)

    @property
    def objective_leads(self) -> bool:
        """Whether it is the objective that takes the most."""
        return self.objective > self.step

    @property
    def adaptation(self) -> int:
        """Bytes at the peak of adaptation."""
        return self.base + self.gathered + self.prior + self.phi + self.step


def read_config(model: str, revision: str | None = None) -> Any:
    """Returns a model's configuration; its weights are not needed.

    Raises:
        AbmllError: It cannot be had.
    """
    from transformers import AutoConfig

    folder = fetch(model, revision, weights=False).folder
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise AbmllError(
            f"the config.json of {model} cannot be read: {brief(error)}; mend it", field="model"
        ) from error


def plan_training(
    config: Any,
    posterior: PosteriorConfig,
    *,
    rows: int,
    tokens: int,
    episode: int = EPISODE,
    dtype: WeightsDtype = torch.bfloat16,
    checkpointing: bool = False,
    max_tokens: int = 4096,
    shards: int = 1,
) -> TrainingPlan:
    """Does what training does with tensors that have shapes but no contents, and counts bytes and operations.

    Args:
        config: The base model's configuration, as ``read_config`` gives it.
        posterior: What the posterior is made of.
        rows: Examples in a step.
        tokens: Tokens of each, prompt and answer.
        episode: Examples of an episode, support and query, which meta-training's objective looks at together.
        dtype: Of the base weights; posterior and KL are float32.
        checkpointing: Whether activations are computed again in the backward pass.
        max_tokens: Padded tokens in one forward pass.
        shards: Processes that hold the base model together (``load_base``) and share each pass's examples.

    Raises:
        AbmllError: The model has no such targets, or its weights cannot be held so.
    """
    if shards > 1:
        check_shared(dtype)
    from transformers import AutoModelForCausalLM

    options = tuple((token,) for token in range(_OPTIONS))
    item = Labelled(Question((0,) * max(1, tokens - 1), options), 0)
    memory, flops = LiveMemory(), FlopCounterMode(display=False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        made = torch.bfloat16 if dtype == NF4 else dtype
        model: Any = AutoModelForCausalLM.from_config(config, dtype=made, attn_implementation=attention(config))
        packed = packing(model) if dtype == NF4 else Packing(0, 0)
        if checkpointing:
            recompute_activations(model)
        together = Ranks(world=shards, sharded=shards > 1).together
        attached = attach(model, posterior.targets, posterior.layers, together=together)
        generator = torch.Generator()
        layers = {
            name: init_layer(layer.base.out_features, layer.base.in_features, posterior, generator)
            for name, layer in attached.layers.items()
        }
        prior = Posterior(posterior, layers)
        theta, phi = prior.tensors(), {key: tensor.clone() for key, tensor in prior.tensors().items()}
        base = memory.track([*model.parameters(), *model.buffers()])
        held, gathered = (base, 0) if shards == 1 else _shared(model, base, shards)
        one = memory.track(theta.values())
        memory.track(phi.values())
        optimizer = torch.optim.Adam(phi.values())

        def gradients(count: int) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
            leaves, q, p = (
                {key: tensor.detach().requires_grad_() for key, tensor in of.items()} for of in (phi, phi, theta)
            )
            backward_data(attached, prior.with_tensors(leaves), [item] * count, generator, max_tokens)
            (kl(prior.with_tensors(q), prior.with_tensors(p)) / count).backward()
            return leaves, q, p

        def step() -> None:
            leaves, q, _ = gradients(rows)
            for key, tensor in phi.items():
                parts = [part for part in (leaves[key].grad, q[key].grad) if part is not None]
                tensor.grad = sum(parts[1:], parts[0]) if parts else None
            optimizer.step()

        with memory:
            step()  # makes the optimizer's moments
            kept = memory.now
            memory.peak = kept
            step()
            of_step = memory.peak - kept
            memory.peak = memory.now
            gradients(episode)
            of_objective = memory.peak - kept
        with flops:  # not while bytes are counted: it takes operations apart into others, which make more tensors
            step()
    parameters = sum(tensor.numel() for tensor in theta.values())
    return TrainingPlan(
        shards=shards,
        base_parameters=sum(tensor.numel() for tensor in model.parameters()),
        posterior_parameters=parameters,
        base=held - packed.saved,
        gathered=gathered,
        prior=one,
        theta=_OF_THETA * one,
        phi=kept - base - one,
        step=of_step + packed.unpacked,
        objective=of_objective + packed.unpacked,
        step_flops=flops.get_total_flops(),
    )


def _shared(model: Any, whole: int, shards: int) -> tuple[int, int]:
    """Bytes of a process's share, and of what FSDP2 gathers: two blocks at a time, and what is no block's."""
    from transformers.distributed.fsdp import expand_fsdp_plan

    passing, staying = expand_fsdp_plan(model, model._fsdp_plan)
    # The head is gathered once, and so is all that is in no unit of its own.
    head = {weight for _, module in staying for weight in module.parameters()}
    units = [set(module.parameters()) - head for _, module in passing]
    rest = set(model.parameters()).difference(*units)
    # An embedding that is tied to the head becomes a second copy of it, and stays too.
    embedding: Any = model.get_input_embeddings().weight
    twice = embedding.nbytes if embedding in head else 0
    return math.ceil((whole + twice) / shards), _bytes(rest) + twice + sum(sorted(map(_bytes, units))[-2:])


def _bytes(weights: set[Any]) -> int:
    return sum(weight.nbytes for weight in weights)
