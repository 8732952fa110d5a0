"""Base models from the hub, asked by its own client; ``hub_server`` stands in for the hub."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from abmll.layers import attach, checkpoint_fingerprint, init_posterior
from abmll.posterior import PosteriorConfig
from abmll.store import Record, load_posterior, save_posterior
from tests.command_line import Ran
from tests.server.conftest import free_port, wait_for
from tests.training.conftest import TARGETS, rule_task, write_tasks
from tests.training.hub_server import Hub, Repository, serve_hub
from training.base_model import load_base

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
OLD, NEW, BIN, CUT, PART, EMPTY = (letter * 40 for letter in "abcdef")
READER, OTHER = "hf_reader", "hf_other"
OPEN, GATED = "org/open", "org/gated"
PLAN = ("plan", "--rows", 1, "--tokens", 16, "--episode", 1)  # a plan goes through every operation
SETTINGS = "[inner]\nsteps = 1\n[episodes]\nshots = [2]\nqueries = 2\n"


@dataclass
class World:
    """A hub, and what commands need besides."""

    hub: Hub
    folder: Path

    @property
    def tasks(self) -> Path:
        return self.folder / "tasks"

    @property
    def examples(self) -> Path:
        return self.tasks / "tasks" / "rule_0.jsonl"

    def posterior(self, model: str, revision: str | None = None) -> Path:
        """A posterior that says it was made for a model."""
        folder = self.folder / "posteriors" / f"{model.replace('/', '-')}-{revision}"
        if not folder.exists():
            base = load_base(str(self.folder / OLD))
            config = PosteriorConfig(base_model=model, base_revision=revision, rank=3)
            save_posterior(folder, init_posterior(attach(base.model, TARGETS), config, 0), Record())
        return folder

    def run(self, commands: Sequence[Sequence[object]], home: Path, **environment: str) -> list[Ran]:
        """Runs commands one after the other in one new process, with the hub's cache in a folder."""
        given = {"HF_ENDPOINT": self.hub.url, "HF_HOME": str(home), "OMP_NUM_THREADS": "1"} | environment
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "ABMLL_"))}
        told = self.folder / "told.json"
        ran = subprocess.run(
            [sys.executable, "-m", "tests.training.in_turn", str(told)],
            input=json.dumps([[str(word) for word in command] for command in commands]),
            capture_output=True, cwd=ROOT, env=kept | given, text=True, timeout=280, check=False,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr
        return [Ran(**each) for each in json.loads(told.read_text())]

    def commands(self, model: str, revision: str | None, out: Path) -> list[tuple[object, ...]]:
        """Every command that loads a base model, and ``abmll.load``."""
        posterior, pinned = self.posterior(model, revision), () if revision is None else ("--revision", revision)
        return [
            (*PLAN, "--model", model, *pinned),
            ("train", "--tasks", self.tasks, "--model", model, *pinned, "--out", out / "theta"),
            ("adapt", posterior, "--examples", self.examples, "--task", "t", "--out", out / "phi"),
            ("eval", posterior, "--tasks", self.tasks, "--part", "all"),
            ("load", posterior),
            ("serve", "--model", model, *pinned, "--posterior", posterior, "--store", out / "store",
             "--port", free_port(), "--engine", "torch"),
        ]  # fmt: skip


def change(folder: Path, to: Path) -> None:
    """A copy of a model with other weights."""
    shutil.copytree(folder, to)
    weights = load_file(folder / "model.safetensors")
    save_file({key: 1.5 * tensor for key, tensor in weights.items()}, to / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def world(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("hub")
    write_tasks(folder / "tasks", [rule_task(number) for number in range(3)])
    (folder / "train.toml").write_text(SETTINGS)
    shutil.copytree(tiny_model_folder, folder / OLD)
    tokenizer = folder / OLD / "tokenizer_config.json"
    told = json.loads(tokenizer.read_text())
    del told["pad_token"]  # Llama 3 has none
    tokenizer.write_text(json.dumps(told))
    (folder / OLD / "original").mkdir()
    (folder / OLD / "original" / "consolidated.00.pth").write_bytes(b"pickled")
    change(folder / OLD, folder / NEW)
    for name in (BIN, CUT, PART, EMPTY):
        shutil.copytree(folder / OLD, folder / name)
    weights = folder / OLD / "model.safetensors"
    torch.save(load_file(weights), folder / BIN / "pytorch_model.bin")
    (folder / BIN / "model.safetensors").unlink()
    (folder / CUT / "model.safetensors").write_bytes(weights.read_bytes()[:-1000])
    few = dict(list(load_file(weights).items())[1:])
    save_file(few, folder / PART / "model.safetensors", {"format": "pt"})
    (folder / EMPTY / "config.json").unlink()
    with serve_hub() as hub:
        both = {OLD: folder / OLD, NEW: folder / NEW}
        refs = {"main": NEW, "v1": OLD}
        hub.repositories = {OPEN: Repository(both, refs), GATED: Repository(both, refs, frozenset({READER}))}
        for commit in (BIN, CUT, PART, EMPTY):
            hub.repositories[f"org/{commit[0]}"] = Repository({commit: folder / commit}, {"main": commit})
        yield World(hub, folder)


def status_of(command: Sequence[object], *, wrong_input: bool = False) -> int:
    """What a refused command ends with: a server's start has failed whatever the cause, and ``load`` is no command."""
    return 1 if command[0] == "serve" else 2 if wrong_input or command[0] == "load" else 1


def assert_refused(ran: Ran, *words: str, status: int) -> None:
    """One line that says so, without a traceback."""
    assert ran.code == status, ran
    (line,) = [line for line in ran.err.splitlines() if line.startswith("abmll: ")]
    assert ran.err.splitlines()[-1] == line, ran.err
    assert all(word in line for word in words), line
    assert len(line) < 500, line
    assert "Traceback" not in ran.err
    assert ran.out == ""


WRONG = [
    (("org/none", None), "the hub knows no model of that name"),
    ((GATED, None), f"/{GATED}, then set HF_TOKEN to a token of that account"),
    ((OPEN, "v9"), f"{OPEN} has no revision v9; give a branch, tag or whole commit"),
    ((f"org/{BIN[0]}", None), "has no model.safetensors; abmll reads no pickled weights"),
    ((f"org/{CUT[0]}", None), "model.safetensors of org/d is damaged"),
    ((f"org/{PART[0]}", None), "lack 1 of the model's weights, such as lm_head.weight"),
    ((f"org/{EMPTY[0]}", None), "has no config.json"),
    (("no:name", None), "neither a folder nor a name on the hub"),
    (("./nowhere", None), "there is no model folder ./nowhere"),
]


def test_what_cannot_be_had_is_told_in_a_line_by_every_command(world: World, tmp_path: Path) -> None:
    asked = [(command, words) for case, words in WRONG for command in world.commands(*case, tmp_path / "out")]
    (tmp_path / "out").mkdir()
    for (command, words), ran in zip(asked, world.run([each for each, _ in asked], tmp_path / "home"), strict=True):
        if command[0] == "plan" and words.startswith(("has no model.safe", "model.safe", "lack 1")):
            assert ran.code == 0  # it needs the configuration alone
        else:
            assert_refused(ran, words, status=status_of(command, wrong_input="HF_TOKEN" not in words))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"store", "theta.work"}
    assert not list((tmp_path / "out" / "store" / "tasks").iterdir())
    assert not list((tmp_path / "home").rglob("*pytorch_model*"))


def test_a_token_without_access_is_told_from_none(world: World, tmp_path: Path) -> None:
    commands = [*world.commands(GATED, None, tmp_path)[:3], world.commands("org/none", None, tmp_path)[0]]
    commands += [("look", GATED), ("look", OPEN, "v9"), ("look", OPEN, "v1")]
    *gated, none, closed, unknown, there = world.run(commands, tmp_path / "home", HF_TOKEN=OTHER)
    for ran in gated:
        assert_refused(ran, "is gated, and the token's account has no access", "accept the licence", status=1)
    assert_refused(none, "the hub knows no model of that name", status=2)
    assert closed.out.startswith(f"fail {GATED} is gated, and the token's account has no access")
    assert unknown.out.startswith(f"fail {OPEN} has no revision v9")
    assert there.out.startswith(f"ok {OPEN} can be had from the hub with HF_TOKEN")
    assert {asked.token for asked in world.hub.asked if asked.token != READER} <= {None, OTHER}


def test_offline_or_without_a_network_the_cache_alone_counts(world: World, tmp_path: Path) -> None:
    home, nowhere = tmp_path / "home", f"http://127.0.0.1:{free_port()}"
    absent = world.commands("org/absent", "v1", tmp_path)
    plan, load = (*PLAN, "--model", GATED, "--revision", "v1"), ("load", world.posterior(OPEN, OLD))
    assert [ran.code for ran in world.run([plan, load], home, HF_TOKEN=READER)] == [0, 0]
    before = len(world.hub.asked)

    once = "`hf download org/absent --revision v1`, or give a folder"
    *there, planned, trained = world.run([plan, load, *absent[:2]], home, HF_ENDPOINT=nowhere)
    assert [ran.code for ran in there] == [0, 0]
    for ran in (planned, trained):
        assert_refused(ran, f"the hub at {nowhere} cannot be reached", once, status=1)

    for wanted_by_other_programs in home.rglob("generation_config.json"):
        wanted_by_other_programs.unlink()
    planned_alone = ("load", world.posterior(GATED, OLD))
    *there, without_weights = world.run([*absent, plan, load, planned_alone], home, HF_HUB_OFFLINE="1")
    assert_refused(without_weights, f"{GATED} at {OLD} is not in the hub's cache, or not whole", status=2)
    assert [ran.code for ran in there[-2:]] == [0, 0]
    for command, ran in zip(absent, there[:-2], strict=True):
        words = "org/absent at v1 is not in the hub's cache", "HF_HUB_OFFLINE is set", once
        assert_refused(ran, *words, status=status_of(command))
    assert len(world.hub.asked) == before


def test_a_pinned_revision_is_recorded_as_its_commit_and_held_to(world: World, tmp_path: Path) -> None:
    theta = tmp_path / "theta"
    adapt = ("adapt", theta, "--examples", world.examples, "--task", "t", "--out")
    train: list[Any] = ["train", "--tasks", world.tasks, "--model", GATED, "--steps", 1, "--rank", 3]
    train += ["--config", world.folder / "train.toml", "--pin", "family_1=test", "--pin", "family_2=test"]
    evaluate = ("eval", theta, "--tasks", world.tasks, "--shots", "0", "--queries", 2, "--draws", 1)
    before = len(world.hub.asked)
    online = [
        [*train, "--revision", "v1", "--out", theta],
        [*adapt, tmp_path / "phi"],
        [*train, "--out", tmp_path / "newest"],
        ["serve", "--model", GATED, "--revision", "main", "--posterior", theta, "--store", tmp_path / "store",
         "--port", free_port(), "--engine", "torch"],
    ]  # fmt: skip
    *made, served = world.run(online, tmp_path / "home", HF_TOKEN=READER)
    assert [ran.code for ran in made] == [0, 0, 0], made
    assert_refused(served, f"the posterior was made for {GATED}", "weights", status=1)  # main has others than v1
    files = [asked for asked in world.hub.asked[before:] if "/resolve/" in asked.path]
    assert {asked.token for asked in files} == {READER}
    assert {asked.path.split("/")[4] for asked in files} == {OLD, NEW}
    assert not [asked for asked in files if "original" in asked.path]
    for folder, commit in ((theta, OLD), (tmp_path / "phi", OLD), (tmp_path / "newest", NEW)):
        posterior = load_posterior(folder).posterior
        assert posterior.config.base_revision == commit
        assert posterior.config.base_fingerprint == checkpoint_fingerprint(world.folder / commit, posterior.layers)

    before = len(world.hub.asked)
    offline = [[*adapt, tmp_path / "again"], evaluate, ["load", theta], [*PLAN, "--model", GATED, "--revision", "v1"]]
    done = world.run(offline, tmp_path / "home", HF_HUB_OFFLINE="1")
    assert [ran.code for ran in done] == [0] * 4, done
    assert load_posterior(tmp_path / "again").digest == load_posterior(tmp_path / "phi").digest
    with serving(world, tmp_path, "--model", GATED, "--posterior", theta) as client:
        asked = {"prompt": "the film was a delight", "options": ["yes", "no"], "draws": 2}
        assert sum(client.post("/generate", json=asked).raise_for_status().json()["probabilities"]) == pytest.approx(1)
    assert len(world.hub.asked) == before


@contextlib.contextmanager
def serving(world: World, folder: Path, *options: object) -> Generator[httpx.Client]:
    """A server that may not ask the hub, ready."""
    port, log = free_port(), folder / "log"
    more = ["--port", port, "--store", folder / "store", "--engine", "torch"]
    given = {"HF_ENDPOINT": world.hub.url, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "server.cli", "serve", *map(str, (*options, *more))],
            cwd=ROOT, stdout=stream, stderr=stream, env=os.environ | given | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:

            def ready() -> bool:
                assert process.poll() is None, log.read_text()
                with contextlib.suppress(httpx.TransportError):
                    return client.get("/readyz").status_code == 200
                return False

            wait_for(ready, 180)
            yield client
    finally:
        process.terminate()
        process.wait(60)
