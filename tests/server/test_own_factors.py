"""A server whose tasks with many examples have factors of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from abmll.draw_scores import score_draws
from abmll.layers import attach
from abmll.predictive import predictive
from abmll.scoring import tokenize
from abmll.store import Record, StoredPosterior, load_posterior, save_posterior
from tests.server.conftest import TARGETS, Server, random_posterior
from tests.server.test_http import EXAMPLES, QUESTION
from training.base_model import load_base


def test_tasks_with_factors_of_their_own_answer_as_they_were_adapted(
    start_server: Callable[..., Server],
    global_posterior: tuple[Path, StoredPosterior],
    tiny_model_folder: Path,
    tmp_path: Path,
) -> None:
    """It is told by the global posterior alone from how many examples on tasks have them."""
    theta = random_posterior(tiny_model_folder, 1, family="subspace")
    inner = {"steps": 3, "learning_rate": 5e-2, "beta": 1e-2, "factor_rate": 2e-2, "factor_examples": 3}
    record = Record(task="global", training={"inner": inner})
    save_posterior(tmp_path / "theta", theta, record, global_posterior[1].calibration)
    server = start_server(tmp_path / "store", posterior=tmp_path / "theta")
    base = load_base(str(tiny_model_folder))
    attached = attach(base.model, TARGETS)
    for task, examples in (("two", EXAMPLES[:2]), ("all", EXAMPLES)):
        reply = server.http.post("/adapt", json={"task": task, "examples": examples})
        assert server.wait_job(reply.json()["job"])["status"] == "done"
        phi = load_posterior(server.settings.store / "tasks" / task / "v0001").posterior
        differs = [not own.a.equal(theta.layers[name].a) for name, own in phi.layers.items()]
        assert all(differs) if task == "all" else not any(differs)
        prompt, options = str(QUESTION["prompt"]), list(QUESTION["options"])
        asked = tokenize(base.tokenizer, phi.config.template, prompt, options, base.context)
        expected = predictive(score_draws(attached, phi, [asked], range(8), 5)).confidence.item()
        answer = server.http.post("/generate", json=QUESTION | {"task": task, "draws": 8, "seed": 5}).json()
        assert answer["raw_confidence"] == pytest.approx(expected, abs=1e-3)
