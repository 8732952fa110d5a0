from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from abmll.errors import AbmllError
from abmll.layers import Attached, attach, init_posterior
from abmll.objective import data_loss, micro_batches
from abmll.posterior import Family, LayerPosterior, Posterior, PosteriorConfig, mean, standard_deviation
from tests.abmll.conftest import FAMILIES, random_posterior
from tests.training.conftest import TARGETS, rule_task
from training.adaptation import AdaptConfig, family_settings, run_inner
from training.base_model import BaseModel, load_base
from training.episodes import Episode, EpisodeConfig, label
from training.meta import (
    MetaConfig,
    _accumulate,  # pyright: ignore[reportPrivateUsage] -- a step of Adam does not show how large a gradient was
    meta_train,
)
from training.ranks import ALONE

TASKS = [rule_task(number) for number in range(5)]
CONFIG = MetaConfig(
    steps=6,
    warmup=2,
    checkpoint_every=2,
    inner=AdaptConfig(steps=2, learning_rate=1e-2),
    episodes=EpisodeConfig(shots=(4, 8), queries=8),
)
POSTERIOR = PosteriorConfig(base_model="tiny", targets=TARGETS, rank=3)
SUBSPACE = PosteriorConfig(base_model="tiny", targets=TARGETS, family="subspace", rank=3)


class _Killed(Exception):
    pass


class _Bar:
    def __init__(self, stop: int) -> None:
        self.stop = stop

    def update(self, _: float, values: dict[str, Any]) -> None:
        if values["step"] == self.stop:
            raise _Killed


def killed_after(step: int) -> Any:
    @contextmanager
    def progress(_: str, total: float) -> Generator[_Bar]:
        yield _Bar(step)

    return progress


def rows(work: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]


def assert_equal(one: Posterior, other: Posterior) -> None:
    for key, tensor in one.tensors().items():
        assert torch.equal(tensor, other.tensors()[key]), key


def test_a_killed_run_goes_on_to_the_same_end(base: BaseModel, attached: Attached, tmp_path: Path) -> None:
    whole = meta_train(base, attached, TASKS, POSTERIOR, CONFIG, tmp_path / "whole")
    with pytest.raises(_Killed):  # past the checkpoint at step 4, so that a step is done twice
        meta_train(base, attached, TASKS, POSTERIOR, CONFIG, tmp_path / "parts", progress=killed_after(5))
    with (tmp_path / "parts" / "log.jsonl").open("a") as log:
        log.write('{"step": 6, "da')  # as on a disk that was full
    resumed = meta_train(base, attached, TASKS, POSTERIOR, CONFIG, tmp_path / "parts")
    assert_equal(whole, resumed)
    logs = [rows(tmp_path / name) for name in ("whole", "parts")]
    for row in (*logs[0], *logs[1]):
        del row["seconds"]
    assert logs[0] == logs[1]
    assert [row["step"] for row in logs[0]] == [1, 2, 3, 4, 5, 6]
    assert {"data", "kl", "query", "before", "gradient_norm", "hyperprior"} <= logs[0][0].keys()
    done = meta_train(base, attached, TASKS, POSTERIOR, CONFIG, tmp_path / "parts", progress=killed_after(6))
    assert_equal(whole, done)


@pytest.mark.parametrize("damage", [0, 1000])
def test_a_damaged_checkpoint_is_told(base: BaseModel, attached: Attached, tmp_path: Path, damage: int) -> None:
    config = CONFIG.model_copy(update={"steps": 1})
    meta_train(base, attached, TASKS, POSTERIOR, config, tmp_path)
    checkpoint = tmp_path / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:damage])
    with pytest.raises(AbmllError, match=r"checkpoint.pt is damaged; remove it"):
        meta_train(base, attached, TASKS, POSTERIOR, config, tmp_path)


@pytest.mark.parametrize(
    "change", [{"learning_rate": 1e-3}, {"seed": 1}, {"inner": AdaptConfig(steps=3)}], ids=["rate", "seed", "inner"]
)
def test_a_checkpoint_of_other_settings_is_refused(
    base: BaseModel, attached: Attached, tmp_path: Path, change: dict[str, Any]
) -> None:
    short = CONFIG.model_copy(update={"steps": 1})
    meta_train(base, attached, TASKS, POSTERIOR, short, tmp_path)
    with pytest.raises(AbmllError, match="made with other settings"):
        meta_train(base, attached, TASKS, POSTERIOR, short.model_copy(update=change), tmp_path)
    with pytest.raises(AbmllError, match="made with other settings"):
        meta_train(base, attached, TASKS[1:], POSTERIOR, short, tmp_path)


@pytest.mark.parametrize("posterior", [POSTERIOR, SUBSPACE], ids=["kronecker", "subspace"])
def test_it_learns_what_tasks_share(
    base: BaseModel, attached: Attached, tmp_path: Path, posterior: PosteriorConfig
) -> None:
    inner = CONFIG.inner.model_copy(update=family_settings(posterior.family))
    config = CONFIG.model_copy(update={"steps": 40, "warmup": 4, "learning_rate": 1e-2, "inner": inner})
    theta = meta_train(base, attached, [rule_task(0)], posterior, config, tmp_path)
    log = rows(tmp_path)
    early, late = (sum(row["query"] for row in part) / len(part) for part in (log[:8], log[-8:]))
    assert late < 0.8 * early
    assert all(tensor.isfinite().all() for tensor in theta.tensors().values())
    scales = [tensor for key, tensor in theta.tensors().items() if ".scale." in key]
    assert any(tensor.std() > 1e-3 for tensor in scales)  # the variance is learned, not left at its start


def test_shared_factors_learn_from_every_inner_step_and_are_not_adapted(
    base: BaseModel, attached: Attached, tmp_path: Path
) -> None:
    config = CONFIG.model_copy(update={"steps": 1, "warmup": 0})
    with_path = meta_train(base, attached, TASKS, SUBSPACE, config, tmp_path / "path")
    without = meta_train(base, attached, TASKS, SUBSPACE, config.model_copy(update={"path": 0.0}), tmp_path / "none")
    differ = {k for k, t in with_path.tensors().items() if not torch.equal(t, without.tensors()[k])}
    assert all((".shared." in key) <= (key in differ) for key in with_path.tensors())
    generator = torch.Generator().manual_seed(0)
    support = label(base, SUBSPACE.template, TASKS[0].examples[:8])
    inner = run_inner(attached, with_path, support, CONFIG.inner, generator)
    for key, tensor in inner.phi.tensors().items():
        assert torch.equal(tensor, with_path.tensors()[key]) == (".shared." in key), key
    assert {key.split(".shared.")[1] for key in inner.shared} == {"a", "b"}
    assert all(gradient.abs().max() > 0 for key, gradient in inner.shared.items() if key.endswith(".b"))


def test_the_gradient_is_clipped(base: BaseModel, attached: Attached, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"steps": 1, "clip": 1e-9, "warmup": 0})
    sgd_like = meta_train(base, attached, TASKS, POSTERIOR, config, tmp_path / "clipped")
    free = meta_train(base, attached, TASKS, POSTERIOR, config.model_copy(update={"clip": 1e9}), tmp_path / "free")
    assert rows(tmp_path / "clipped")[0]["gradient_norm"] == rows(tmp_path / "free")[0]["gradient_norm"] > 1e-3
    key = next(key for key in free.tensors() if key.endswith("mean.b"))  # starts at 0
    # Adam divides by the gradient's size plus 1e-8: clipped far below that, the step all but vanishes.
    assert sgd_like.tensors()[key].abs().max() < 0.5 * free.tensors()[key].abs().max()


def test_checkpointed_gradients_and_bf16_weights_train_alike(tiny_model_folder: Path, tmp_path: Path) -> None:
    losses: list[float] = []
    options: list[dict[str, Any]] = [{}, {"gradient_checkpointing": True}, {"dtype": torch.bfloat16}]
    for number, option in enumerate(options):
        base = load_base(str(tiny_model_folder), **option)
        attached = attach(base.model, TARGETS)
        theta = meta_train(
            base, attached, TASKS, POSTERIOR, CONFIG.model_copy(update={"steps": 2}), tmp_path / str(number)
        )
        assert {tensor.dtype for tensor in theta.tensors().values()} == {torch.float32}
        losses.append(rows(tmp_path / str(number))[-1]["data"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] == pytest.approx(losses[0], rel=0.1)


def test_nothing_to_train_on_is_told(base: BaseModel, attached: Attached, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"episodes": EpisodeConfig(max_chars=3)})
    with pytest.raises(AbmllError, match="no training task is left"):
        meta_train(base, attached, TASKS, POSTERIOR, config, tmp_path)


def dense_kl(q: Posterior, p: Posterior) -> Tensor:
    def gaussian(layer: LayerPosterior) -> Normal:
        return Normal(mean(layer) if layer.core is None else layer.core, standard_deviation(layer))

    each = [kl_divergence(gaussian(layer), gaussian(p.layers[name])).sum() for name, layer in q.layers.items()]
    return torch.stack(each).sum()


def minus_log_prior(theta: Posterior, start: Posterior) -> Tensor:
    around = {key: tensor if ".scale." in key else 0 * tensor for key, tensor in start.tensors().items()}
    return torch.stack([((tensor - around[key]) ** 2).sum() / 2 for key, tensor in theta.tensors().items()]).sum()


def gradients(posterior: Posterior) -> dict[str, Tensor]:
    return {key: torch.zeros_like(t) if t.grad is None else t.grad for key, t in posterior.tensors().items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_thetas_gradient_is_that_of_data_kl_inner_steps_and_hyperprior(
    base: BaseModel, attached: Attached, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = AdaptConfig(steps=3, learning_rate=2e-2, scale_rate=2e-2, beta=0.01)
    config = MetaConfig(tasks_per_step=2, path=0.7, gamma=0.01, inner=inner)
    theta = random_posterior(attached, family, TARGETS, 1)
    start = init_posterior(attached, theta.config, 0)
    episodes = [Episode(task.name, task.examples[:4], task.examples[4:9]) for task in TASKS[:2]]
    in_turn = iter(episodes)
    monkeypatch.setattr("training.meta.sample_episode", lambda *_: next(in_turn))
    monkeypatch.setattr("training.meta._generator", lambda seed, step, number: torch.Generator().manual_seed(number))
    expected = {key: torch.zeros_like(tensor) for key, tensor in theta.tensors().items()}
    p = theta.map(lambda tensor: tensor.clone().requires_grad_())
    (config.gamma * minus_log_prior(p, start)).backward()
    for number, episode in enumerate(episodes):
        support, query = (label(base, theta.config.template, part) for part in (episode.support, episode.query))
        generator = torch.Generator().manual_seed(number)
        loop = run_inner(attached, theta, support, inner, generator)
        phi = loop.phi.map(lambda tensor: tensor.clone().requires_grad_())
        (data,) = micro_batches([*support, *query], inner.max_tokens)
        (data_loss(attached, phi, data, generator) / 9 / 2).backward()
        (inner.beta * dense_kl(loop.phi, p) / 9 / 2).backward()
        for key, gradient in gradients(phi).items():
            expected[key] += gradient
        for key, gradient in loop.shared.items():
            expected[key] += config.path * gradient / 3 / 2
    for key, gradient in gradients(p).items():
        expected[key] += gradient
    leaves = {key: tensor.clone() for key, tensor in theta.tensors().items()}
    _accumulate(base, attached, theta, start, TASKS, config, 0, leaves, ALONE)
    torch.testing.assert_close({key: leaf.grad for key, leaf in leaves.items()}, expected, rtol=1e-3, atol=1e-5)
