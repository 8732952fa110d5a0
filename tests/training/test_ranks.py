"""Meta-training in two processes that talk over gloo."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from abmll.components import log_likelihood
from abmll.errors import AbmllError
from abmll.layers import attach, init_posterior
from abmll.posterior import Components, PosteriorConfig
from abmll.together import Together
from tests.training.conftest import TARGETS, rule_task
from tests.two_processes import results_of, start_two
from training.adaptation import AdaptConfig, family_settings, task_posterior
from training.base_model import BaseModel, load_base
from training.components import with_task_components
from training.embedded import BASE
from training.episodes import EpisodeConfig, label
from training.meta import MetaConfig, meta_train
from training.progress import silent
from training.ranks import Ranks

TASKS = [rule_task(number) for number in range(5)]
# Its shared factors have a gradient at every inner step, besides.
POSTERIOR = PosteriorConfig(base_model="tiny", targets=TARGETS, family="subspace", rank=3)
CONFIG = MetaConfig(
    steps=8,
    tasks_per_step=4,
    warmup=2,
    checkpoint_every=1,
    inner=AdaptConfig(steps=2).model_copy(update=family_settings("subspace")),
    episodes=EpisodeConfig(shots=(4, 8), queries=8),
)


def _work(pipe: Any, folder: str, work: str, config: MetaConfig, sharded: bool) -> None:
    rank = int(os.environ["RANK"])
    ranks = Ranks.join("cpu", sharded=sharded)
    assert (ranks.rank, ranks.world, ranks.main) == (rank, 2, rank == 0)
    base = load_base(folder, shards=ranks.shards)
    attached = attach(base.model, TARGETS, together=ranks.together)
    if sharded:
        held = [weight.to_local().numel() / weight.numel() for weight in base.model.model.layers.parameters()]
        assert set(held) == {0.5}
    try:
        theta = meta_train(base, attached, TASKS, POSTERIOR, config, Path(work), progress=silent, ranks=ranks)
        pipe.send({key: tensor.numpy() for key, tensor in theta.tensors().items()})
    except AbmllError as error:
        pipe.send(error.message)


def _start(
    folder: Path, work: Path, config: MetaConfig = CONFIG, *, sharded: bool = False
) -> list[tuple[ForkServerProcess, Any]]:
    return start_two(_work, str(folder), str(work), config, sharded)


@pytest.fixture(scope="module")
def alone(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    base = load_base(str(tiny_model_folder))
    attached = attach(base.model, TARGETS)
    work = tmp_path_factory.mktemp("alone")
    return meta_train(base, attached, TASKS, POSTERIOR, CONFIG, work, progress=silent).tensors()


def _assert_close(found: dict[str, Any], expected: dict[str, torch.Tensor], atol: float = 1e-5) -> None:
    for key, tensor in expected.items():
        # Gradients are added in another order; Adam's first steps make of a tiny difference a small one.
        torch.testing.assert_close(torch.from_numpy(found[key]), tensor, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("sharded", [False, True], ids=["tasks are shared", "the base model is shared"])
def test_two_processes_make_the_theta_of_one(
    tiny_model_folder: Path, tmp_path: Path, alone: dict[str, torch.Tensor], sharded: bool
) -> None:
    first, second = results_of(_start(tiny_model_folder, tmp_path, sharded=sharded))
    for key, values in first.items():
        assert (values == second[key]).all(), key  # the same to the last bit
    _assert_close(first, alone)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == CONFIG.steps


def test_processes_share_a_base_model_whose_head_is_its_embedding(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"steps": 1})
    base = load_base(str(BASE))
    assert base.model.config.tie_word_embeddings
    one = meta_train(
        base, attach(base.model, TARGETS), TASKS, POSTERIOR, config, tmp_path / "one", progress=silent
    ).tensors()
    for told in results_of(_start(BASE, tmp_path / "two", config, sharded=True)):
        # Adam's first step, of 1.5e-3, makes of a gradient near 0 one of any size.
        _assert_close(told, one, atol=2e-4)


def _weighed(base: BaseModel, together: Together | None) -> dict[str, torch.Tensor]:
    """Cores of a component that is made, how likely components are, and where a task comes to that begins in them."""
    attached = attach(base.model, TARGETS, together=together)
    theta = init_posterior(attached, POSTERIOR, 0)
    made = with_task_components(base, attached, theta, TASKS[:1], CONFIG.inner, 0, silent).components
    assert made is not None
    generator = torch.Generator().manual_seed(0)
    cores = {name: torch.cat([own, torch.randn(9, 3, 3, generator=generator)]) for name, own in made.cores.items()}
    names = tuple(f"task {number}" for number in range(10))
    components = Components(names, names, cores)
    support = label(base, POSTERIOR.template, TASKS[1].examples)
    likelihood = log_likelihood(attached, theta, components, support)
    config = CONFIG.inner.model_copy(update={"members": 2})
    phi = task_posterior(attached, theta.with_components(components), support, config, generator)
    found = {f"component.{name}": own[0] for name, own in cores.items()}
    return found | {"likelihood": likelihood} | phi.tensors()


def _weigh(pipe: Any, folder: str) -> None:
    ranks = Ranks.join("cpu", sharded=True)
    found = _weighed(load_base(folder, shards=ranks.shards), ranks.together)
    pipe.send({key: tensor.numpy() for key, tensor in found.items()})


def test_processes_that_share_a_base_model_weigh_components_as_one_does(tiny_model_folder: Path) -> None:
    expected = _weighed(load_base(str(tiny_model_folder)), None)
    assert 1 < expected["likelihood"].isfinite().sum() < 10
    first, second = results_of(start_two(_weigh, str(tiny_model_folder)))
    for key, values in first.items():
        assert (values == second[key]).all(), key
    _assert_close(first, expected)


def test_a_killed_process_ends_the_other_and_both_go_on(
    tiny_model_folder: Path, tmp_path: Path, alone: dict[str, torch.Tensor]
) -> None:
    started = _start(tiny_model_folder, tmp_path)
    deadline = time.monotonic() + 120
    while not (tmp_path / "checkpoint.pt").exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    (_, pipe), (killed, _) = started
    assert killed.pid is not None
    os.kill(killed.pid, signal.SIGKILL)
    said = pipe.recv()
    for process, _ in started:
        process.join()
    assert "another process of this training has gone" in said
    assert "go on from the last checkpoint" in said
    first, _ = results_of(_start(tiny_model_folder, tmp_path))
    _assert_close(first, alone)


def test_more_processes_than_tasks_are_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    few = CONFIG.model_copy(update={"tasks_per_step": 1})
    told = results_of(_start(tiny_model_folder, tmp_path, few))
    assert all("too few for 2 processes" in message for message in told)


def test_of_few_rows_some_process_runs_one_for_nothing() -> None:
    parts = [Ranks(rank, 3, sharded=True).part(2) for rank in range(3)]
    assert parts == [([0], 1.0), ([1], 1.0), ([0], 0.0)]


def test_alone_nothing_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(AbmllError, match="--shard-base needs several processes"):
        Ranks.join(None, sharded=True)
    ranks = Ranks.join(None)
    assert (ranks.world, ranks.main, ranks.device(None)) == (1, True, None)
    assert list(ranks.mine(3)) == [0, 1, 2]
