"""Meta-training: many tasks to one global posterior theta."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from abmll.errors import AbmllError
from abmll.layers import Attached, init_posterior
from abmll.objective import data_loss, micro_batches, task_gradient
from abmll.posterior import Posterior, PosteriorConfig
from abmll.store import replace_file
from training.adaptation import AdaptConfig, run_inner
from training.base_model import BaseModel as Base
from training.episodes import EpisodeConfig, label, sample_episode, short_items
from training.progress import Progress, silent, track
from training.ranks import ALONE, Ranks
from training.schedule import rate_share
from training.settings import SEED_LIMIT
from training.tasks import Task


class MetaConfig(BaseModel, frozen=True, allow_inf_nan=False):
    """Settings of meta-training."""

    steps: int = Field(default=400, ge=1, description="steps of theta")
    tasks_per_step: int = Field(default=2, ge=1, description="episodes averaged in a step")
    learning_rate: float = Field(default=3e-3, gt=0, description="of theta's means and shared parameters (Adam)")
    scale_rate: float = Field(default=1e-2, gt=0, description="of theta's scale parameters (Adam)")
    warmup: int = Field(default=20, ge=0, description="steps of linear warm-up; the rates then fall as a cosine")
    clip: float = Field(default=1.0, gt=0, description="largest norm of theta's gradient")
    path: float = Field(
        default=1.0,
        ge=0,
        description="what the mean gradient of the inner steps counts for the shared parameters beside the objective's",
    )
    gamma: float = Field(default=1e-5, ge=0, description="weight of the hyperprior -log p(theta)")
    minutes: float | None = Field(default=None, gt=0, description="stop (and anneal) by wall clock instead of steps")
    checkpoint_every: int = Field(default=20, ge=1, description="steps between checkpoints")
    seed: int = Field(default=0, ge=0, lt=SEED_LIMIT)
    inner: AdaptConfig = AdaptConfig()
    episodes: EpisodeConfig = EpisodeConfig()


def hyperprior(theta: Posterior, start: Posterior) -> Tensor:
    """-log p(theta) up to a constant: unit Gaussians, around the start on scale parameters, around 0 on others.

    The paper puts a Gaussian on means and a Gamma on precisions; with log-scales (or an offset) as
    parameters, a Gaussian around the start plays the Gamma's part of keeping scales from 0 and infinity.
    """
    first = start.tensors()
    total = torch.zeros((), device=next(iter(first.values())).device)
    for key, tensor in theta.tensors().items():
        total = total + 0.5 * ((tensor - first[key] if ".scale." in key else tensor) ** 2).sum()
    return total


class _Checkpoint:
    """Everything that a resumed run needs, in one file that is replaced as a whole."""

    def __init__(self, path: Path, fingerprint: dict[str, Any], ranks: Ranks) -> None:
        self.path, self.fingerprint, self._ranks = path, fingerprint, ranks

    def _there(self) -> bool:
        return self._ranks.main and self.path.is_file()

    def save(self, step: int, leaves: dict[str, Tensor], optimizer: torch.optim.Optimizer, seconds: float) -> None:
        if not self._ranks.main:
            return
        state = {
            "settings": json.dumps(self.fingerprint, sort_keys=True),
            "step": step,
            "seconds": seconds,
            "theta": {key: leaf.detach().cpu() for key, leaf in leaves.items()},
            "optimizer": optimizer.state_dict(),
        }
        stream = io.BytesIO()
        torch.save(state, stream)
        replace_file(self.path, stream.getvalue())

    def _read(self) -> dict[str, Any]:
        """What is in the file; nothing where it is damaged, which each process then tells."""
        try:
            # To the CPU: it may have been written on a device that is not here, and goes to every process.
            read = torch.load(self.path, map_location="cpu", weights_only=True)
            return {key: read[key] for key in ("settings", "step", "seconds", "theta", "optimizer")}
        except (RuntimeError, EOFError, ValueError, LookupError, TypeError, pickle.UnpicklingError):
            return {}

    def load(self, leaves: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> tuple[int, float]:
        state = self._ranks.of_main(self._read() if self._there() else None)
        if state is None:
            return 0, 0.0
        if not state:
            raise AbmllError(f"{self.path} is damaged; remove it to begin anew, or restore it", field="out")
        if state["settings"] != json.dumps(self.fingerprint, sort_keys=True):
            raise AbmllError(
                f"{self.path} was made with other settings, tasks or base model; "
                "resume with the same ones or choose another --out",
                field="out",
            )
        with torch.no_grad():
            for key, leaf in leaves.items():
                leaf.copy_(state["theta"][key])
        optimizer.load_state_dict(state["optimizer"])
        return state["step"], state["seconds"]


def _generator(seed: int, step: int, episode: int) -> torch.Generator:
    # Randomness is a function of (seed, step, episode), so that a resumed run needs no generator's state.
    return torch.Generator().manual_seed(random.Random(f"{seed}:{step}:{episode}").getrandbits(62))


def meta_train(
    base: Base,
    attached: Attached,
    tasks: Sequence[Task],
    posterior: PosteriorConfig,
    config: MetaConfig,
    work: Path,
    *,
    progress: Progress = track,
    ranks: Ranks = ALONE,
) -> Posterior:
    """Meta-trains a global posterior by ABMLL's objective, first order.

        L(theta) = mean over tasks of [ -E_q log p(D_i | phi_i) + beta KL(q(phi_i) || p(phi_i | theta)) ]
                   - gamma log p(theta)                          (arXiv 2508.14285, eqs. 3-5)
        grad theta = grad_phi of the data term at phi_i^K + d(beta KL)/d theta + hyperprior

    Both terms are per data point. One task's phi lives at a time. The factors that a ``subspace`` posterior's tasks
    share have a gradient at every inner step too; its mean over the steps is added, ``config.path`` times.

    Args:
        base: Model and tokenizer.
        attached: The same model, attached at ``posterior.targets``.
        tasks: Training tasks.
        posterior: What the posterior is made of.
        config: Settings.
        work: Folder for ``checkpoint.pt`` and ``log.jsonl``; a run that was killed goes on from there and
            ends with the same theta as one that was not.
        progress: Shows progress.
        ranks: The processes that share each step's tasks, or hold the base model together; with the same seed theta
            is the same for any number of them, up to the order in which gradients are added.

    Returns:
        theta, on the CPU.

    Raises:
        AbmllError: The checkpoint belongs to other settings, the loss is not finite, there are more processes than
            tasks in a step, or one of them has gone.
    """
    limit = config.episodes.max_chars
    if limit is not None:
        tasks = short_items(tasks, limit)
    if not tasks:
        raise AbmllError("no training task is left; check the split and episodes.max_chars", field="tasks")
    work.mkdir(parents=True, exist_ok=True)
    start = init_posterior(attached, posterior, config.seed).map(lambda tensor: tensor.to(base.device))
    leaves = {key: tensor.detach().clone() for key, tensor in start.tensors().items()}
    means = [leaf for key, leaf in leaves.items() if ".scale." not in key]
    scales = [leaf for key, leaf in leaves.items() if ".scale." in key]
    rates = (config.learning_rate, config.scale_rate)
    optimizer = torch.optim.Adam(
        [{"params": means, "lr": rates[0]}, {"params": scales, "lr": rates[1]}], betas=(0.9, 0.99)
    )
    identity = {
        "config": config.model_dump(mode="json", exclude={"checkpoint_every"}),
        "posterior": start.config.model_dump(mode="json", exclude={"base_model"}),
        "tasks": [[task.name, task.digest] for task in tasks],
    }
    checkpoint = _Checkpoint(work / "checkpoint.pt", identity, ranks)
    done, seconds = checkpoint.load(leaves, optimizer)
    clock = _Clock(config, seconds)
    log_path = work / "log.jsonl" if ranks.main else Path(os.devnull)
    _truncate_log(log_path, done)
    with (
        log_path.open("a", encoding="utf-8") as log,
        (progress if ranks.main else silent)("meta-train", total=1.0) as bar,
    ):
        step = done
        # By wall clock, the processes would disagree on when it is over.
        while (share := ranks.of_main(clock.share(step))) < 1.0:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * rate_share(step, share, config.warmup)
            theta = start.with_tensors(leaves)
            row = _accumulate(base, attached, theta, start, tasks, config, step, leaves, ranks)
            norm = torch.nn.utils.clip_grad_norm_(leaves.values(), config.clip)
            if not torch.isfinite(norm):
                raise AbmllError(f"the gradient at step {step} is not finite; lower learning_rate or beta")
            optimizer.step()
            step += 1
            row |= {"step": step, "gradient_norm": round(norm.item(), 5), "seconds": round(clock.seconds(), 1)}
            log.write(json.dumps(row) + "\n")
            log.flush()
            bar.update(clock.share(step), {k: row[k] for k in ("step", "before", "data", "kl", "query")})
            if step % config.checkpoint_every == 0:
                checkpoint.save(step, leaves, optimizer, clock.seconds())
        checkpoint.save(step, leaves, optimizer, clock.seconds())
    return start.with_tensors({key: leaf.detach().cpu().clone() for key, leaf in leaves.items()})


def _accumulate(
    base: Base,
    attached: Attached,
    theta: Posterior,
    start: Posterior,
    tasks: Sequence[Task],
    config: MetaConfig,
    step: int,
    leaves: dict[str, Tensor],
    ranks: Ranks,
) -> dict[str, float]:
    """Puts theta's gradient into ``leaves`` and returns the loss parts, in nats per data point."""
    for leaf in leaves.values():
        leaf.grad = torch.zeros_like(leaf)
    sums = {"before": 0.0, "data": 0.0, "kl": 0.0, "query": 0.0}
    for number in ranks.mine(config.tasks_per_step):
        rng = random.Random(f"{config.seed}:{step}:{number}:episode")
        generator = _generator(config.seed, step, number)
        episode = sample_episode(tasks, config.episodes, rng)
        support = label(base, theta.config.template, episode.support)
        query = label(base, theta.config.template, episode.query)
        inner = run_inner(attached, theta, support, config.inner, generator)
        phi = inner.phi
        result = task_gradient(
            attached,
            phi,
            theta,
            [*support, *query],
            beta=config.inner.beta,
            generator=generator,
            max_tokens=config.inner.max_tokens,
        )
        for key, leaf in leaves.items():
            assert leaf.grad is not None
            leaf.grad += (result.data[key] + result.kl_p[key]) / config.tasks_per_step
            steps = config.inner.steps_on(support)
            if key in inner.shared and steps:
                leaf.grad += inner.shared[key] * config.path / (steps * config.tasks_per_step)
        with torch.no_grad():
            for name, q in (("before", theta), ("query", phi)):
                groups = micro_batches(query, config.inner.max_tokens)
                nll = sum(data_loss(attached, q, group, generator).item() for group in groups)
                sums[name] += nll / len(query)
        sums["data"] += result.data_nats
        sums["kl"] += result.kl_nats
    parts = torch.tensor(list(sums.values()), device=base.device)
    if not ranks.sharded:
        ranks.add_up([*(leaf.grad for leaf in leaves.values() if leaf.grad is not None), parts])
    penalty_leaves = {key: leaf.detach().requires_grad_() for key, leaf in leaves.items()}
    penalty = config.gamma * hyperprior(theta.with_tensors(penalty_leaves), start)
    penalty.backward()
    for key, leaf in leaves.items():
        gradient = penalty_leaves[key].grad
        assert leaf.grad is not None
        assert gradient is not None
        leaf.grad += gradient
    row = {n: round(v / config.tasks_per_step, 5) for n, v in zip(sums, parts.tolist(), strict=True)}
    return row | {"hyperprior": round(penalty.item(), 6)}


class _Clock:
    """How much of the training is over, by steps or by wall clock."""

    def __init__(self, config: MetaConfig, seconds: float) -> None:
        self.config, self.before, self.begin = config, seconds, time.monotonic()

    def seconds(self) -> float:
        return self.before + time.monotonic() - self.begin

    def share(self, step: int) -> float:
        if self.config.minutes is not None:
            return self.seconds() / (60 * self.config.minutes)
        return step / self.config.steps


def _truncate_log(path: Path, step: int) -> None:
    """Drops lines after ``step``, which a killed run wrote past its last checkpoint, and one that was cut short."""
    if not path.is_file():
        return
    kept: list[str] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:
            continue
    replace_file(path, "".join(line + "\n" for line in kept).encode())
