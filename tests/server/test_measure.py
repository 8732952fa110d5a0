"""`abmll measure`: a served task counted on labelled questions, over a real server."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from abmll import metrics
from abmll.examples import Example
from clients.http import Client
from clients.replies import Answer, PosteriorId, Timing, Uncertainty
from server.held_out import ece_by_chance, measure
from server.keys import Keys
from server.measure_command import as_text
from tests.command_line import CommandLine
from tests.server.conftest import Server
from tests.server.test_http import EXAMPLES

OPTIONS = ["good", "bad"]


def answered(confidence: float, index: int | None = 0, **more: Any) -> Answer:
    """An answer to a question with three options, or in free text."""
    rest = (1 - confidence) / 2
    probabilities = None if index is None else [confidence if at == index else rest for at in range(3)]
    fields: dict[str, Any] = {
        "request_id": "r",
        "task": "films",
        "posterior": PosteriorId(id="p", version=2),
        "answer": "a",
        "answer_index": index,
        "probabilities": probabilities,
        "confidence": confidence,
        "raw_confidence": confidence,
        "calibrated": True,
        "uncertainty": Uncertainty(total=0.3, aleatoric=0.2, epistemic=0.1),
        "standard_error": 0.0,
        "draws": 8,
        "timing": Timing(total_ms=1.0, engine_ms=1.0, queue_ms=0.0),
    }
    return Answer(**(fields | more))


def test_answers_with_options_are_counted() -> None:
    row = Example("q", ("a", "b", "c"), 0)
    answers = [
        answered(0.9, prediction_set=["a"]),
        answered(0.8, prediction_set=["a", " b"]),
        answered(0.6, 1, prediction_set=["b"], calibrated=False, draws=4),
        answered(0.5, prediction_set=["a", "c"], posterior=PosteriorId(id="o", version=1)),
    ]
    found = measure([row] * 4, answers)
    assert (found.task, found.versions, found.questions, found.free_text) == ("films", [1, 2], 4, False)
    assert found.uncalibrated == 1
    assert found.accuracy == 0.75
    assert found.confidence == pytest.approx(0.7)
    assert found.ece == pytest.approx((0.1 + 0.2 + 0.6 + 0.5) / 4)
    assert found.nll == pytest.approx(-torch.tensor([0.9, 0.8, 0.2, 0.5]).log().mean().item())
    brier = [0.01 + 2 * 0.05**2, 0.04 + 2 * 0.1**2, 0.8**2 + 0.6**2 + 0.2**2, 0.25 + 2 * 0.25**2]
    assert found.brier == pytest.approx(sum(brier) / 4)
    assert found.auroc == pytest.approx(2 / 3)
    assert (found.set_coverage, found.set_size, found.draws) == (0.75, 1.5, 7.0)
    assert (found.epistemic, found.aleatoric) == (pytest.approx(0.1), pytest.approx(0.2))
    assert [(share.low, share.high, share.answers, share.accuracy) for share in found.bins] == [
        (0.4, 0.5, 1, 1.0), (0.5, 0.6, 1, 0.0), (0.7, 0.8, 1, 1.0), (0.8, 0.9, 1, 1.0),
    ]  # fmt: skip
    counted = {share.low: (share.answers, share.accuracy) for share in found.at_least}
    assert counted == {
        0.0: (4, 0.75), 0.5: (4, 0.75), 0.6: (3, pytest.approx(2 / 3)), 0.7: (2, 1.0), 0.8: (2, 1.0), 0.9: (1, 1.0),
    }  # fmt: skip
    # Wilson's interval of 3 of 4, by its formula.
    z, share, count = 1.959964, 0.75, 4
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * (share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5
    assert (found.accuracy_low, found.accuracy_high) == (pytest.approx(middle - half), pytest.approx(middle + half))


def test_rows_may_have_different_numbers_of_options() -> None:
    two = answered(0.7, 1, probabilities=[0.3, 0.7])
    found = measure([Example("q", ("a", "b"), 1), Example("q", ("a", "b", "c"), 2)], [two, answered(0.6, 2)])
    assert found.accuracy == 1.0
    assert found.auroc is None
    assert found.nll == pytest.approx(-torch.tensor([0.7, 0.6]).log().mean().item())
    assert found.brier == pytest.approx((2 * 0.09 + 0.16 + 2 * 0.04) / 2)
    assert (found.set_coverage, found.set_size) == (None, None)


def test_a_free_text_is_right_if_it_says_the_same_and_was_not_cut_short() -> None:
    row = Example("q", ("The lights",), 0)
    texts = [("lights.", "end"), ("Lights", "length"), ("music", "end")]
    answers = [answered(0.8, None, answer=text, finish=finish) for text, finish in texts]
    found = measure([row] * 3, answers)
    assert found.free_text
    assert as_text(found).startswith("films version 2: 3 questions in free text\n")
    assert found.accuracy == pytest.approx(1 / 3)
    assert found.nll == pytest.approx(-torch.tensor([0.8, 0.2, 0.2]).log().mean().item())
    assert found.brier == pytest.approx((0.04 + 0.64 + 0.64) / 3)


def test_true_confidence_is_seldom_called_off_and_false_confidence_is() -> None:
    generator = torch.Generator().manual_seed(0)
    called = {"true": 0, "too sure": 0}
    for _ in range(100):
        confidence = 0.5 + 0.5 * torch.rand(150, generator=generator, dtype=torch.float64)
        for name, chance in (("true", confidence), ("too sure", confidence - 0.2)):
            right = (torch.rand(150, generator=generator) < chance).tolist()
            answers = [answered(c, 0 if ok else 1) for c, ok in zip(confidence.tolist(), right, strict=True)]
            found = measure([Example("q", ("a", "b", "c"), 0)] * 150, answers)
            called[name] += found.ece > found.ece_by_chance
    assert called["true"] <= 12  # 5 expected, standard deviation 2.2
    assert called["too sure"] >= 95


def test_chance_is_simulated_as_ece_is_counted() -> None:
    confidence = torch.linspace(0.05, 0.99, 40, dtype=torch.float64)
    generator = np.random.default_rng(0)
    drawn = [torch.from_numpy(generator.random(40)) < confidence for _ in range(1000)]
    errors = [metrics.expected_calibration_error(confidence, correct) for correct in drawn]
    assert ece_by_chance(confidence) == pytest.approx(np.quantile(errors, 0.95))


def test_confidence_that_is_off_is_told_how() -> None:
    row = Example("q", ("a", "b", "c"), 0)

    def told(confidence: Sequence[float], right: Sequence[bool]) -> str:
        answers = [answered(c, 0 if ok else 1) for c, ok in zip(confidence, right, strict=True)]
        return as_text(measure([row] * len(answers), answers))

    half = [True, False] * 50
    assert "points   too sure: " in told([0.9] * 100, half)
    assert "points   too doubtful: " in told([0.4] * 100, [True] * 100)
    assert "points   off, though not on average" in told(
        [0.9] * 50 + [0.4] * 50, [False] * 20 + [True] * 65 + [False] * 15
    )
    assert "points   no sign that confidence is off" in told([0.5] * 100, half)


def test_more_answers_leave_less_to_chance() -> None:
    confidence = torch.linspace(0.3, 0.99, 1000, dtype=torch.float64)
    assert ece_by_chance(confidence) < 0.5 * ece_by_chance(confidence[::10])


@pytest.fixture(scope="module")
def served(start_server: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory) -> tuple[Server, str, str]:
    """A server that knows a task, a key for all, and one that may ask rarely."""
    keys = Keys(tmp_path_factory.mktemp("keys") / "keys.sqlite3")
    key, slow = keys.add("all", ["query", "adapt", "admin"]), keys.add("slow", ["query"], "3/second")
    server = start_server(keys=keys.path)
    with Client(server.url, key=key) as client:
        client.wait(client.adapt("films", EXAMPLES, steps=1))
        texts = [{"prompt": row["prompt"], "answer": f"text {at % 2}"} for at, row in enumerate(EXAMPLES)]
        client.wait(client.adapt("texts", texts, steps=1))
    return server, key, slow


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "held_out.jsonl"
    asked = [{"prompt": f"film number {n}", "options": OPTIONS, "answer": OPTIONS[n % 2]} for n in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in asked), encoding="utf-8")
    return path


def test_a_served_task_is_measured_and_the_server_told_what_was_right(
    served: tuple[Server, str, str], rows: Path, abmll: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, key, _ = served
    monkeypatch.setenv("ABMLL_KEY", key)
    shown = abmll("measure", "films", rows, "--url", server.url)
    assert shown.code == 0, shown.err
    assert shown.out.startswith("films version 1: 24 questions\n")
    with Client(server.url, key=key) as client:
        assert client.reliability("films").feedback is None
        found = abmll("measure", "films", rows, "--url", server.url, "--feedback", "--json").json
        asked = [json.loads(line) for line in rows.read_text().splitlines()]
        own = [client.generate(row["prompt"], task="films", options=row["options"]) for row in asked]
        right = [answer.answer == row["answer"] for answer, row in zip(own, asked, strict=True)]
        assert found["accuracy"] == pytest.approx(sum(right) / 24)
        assert found["confidence"] == pytest.approx(sum(answer.confidence for answer in own) / 24, abs=1e-5)
        assert f"right             {100 * found['accuracy']:5.1f} %" in shown.out
        told = client.reliability("films").feedback
    assert told is not None
    assert told.answers == 24
    accuracy = sum(each.count * each.accuracy for each in told.bins) / 24
    assert accuracy == pytest.approx(found["accuracy"])


def test_free_text_is_measured(
    served: tuple[Server, str, str], tmp_path: Path, abmll: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, key, _ = served
    monkeypatch.setenv("ABMLL_KEY", key)
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"film {n}", "answer": "text 1"}) + "\n" for n in range(3)))
    found = abmll("measure", "texts", file, "--url", server.url, "--feedback", "--json").json
    assert (found["free_text"], found["questions"], found["set_coverage"]) == (True, 3, None)
    assert found["uncalibrated"] == 3  # the tiny model's texts do not end
    seen = server.http.get("/metrics", headers={"Authorization": f"Bearer {key}"}).text
    (line,) = [line for line in seen.splitlines() if line.startswith("abmll_requests_total") and '"/feedback"' in line]
    assert 'status="200"' in line


def test_a_key_that_may_ask_rarely_is_waited_for(
    served: tuple[Server, str, str], rows: Path, abmll: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, _, slow = served
    monkeypatch.setenv("ABMLL_KEY", slow)
    few = rows.with_name("few.jsonl")
    few.write_text("".join(line + "\n" for line in rows.read_text().splitlines()[:8]))
    assert abmll("measure", "films", few, "--url", server.url, "--json").json["questions"] == 8


def test_what_cannot_be_measured_is_one_line(
    served: tuple[Server, str, str], rows: Path, abmll: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, key, _ = served
    monkeypatch.setenv("ABMLL_KEY", key)
    url = ("--url", server.url)
    assert "no task 'nope'" in abmll("measure", "nope", rows, *url).refusal
    assert "no version 9" in abmll("measure", "films", rows, *url, "--version", 9).refusal
    assert "cannot read" in abmll("measure", "films", rows.with_name("none"), *url).refusal
    long = rows.with_name("long.jsonl")
    row = {"prompt": "film " * 600, "options": OPTIONS, "answer": 0}
    long.write_text(rows.read_text() + json.dumps(row) + "\n")
    assert f"{long}, question 25: prompt (" in abmll("measure", "films", long, *url).refusal
    monkeypatch.setenv("ABMLL_KEY", "none")
    assert "ABMLL_KEY" in abmll("measure", "films", rows, *url).err
