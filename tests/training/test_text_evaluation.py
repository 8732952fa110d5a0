"""Free text: taught without options, judged as a whole, and scored beside what others use."""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sklearn.metrics import brier_score_loss, log_loss

from abmll.calibration import Calibration
from abmll.draws import draw_signs, stack_signs
from abmll.errors import AbmllError, InvalidExamples
from abmll.examples import Example
from abmll.layers import Attached, init_posterior
from abmll.metrics import expected_calibration_error
from abmll.posterior import Posterior, PosteriorConfig
from abmll.scoring import Question
from abmll.text_calibration import TextCalibration, fit_texts, text_logits
from tests.training.conftest import TARGETS, rule_task
from training.adaptation import AdaptConfig, adapt
from training.base_model import BaseModel
from training.benchmark.texts import BUDGET, draw, markdown, rows_of, score_task, with_polygraph
from training.benchmark.world import World
from training.decoded_texts import DecodedTexts, answer_texts, decode_texts
from training.episodes import EpisodeConfig, label, sample_episode
from training.evaluation import EvalConfig
from training.task_calibration import adapt_and_calibrate
from training.text_evaluation import TextPredictions, fit_text_calibration, predict_texts, score_texts

INNER = AdaptConfig(steps=2, text_steps=40, learning_rate=2e-2, beta=1e-6)
CONFIG = EvalConfig(shots=(0, 8), queries=12, draws=4)


@pytest.fixture
def theta(attached: Attached) -> Posterior:
    return init_posterior(attached, PosteriorConfig(base_model="tiny", targets=TARGETS), 0)


def test_a_free_text_ends_with_the_token_that_ends_texts(base: BaseModel) -> None:
    example = rule_task(0).examples[0]
    with_options, without = label(base, PosteriorConfig(base_model="tiny").template, [example, example.as_free_text()])
    assert without.question.options == ((*with_options.question.options[0], base.tokenizer.eos_token_id),)
    assert (with_options.is_free_text, without.is_free_text) == (False, True)
    assert (INNER.steps_on([with_options]), INNER.steps_on([without]), INNER.steps_on([])) == (2, 40, 0)
    assert INNER.with_steps(7).steps_on([without]) == 7


def test_a_task_taught_without_options_says_its_answers_and_ends(
    base: BaseModel, attached: Attached, theta: Posterior
) -> None:
    task = rule_task(1)
    texts = [example.as_free_text() for example in task.examples]
    before = decode_texts(base, attached, theta, texts[:8], 4, 0)
    phi = adapt(base, attached, theta, texts[8:24], INNER)
    after = decode_texts(base, attached, phi, texts[:8], 4, 0)
    assert not before.correct.any()
    assert set(after.texts) <= {"yes", "no"}
    assert all(tokens[-1] == base.tokenizer.eos_token_id for tokens in after.tokens)
    assert [text == e.text for text, e in zip(after.texts, texts[:8], strict=True)] == after.correct.tolist()

    close = replace(base, context=len(after.asked[0].prompt) + len(after.tokens[0]) - 1)
    cut = decode_texts(close, attached, phi, texts[:1], 4, 0)
    assert (cut.texts, cut.ended, cut.correct.tolist()) == (after.texts[:1], (False,), [False])

    short = replace(texts[0], prompt="so")
    alone = answer_texts(close, attached, theta, [short.prompt], 4, 0)
    beside = answer_texts(close, attached, theta, [short.prompt, texts[0].prompt], 4, 0)
    assert beside.tokens[0] == alone.tokens[0]
    assert len(alone.tokens[0]) > len(beside.tokens[1])

    signs = stack_signs([draw_signs(phi, 0, 1)])
    with attached.using(phi, signs) as model, torch.no_grad():
        prompt = label(base, phi.config.template, texts[:1])[0].question.prompt
        logits = model(torch.tensor([[*prompt, *after.tokens[0]]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    whole = logits.gather(-1, torch.tensor(after.tokens[0])[:, None]).sum()
    assert after.log_probs[1, 0].item() == pytest.approx(whole.item(), abs=1e-3)
    assert torch.allclose(after.judged.logits, text_logits(after.log_probs))


def test_examples_of_both_kinds_are_refused(base: BaseModel, attached: Attached, theta: Posterior) -> None:
    examples = rule_task(1).examples[:2]
    with pytest.raises(InvalidExamples, match=r"examples\[1\] has none") as refused:
        adapt(base, attached, theta, [examples[0], examples[1].as_free_text()], INNER)
    assert refused.value.field == "examples[1].options"


def test_an_episode_may_have_no_options() -> None:
    drawn = [
        sample_episode([rule_task(0)], EpisodeConfig(free_text=0.5, shots=(4,)), random.Random(seed))
        for seed in range(40)
    ]
    kinds = [{e.is_free_text for e in (*episode.support, *episode.query)} for episode in drawn]
    assert all(len(kind) == 1 for kind in kinds)
    assert 10 < sum(True in kind for kind in kinds) < 30
    plain = sample_episode([rule_task(0)], EpisodeConfig(shots=(4,)), random.Random(3))
    assert {e.text for e in plain.query} == {"yes", "no"}


def predictions(family: str, shots: int, logits: list[float], correct: list[bool]) -> TextPredictions:
    """Answers whose probabilities have these log-odds."""
    probabilities = torch.tensor(logits).double().sigmoid()
    task = rule_task(0)
    texts = tuple("yes" for _ in logits)
    asked = tuple(Question((0,), ((1,),)) for _ in logits)
    decoded = DecodedTexts(texts, asked, probabilities.log()[None], tuple(True for _ in logits), torch.tensor(correct))
    return TextPredictions(type(task)(family, family, "c", task.examples, True), shots, decoded)


def test_calibration_and_measures_of_texts_are_the_libraries() -> None:
    generator = torch.Generator().manual_seed(0)
    group: list[TextPredictions] = []
    for family in "abcd":
        logits = 2 * torch.randn(60, generator=generator)
        right = torch.rand(60, generator=generator) < torch.sigmoid(0.5 * logits - 1)
        group.append(predictions(family, 4, logits.tolist(), right.tolist()))
    (entry,) = fit_text_calibration(group)
    assert (entry.shots, entry.questions) == (4, 240)
    assert entry.ece_after < entry.ece_before / 2
    assert entry.slope == pytest.approx(0.5, abs=0.2)
    calibration = Calibration(by_shots=[], texts=[entry], fitted_on=["a"], draws=1)
    for used in (None, calibration):
        scores = score_texts(group, used)
        sure = [entry.confidence(i.answers.judged.logits) if used else i.answers.judged.logits.sigmoid() for i in group]
        losses = [float(log_loss(i.answers.correct, c, labels=[0, 1])) for i, c in zip(group, sure, strict=True)]
        squares = [float(brier_score_loss(i.answers.correct, c)) for i, c in zip(group, sure, strict=True)]
        assert scores.nll == pytest.approx(sum(losses) / 4)
        assert scores.brier == pytest.approx(sum(squares) / 4)
    threshold = entry.risk["0.25"]
    wrong = [(entry.confidence(i.answers.judged.logits) > threshold) & ~i.answers.correct for i in group]
    assert (sum(part.double().mean().item() for part in wrong) + 1) / 5 <= 0.25 + 1e-9


def judged(family: str, slope: float, offset: float) -> TextPredictions:
    """Answers that are right with these log-odds of their own."""
    generator = torch.Generator().manual_seed(ord(family))
    logits = 2 * torch.randn(80, generator=generator)
    right = torch.rand(80, generator=generator) < torch.sigmoid(slope * logits + offset)
    return predictions(family, 4, logits.tolist(), right.tolist())


def test_the_error_after_calibration_is_of_families_whose_texts_it_was_not_fitted_to() -> None:
    steep, flat = judged("a", 2.0, 1.0), judged("b", 0.2, -1.0)
    confidence = [
        fit_texts([other.answers.judged]).confidence(own.answers.judged.logits)
        for own, other in ((steep, flat), (flat, steep))
    ]
    right = torch.cat([steep.answers.correct, flat.answers.correct])
    (entry,) = fit_text_calibration([steep, flat])
    assert entry.ece_after == pytest.approx(expected_calibration_error(torch.cat(confidence), right))
    of_all = [entry.confidence(item.answers.judged.logits) for item in (steep, flat)]
    assert entry.ece_after > expected_calibration_error(torch.cat(of_all), right) + 0.05


def test_a_family_counts_once_in_the_confidence_of_texts_whatever_its_number_of_tasks() -> None:
    steep, flat = judged("a", 2.0, 1.0), judged("b", 0.2, -1.0)
    again = replace(steep, task=replace(steep.task, name="again"))
    group = [steep, flat, again]
    (entry,) = fit_text_calibration(group)
    texts = [item.answers.judged for item in group]
    assert (entry.slope, entry.offset) == pytest.approx(tuple(fit_texts(texts, [1, 2, 1]).model_dump().values()))
    assert entry.slope != pytest.approx(fit_texts(texts).slope, rel=0.05)


def test_texts_are_predicted_at_every_number_of_shots_and_a_task_gets_their_calibration(
    base: BaseModel, attached: Attached, theta: Posterior
) -> None:
    found = predict_texts(base, attached, theta, [rule_task(0)], INNER, CONFIG)
    assert [(item.shots, len(item.answers.texts)) for item in found] == [(0, 12), (8, 12)]
    entry = TextCalibration(shots=8, slope=0.5, offset=0.0, accuracy=0.5, ece_before=0.1, ece_after=0.1, questions=9)
    calibration = Calibration(by_shots=[], texts=[entry], fitted_on=["a"], draws=4)
    texts = [example.as_free_text() for example in rule_task(0).examples[:3]]
    _, own = adapt_and_calibrate(base, attached, theta, texts, INNER.with_steps(1), calibration)
    assert own is not None
    assert own.texts == [entry.model_copy(update={"shots": 3})]
    examples = rule_task(0).examples[:3]
    assert adapt_and_calibrate(base, attached, theta, examples, INNER.with_steps(1), calibration)[1] is None
    assert Example("p", ("a", "b"), 1).as_free_text() == Example("p", ("b",), 0)


def test_every_score_of_a_text_is_one_number_an_answer_and_the_table_has_a_row_for_each(
    base: BaseModel, attached: Attached, theta: Posterior, tmp_path: Path
) -> None:
    config = EvalConfig(shots=(8,), queries=6, draws=BUDGET)
    part = [score_task(base, attached, theta, rule_task(n), 8, INNER, config) for n in (0, 1)]
    of_world = score_task(base, attached, theta, World().tasks(1, 3)[0], 8, INNER, config)
    assert set(of_world.scores) - set(part[0].scores) == {"exact Bayes"}
    first = part[0]
    assert all(score.shape == (6,) and score.isfinite().all() for score in first.scores.values())
    told, whole = first.told, first.scores["sequence probability of the mean"]
    for at, log_probs in enumerate(told["greedy_log_likelihoods"]):
        assert first.scores["perplexity of the mean"][at].item() == pytest.approx(sum(log_probs) / len(log_probs))
        assert text_logits(torch.tensor([[sum(log_probs)]])).item() == pytest.approx(whole[at].item())
        assert all(0 <= entropy < 20 for entropy in told["entropy"][at])
        assert len(told["sample_texts"][at]) == len(told["sample_log_probs"][at]) == BUDGET
    shares = first.scores["self-consistency"] * BUDGET
    assert torch.equal(shares, shares.round())
    right = torch.tensor([True, False, True, False, True, False])
    mixed = [type(item)(item.task, right, item.scores, item.told) for item in part]
    rows = rows_of(mixed, mixed)
    assert {row["score"] for row in rows} == first.scores.keys()
    assert draw(rows, tmp_path).stat().st_size > 10_000
    table = markdown(rows, resamples=100).splitlines()
    assert len(table) == 2 + len(first.scores)
    with pytest.raises(AbmllError, match="lm_polygraph"):
        with_polygraph(part, sys.executable)
