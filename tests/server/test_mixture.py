"""A server whose tasks are mixtures of several Gaussians."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from abmll.draw_scores import score_draws
from abmll.layers import attach
from abmll.posterior import members_of
from abmll.predictive import predictive
from abmll.scoring import tokenize
from abmll.store import Record, StoredPosterior, load_posterior, save_posterior
from tests.command_line import CommandLine
from tests.server.conftest import TARGETS, Server, random_posterior
from tests.server.test_http import EXAMPLES, QUESTION
from training.base_model import load_base


@pytest.fixture(scope="module")
def server(
    start_server: Callable[..., Server],
    global_posterior: tuple[Path, StoredPosterior],
    tiny_model_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Server:
    """It is told by the global posterior alone that tasks are mixtures."""
    folder = tmp_path_factory.mktemp("mixtures")
    theta = random_posterior(tiny_model_folder, 1, family="subspace")
    record = Record(task="global", training={"inner": {"steps": 3, "learning_rate": 5e-2, "beta": 1e-2, "members": 3}})
    save_posterior(folder / "theta", theta, record, global_posterior[1].calibration)
    return start_server(folder / "store", posterior=folder / "theta")


def test_a_task_is_a_mixture_and_answers_as_all_its_members_together(
    server: Server, tiny_model_folder: Path, abmll: CommandLine, tmp_path: Path
) -> None:
    reply = server.http.post("/adapt", json={"task": "mixed", "examples": EXAMPLES})
    assert server.wait_job(reply.json()["job"])["status"] == "done"
    stored = load_posterior(server.settings.store / "tasks" / "mixed" / "v0001")
    assert (stored.posterior.config.members, stored.record.training["inner"]["members"]) == (3, 3)
    assert len({member.digest() for member in members_of(stored.posterior)}) == 3

    answer = server.http.post("/generate", json=QUESTION | {"task": "mixed", "draws": 12, "seed": 5}).json()
    assert (answer["draws"], answer["calibrated"]) == (12, True)
    base = load_base(str(tiny_model_folder))
    attached, config = attach(base.model, TARGETS), stored.posterior.config
    asked = tokenize(base.tokenizer, config.template, str(QUESTION["prompt"]), list(QUESTION["options"]), base.context)
    apart = [score_draws(attached, member, [asked], range(12), 5) for member in members_of(stored.posterior)]
    scores = torch.stack([apart[index // 2 % 3][index, 0] for index in range(12)])
    assert answer["raw_confidence"] == pytest.approx(predictive(scores).confidence.item(), abs=1e-4)

    for draws, taken in ((1, 6), (7, 12), ("auto", 12), (64, 64)):  # eight are automatic, sixty-four the most
        asked_for = server.http.post("/generate", json=QUESTION | {"task": "mixed", "draws": draws}).json()
        assert asked_for["draws"] == taken
    text = server.http.post("/generate", json={"prompt": "a film", "task": "mixed", "max_tokens": 4}).json()
    assert text["answer"] is not None
    ran = abmll("draws", server.settings.store / "tasks" / "mixed" / "v0001", "--out", tmp_path / "d", "--draws", 6)
    assert ran.code == 0, ran.err
    assert len(ran.out.splitlines()) == 6
