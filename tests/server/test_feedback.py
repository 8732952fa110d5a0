"""What is said of answers: stored, measured, and turned into a new temperature that can be rolled back."""

from __future__ import annotations

import math
import random
import sqlite3
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from abmll.calibration import TemperaturePrior, own_temperature, temperature_evidence
from abmll.errors import AnswerNotFound, InvalidRequest, StoreFailure
from abmll.metrics import brier, expected_calibration_error, negative_log_likelihood
from abmll.predictive import predictive
from abmll.store import Record, StoredPosterior
from clients.errors import NotFound, RequestRejected
from clients.http import Client
from server.feedback import FIRST, WINDOW, Answered, Feedback
from server.recalibration import FEWEST, refit
from tests.server.conftest import Server, random_posterior, wait_for
from tests.server.test_http import QUESTION, adapt

OPTIONS = ["positive", "negative", "neutral"]


def measures(server: Server, task: str, version: int = 1) -> dict[str, float]:
    families = text_string_to_metric_families(server.http.get("/metrics").text)
    wanted = {"task": task, "version": str(version)}
    return {s.name.removeprefix("abmll_"): s.value for f in families for s in f.samples if s.labels == wanted}


def ask(server: Server, task: str, number: int) -> dict[str, Any]:
    question = {"prompt": f"film {number} was what it was", "options": OPTIONS, "task": task, "draws": 4}
    reply = server.http.post("/generate", json=question)
    assert reply.status_code == 200, reply.text
    return reply.json()


def say(server: Server, request_id: str, **what: Any) -> Any:
    return server.http.post("/feedback", json={"request_id": request_id, **what})


def test_a_withheld_answer_is_judged_by_the_right_option_alone(server: Server) -> None:
    question = {"prompt": "a film", "options": OPTIONS, "abstain_below": 1}
    reply = server.http.post("/generate", json=question).json()
    assert reply["answer"] is None
    refused = say(server, reply["request_id"], correct=False)
    assert refused.status_code == 422
    assert "which option is right" in refused.json()["error"]["message"]
    candidates = [candidate["answer"] for candidate in reply["abstained"]["candidates"]]
    assert say(server, reply["request_id"], answer=candidates[0]).json()["correct"]
    assert not say(server, reply["request_id"], answer=candidates[1]).json()["correct"]


def test_a_scored_answer_can_be_judged(server: Server) -> None:
    reply = server.http.post("/score", json={"prompt": "a film", "answer": "good"}).json()
    assert say(server, reply["request_id"], correct=True).json()["correct"]


def test_no_risk_is_promised_below_what_was_judged(global_posterior: tuple[Path, StoredPosterior]) -> None:
    """Of answers that were all right, but of which none unsure was judged."""
    scores = torch.tensor([[3.0, 0.0]]).expand(4, 2)
    surer = torch.tensor([0.01, 0.0])
    calibration, _ = refit(global_posterior[1], [(scores + number * surer, 0) for number in range(40)], None)
    entry = calibration.by_shots[0]
    assert entry.risk
    confidence = predictive(scores, entry.temperature).confidence.item()
    assert list(entry.risk.values()) == pytest.approx([confidence] * len(entry.risk))


def test_drift_is_from_a_versions_own_first_answers_and_survives_a_restart(tmp_path: Path) -> None:
    """Two options of a task that is easy have another mean confidence than the validation tasks: that is no drift."""
    feedback = Feedback(tmp_path / "feedback.db", 10_000)

    def answer(number: int, confidence: float, epistemic: float) -> None:
        scores, probabilities = torch.zeros(2, 2), [confidence, 1 - confidence]
        feedback.note(
            Answered(
                f"r{number}", "home", 1, "hash", ["a", "b"], scores, True, 2, 0, probabilities, confidence, epistemic,
                time.monotonic(),
            )
        )  # fmt: skip

    for number in range(FIRST - 1):
        answer(number, 0.99, 0.01)
    assert "confidence_drift" not in feedback.windows()[0][2]
    answer(FIRST - 1, 0.99, 0.01)
    assert feedback.windows()[0][2]["confidence_drift"] == pytest.approx(0, abs=1e-9)
    for number in range(FIRST, FIRST + WINDOW):
        answer(number, 0.79, 0.04)
    told = feedback.windows()[0][2]
    assert told["confidence_drift"] == pytest.approx(-0.2)
    assert told["epistemic_drift_nats"] == pytest.approx(0.03)
    feedback.flush()
    again = Feedback(tmp_path / "feedback.db", 10_000)
    again.load({"home"})
    assert again.windows()[0][2] == pytest.approx(told)


@pytest.mark.slow
def test_feedback_is_measured_survives_kill_and_refits_the_temperature(
    start_server: Callable[..., Server], tmp_path: Path
) -> None:
    server = start_server(tmp_path / "store")
    assert server.wait_job(adapt(server, "judged", steps=1)["job"])["status"] == "done"
    truth = random.Random(3)
    replies, labels = [], []
    for number in range(60):
        reply = ask(server, "judged", number)
        label = truth.randrange(3)
        # The right option as its text or its index.
        forms: list[dict[str, Any]] = [{"answer": OPTIONS[label]}, {"answer": label}]
        form = forms[number % 2]
        said = say(server, reply["request_id"], **form)
        assert said.status_code == 200, said.text
        assert said.json()["correct"] == (label == reply["answer_index"])
        replies.append(reply)
        labels.append(label)

    probabilities = torch.tensor([reply["probabilities"] for reply in replies], dtype=torch.float64)
    answers = torch.tensor(labels)
    confidence, index = probabilities.max(dim=-1)
    expected = {
        "feedback_count": 60,
        "feedback_accuracy": (index == answers).double().mean().item(),
        "feedback_ece": expected_calibration_error(confidence, index == answers),
        "feedback_brier": brier(probabilities, answers),
        "feedback_nll": negative_log_likelihood(probabilities, answers),
        "promised_ece": 0.05,
        "recent_count": 60,
        "recent_confidence": confidence.mean().item(),
    }
    found = measures(server, "judged")
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-6), name
    assert not {"confidence_drift", "epistemic_drift_nats"} & found.keys()  # too few answers to compare with

    server.process.kill()
    server.process.wait()
    server = start_server(tmp_path / "store")
    wait_for(lambda: "feedback_count" in measures(server, "judged"))
    assert measures(server, "judged") == pytest.approx(found)

    told = server.http.get("/tasks/judged/reliability").json()
    assert (told["task"], told["version"]) == ("judged", 1)
    assert told["feedback"]["answers"] == 60
    assert told["feedback"]["risk_coverage"][-1]["risk"] == pytest.approx(1 - expected["feedback_accuracy"])
    assert told["validation"]["answers"] == 50
    assert server.http.get("/tasks/global/reliability").json()["feedback"] is None

    # The labels were thrown: an honest temperature is high, and the confidence falls to what chance gives.
    shown = server.http.post("/tasks/judged/recalibrate", json={}).json()
    assert shown["applied"] is None
    assert shown["answers"] == 60
    assert shown["before"]["nll"] == pytest.approx(expected["feedback_nll"], abs=1e-4)
    assert shown["before"]["ece"] == pytest.approx(expected["feedback_ece"], abs=1e-4)
    assert shown["temperature_after"] != shown["temperature_before"]
    assert server.http.get("/tasks/judged").json()["version"] == 1

    applied = server.http.post("/tasks/judged/recalibrate", json={"apply": True}).json()
    assert applied["applied"] == 2
    task = server.http.get("/tasks/judged").json()
    assert task["version"] == 2
    assert task["calibration"]["by_shots"][0]["temperature"] == pytest.approx(shown["temperature_after"])
    after = ask(server, "judged", 0)
    assert after["posterior"]["id"] == replies[0]["posterior"]["id"]
    assert after["raw_confidence"] == pytest.approx(replies[0]["raw_confidence"], abs=1e-6)
    assert after["confidence"] != pytest.approx(replies[0]["confidence"], abs=1e-4)
    # The new version is held to what its own judged answers promise.
    kept = task["calibration"]["by_shots"][0]
    found = measures(server, "judged", 2)
    assert found["promised_ece"] == pytest.approx(shown["after"]["ece"])
    again = [ask(server, "judged", number)["confidence"] for number in range(60)]
    assert sum(again) / 60 == pytest.approx(kept["confidence"], abs=1e-6)

    rolled = server.http.put("/tasks/judged/serving", json={"versions": {"1": 1}})
    assert rolled.status_code == 200
    assert ask(server, "judged", 0)["probabilities"] == replies[0]["probabilities"]

    assert server.http.delete("/tasks/judged").status_code == 204
    assert measures(server, "judged") == {}
    assert say(server, replies[0]["request_id"], correct=True).status_code == 404


def test_feedback_that_makes_no_sense_is_refused(server: Server) -> None:
    reply = server.http.post("/generate", json=QUESTION).json()
    text = server.http.post("/generate", json={"prompt": "tell me", "max_tokens": 2, "draws": 2}).json()
    right = reply["request_id"]
    for request_id, what, status in (
        (right, {}, 422),
        (right, {"answer": "positive", "correct": True}, 422),
        (right, {"answer": "no such option"}, 422),
        (right, {"answer": 3}, 422),
        (right, {"answer": -1}, 422),
        (right, {"correct": "yes"}, 422),
        ("nobody", {"correct": True}, 404),
        (text["request_id"], {"answer": "x"}, 422),
    ):
        assert say(server, request_id, **what).status_code == status, what
    assert say(server, text["request_id"], correct=False).status_code == 200
    few = server.http.post("/tasks/global/recalibrate", json={})
    assert few.status_code == 409
    assert server.http.post("/tasks/nowhere/recalibrate", json={}).status_code == 404


def test_judging_again_replaces_and_old_answers_go(tmp_path: Path) -> None:
    feedback = Feedback(tmp_path / "f.sqlite3", kept=3)
    for number in range(5):
        feedback.note(answered(str(number), torch.tensor([[0.0, -1.0], [0.0, -2.0]])))
    feedback.flush()
    with pytest.raises(AnswerNotFound):
        feedback.judge("1", None, True)
    feedback.judge("4", None, False)
    assert dict_of(feedback)["feedback_accuracy"] == 0.0
    judged = feedback.judge("4", "a", None)
    assert (judged.correct, judged.label) == (True, 0)
    assert judged.nll == pytest.approx(-math.log(0.7))
    assert dict_of(feedback) == {
        "feedback_count": 1.0,
        "feedback_accuracy": 1.0,
        "feedback_ece": pytest.approx(0.3),
        "feedback_brier": pytest.approx(0.18),
        "feedback_nll": pytest.approx(-math.log(0.7)),
        "recent_count": 5.0,
        "recent_confidence": pytest.approx(0.7),
        "recent_epistemic_nats": pytest.approx(0.01),
    }
    ((scores, label),) = feedback.labelled("t", 1, "p")
    assert (scores.tolist(), label) == ([[0.0, -1.0], [0.0, -2.0]], 0)


def answered(request_id: str, scores: torch.Tensor, begun: float = math.inf, posterior: str = "p") -> Answered:
    return Answered(
        request_id, "t", 1, posterior, ["a", "b"], scores, True, len(scores), 0, [0.7, 0.3], 0.7, 0.01, begun
    )


def dict_of(feedback: Feedback) -> dict[str, float]:
    ((_, _, told),) = feedback.windows()
    return told


def test_answers_in_flight_while_their_task_is_deleted_are_not_its_successors(tmp_path: Path) -> None:
    path = tmp_path / "f.sqlite3"
    feedback, scores = Feedback(path, kept=9), torch.zeros(1, 2)
    feedback.note(answered("written", scores))
    feedback.flush()
    in_flight = answered("in flight", scores, begun=time.monotonic())
    feedback.forget("t", time.monotonic())
    feedback.note(in_flight)
    feedback.note(answered("new", scores, begun=time.monotonic()))
    feedback.flush()
    again = Feedback(path, kept=9)
    again.load(["t"])
    for kept in (feedback, again):
        told = {"recent_count": 1.0, "recent_confidence": 0.7, "recent_epistemic_nats": 0.01}
        assert dict_of(kept) == {"feedback_count": 0.0} | told
        assert kept.judge("new", 0, None).correct
        for name in ("written", "in flight"):
            with pytest.raises(AnswerNotFound):
                kept.judge(name, 0, None)
    after_a_crash = Feedback(path, kept=9)
    after_a_crash.load(["t"], lambda task, version: (task, version) == ("t", 1))
    assert len(after_a_crash.windows()) == 1
    after_a_crash = Feedback(path, kept=9)
    after_a_crash.load(["t"], lambda task, version: version != 1)  # a version that was deleted
    assert after_a_crash.windows() == []
    with pytest.raises(AnswerNotFound):
        after_a_crash.judge("new", 0, None)
    after_a_crash.note(answered("new", scores, begun=time.monotonic()))
    after_a_crash.flush()
    after_a_crash = Feedback(path, kept=9)
    after_a_crash.load(["another task"])
    assert after_a_crash.windows() == []
    with pytest.raises(AnswerNotFound):
        after_a_crash.judge("new", 0, None)


def test_another_posterior_of_the_same_name_and_number_has_its_own_answers(tmp_path: Path) -> None:
    """Of a task that another server deleted and taught anew, or of a global posterior that was trained again."""
    path = tmp_path / "f.sqlite3"
    feedback, scores = Feedback(path, kept=9), torch.zeros(1, 2)
    feedback.note(answered("old", scores))
    feedback.judge("old", 1, None)
    feedback.note(answered("later", scores))
    assert dict_of(feedback)["feedback_accuracy"] == 0
    feedback.note(answered("new", scores, posterior="q"))
    feedback.judge("later", 1, None)  # late, and of the old one
    again = Feedback(path, kept=9)
    again.load(["t"])
    for each in (feedback, again):
        assert each.answering() == {("t", 1): "q"}
        assert dict_of(each)["recent_count"] == 1
        assert dict_of(each)["feedback_count"] == 0
        assert each.curves("t", 1, "q") is None
        assert (each.labelled("t", 1, "q"), len(each.labelled("t", 1, "p"))) == ([], 2)
    feedback.judge("new", 0, None)
    assert dict_of(feedback)["feedback_accuracy"] == 1
    assert feedback.curves("t", 1, "p") is None
    assert len(feedback.labelled("t", 1, "q")) == 1


def test_one_question_judged_often_is_one_question(tiny_model_folder: Path) -> None:
    stored = StoredPosterior(random_posterior(tiny_model_folder, 1), Record(task="t", version=1), None, "digest")
    generator = torch.Generator().manual_seed(0)
    questions = [(torch.randn(2, 3, generator=generator), number % 3) for number in range(FEWEST)]
    with pytest.raises(InvalidRequest, match=f"to {FEWEST - 1} different questions"):
        refit(stored, [*questions[1:], *questions[1:]], None)
    once, told = refit(stored, questions, None)
    wrong = [(scores, (label + 1) % 3) for scores, label in questions]  # said before, and taken back
    again, told_again = refit(stored, [*questions, *questions, *wrong], None)
    assert (again, told_again) == (once, told)
    assert told.answers == FEWEST


def test_what_recalibration_changes_is_measured_on_answers_that_it_was_not_fitted_to(tiny_model_folder: Path) -> None:
    """Whatever number of draws each answer took, and in whatever order they were judged."""
    stored = StoredPosterior(random_posterior(tiny_model_folder, 1), Record(task="t", version=1), None, "digest")
    generator = torch.Generator().manual_seed(0)
    judged = [(3 * torch.randn((2, 8, 4)[n % 3], 3, generator=generator), n % 3) for n in range(2 * FEWEST)]
    calibration, told = refit(stored, judged, None)
    in_order = sorted(judged, key=lambda item: len(item[0]))
    assert refit(stored, in_order, None) == (calibration, told)
    losses: list[float] = []
    for fold in range(5):
        rest = [item for number, item in enumerate(in_order) if number % 5 != fold]
        evidence = torch.cat([temperature_evidence((s[:, None], torch.tensor([y]))) for s, y in rest], dim=1)
        own = own_temperature(TemperaturePrior(median=1.0, spread=1.0), evidence)
        held = in_order[fold::5]
        losses += [-predictive(s[:, None], own).probabilities[0, y].log().item() for s, y in held]
    assert told.after.nll == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    fitted = [-predictive(s[:, None], told.temperature_after).probabilities[0, y].log().item() for s, y in judged]
    assert told.after.nll > sum(fitted) / len(fitted)


def test_a_no_of_two_options_is_a_yes_to_the_other(tmp_path: Path) -> None:
    feedback = Feedback(tmp_path / "f.sqlite3", kept=9)
    for number, right in enumerate((True, False)):
        feedback.note(answered(str(number), torch.zeros(1, 2)))
        feedback.judge(str(number), None, right)
    assert [label for _, label in feedback.labelled("t", 1, "p")] == [1, 0]


def test_answers_scored_in_another_way_are_not_recalibrated_to(tmp_path: Path) -> None:
    feedback = Feedback(tmp_path / "f.sqlite3", kept=9)
    for number, standard in enumerate((True, False)):
        feedback.note(replace(answered(str(number), torch.full((1, 2), float(number))), standard=standard))
        feedback.judge(str(number), "a", None)
    ((scores, _),) = feedback.labelled("t", 1, "p")
    assert scores.tolist() == [[0.0, 0.0]]


def test_a_file_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "f.sqlite3"
    feedback = Feedback(path, kept=9)
    feedback.note(answered("old", torch.zeros(1, 2)))
    feedback.judge("old", 1, None)
    with sqlite3.connect(path) as db:
        db.execute("ALTER TABLE answers DROP COLUMN posterior")
    again = Feedback(path, kept=9)
    again.load(["t"])
    again.note(answered("new", torch.zeros(1, 2)))
    again.judge("new", 0, None)
    assert dict_of(again)["feedback_accuracy"] == 0.5
    assert len(again.labelled("t", 1, "p")) == 2


def test_a_damaged_file_is_told_and_what_waits_is_written_once_it_is_restored(tmp_path: Path) -> None:
    path = tmp_path / "f.sqlite3"
    feedback, scores = Feedback(path, kept=9), torch.zeros(1, 2)
    feedback.note(answered("old", scores))
    feedback.flush()
    good = path.read_bytes()
    path.write_bytes(good[:4096] + b"\xff" * (len(good) - 4096))
    feedback.forget("t", time.monotonic())  # logged: the task itself is gone already
    feedback.note(answered("new", scores))
    with pytest.raises(StoreFailure, match="damaged"):
        feedback.flush()
    with pytest.raises(StoreFailure, match="damaged"):
        feedback.judge("new", 0, None)
    path.write_bytes(good)
    assert feedback.judge("new", 0, None).correct
    with pytest.raises(AnswerNotFound):
        feedback.judge("old", 0, None)


def test_evidence_of_many_answers_is_that_of_each() -> None:
    """Many are taken in blocks of temperatures, so that memory is bounded."""
    generator = torch.Generator().manual_seed(0)
    scores, answers = 3 * torch.randn(8, 9000, 3, generator=generator), torch.randint(3, (9000,), generator=generator)
    evidence = temperature_evidence((scores, answers))
    assert evidence.shape[1] == 9000
    for n in (0, 1, 8999):
        one = temperature_evidence((scores[:, n : n + 1], answers[n : n + 1]))
        torch.testing.assert_close(evidence[:, n : n + 1], one)
    # Scores say nothing of these answers: they are not to be trusted at all.
    assert own_temperature(TemperaturePrior(median=1.0, spread=1.0), evidence) == pytest.approx(20)


def test_a_yes_of_three_options_is_no_label(tmp_path: Path) -> None:
    """A no does not say which of the others is right: labels of the yeses alone would all be right answers."""
    feedback = Feedback(tmp_path / "f.sqlite3", kept=9)
    wide = torch.tensor([[0.0, -1.0, -2.0]])
    for name in ("yes", "no"):
        feedback.note(Answered(name, "t", 1, "p", ["a", "b", "c"], wide, True, 1, 0, [0.7, 0.2, 0.1], 0.7, 0.01, 0.0))
        feedback.judge(name, None, name == "yes")
    assert feedback.labelled("t", 1, "p") == []
    assert dict_of(feedback)["feedback_accuracy"] == 0.5
    assert "feedback_nll" not in dict_of(feedback)


def test_judged_texts_count_where_their_confidence_is_a_probability(tmp_path: Path) -> None:
    feedback = Feedback(tmp_path / "f.sqlite3", kept=9)
    for name, calibrated in (("sure", True), ("other", False)):
        feedback.note(Answered(name, "t", 1, "p", None, None, calibrated, 1, None, None, 0.7, 0.01, 0.0))
        feedback.judge(name, None, True)
    again = Feedback(tmp_path / "f.sqlite3", kept=9)
    again.load(["t"])
    for judged in (feedback, again):
        assert dict_of(judged)["feedback_count"] == 1
        found = judged.curves("t", 1, "p")
        assert found is not None
        assert [part.confidence for part in found.bins] == [pytest.approx(0.7)]


def test_the_client_judges_and_rolls_back(start_server: Callable[..., Server], tmp_path: Path) -> None:
    server = start_server(tmp_path / "store")
    assert server.wait_job(adapt(server, "clients", steps=1)["job"])["status"] == "done"
    with Client(server.url) as client:
        for number in range(20):
            answer = client.generate(f"film {number}", options=OPTIONS, task="clients", draws=2)
            said = client.feedback(answer, answer=number % 3)
            assert (said.task, said.version, said.correct) == ("clients", 1, answer.answer == OPTIONS[number % 3])
        assert client.recalibrate("clients").applied is None
        told = client.reliability("clients", version=1)
        assert told.feedback is not None
        assert sum(part.count for part in told.feedback.bins) == told.feedback.answers == 20
        with pytest.raises(NotFound):
            client.reliability("clients", version=7)
        assert client.recalibrate("clients", apply=True).applied == 2
        assert client.generate("film", options=OPTIONS, task="clients").posterior.version == 2
        assert client.serve("clients", 1).serving == {"1": 1.0}
        assert client.generate("film", options=OPTIONS, task="clients").posterior.version == 1
        assert client.generate("film", options=OPTIONS, task="clients", version=2).posterior.version == 2
        assert client.serve("clients", {1: 1, 2: 3}).serving == {"1": 0.25, "2": 0.75}
        assert client.serve("clients", None).serving is None
        with pytest.raises(RequestRejected, match="20 are needed"):
            client.recalibrate("clients")
