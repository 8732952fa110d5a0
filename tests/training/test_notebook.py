"""The notebook's way: load, adapt, predict, look."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import matplotlib.image
import pandas as pd
import pytest
import torch
from matplotlib.patches import Rectangle

import abmll
from abmll.errors import AbmllError, InvalidExamples, InvalidRequest
from abmll.predictive import predictive
from training.notebook import LoadedPosterior

OPTIONS = ["lights", "music"]
EXAMPLES = [
    {"prompt": f"{verb} the {what}", "options": OPTIONS, "answer": answer}
    for verb in ("turn on", "I want", "please stop")
    for what, answer in (("lamp", "lights"), ("song", "music"))
]


@pytest.fixture(scope="module")
def posterior() -> LoadedPosterior:
    return abmll.load()


@pytest.fixture(scope="module")
def task(posterior: LoadedPosterior) -> LoadedPosterior:
    return posterior.adapt(EXAMPLES, task="home")


def test_a_taught_task_answers_and_knows_how_sure_it_is(posterior: LoadedPosterior, task: LoadedPosterior) -> None:
    questions = ["switch off the lamp", "play a song"]
    before, after = posterior.predict(questions, OPTIONS), task.predict(questions, OPTIONS)
    assert [item.answer for item in after] == OPTIONS
    assert all(b.confidence < a.confidence <= 1 for b, a in zip(before, after, strict=True))
    for item in after:
        assert item.calibrated
        assert item.probabilities is not None
        assert sum(item.probabilities) == pytest.approx(1)
        assert max(item.probabilities) == item.confidence
        assert item.total == pytest.approx(item.aleatoric + item.epistemic)
        assert item.answer in (item.prediction_set or ())


def test_it_is_saved_and_loaded_as_it_was(task: LoadedPosterior, tmp_path: Path) -> None:
    task.save(tmp_path / "home")
    again = abmll.load(tmp_path / "home")
    assert again.record.task == "home"
    asked = "switch off the lamp"
    assert again.predict(asked, OPTIONS)[0] == task.predict(asked, OPTIONS)[0]


def test_a_mixture_is_adapted_saved_and_asked_under_all_its_members(posterior: LoadedPosterior, tmp_path: Path) -> None:
    inner = posterior.record.training["inner"] | {"members": 3, "factor_rate": 0.0, "steps": 2}
    several = replace(posterior, record=posterior.record.model_copy(update={"training": {"inner": inner}}))
    mixed = several.adapt(EXAMPLES, task="home")
    assert mixed.posterior.config.members == 3
    mixed.save(tmp_path / "home")
    again = abmll.load(tmp_path / "home")
    for draws, taken in ((1, 6), (6, 6), (7, 12)):
        (found,) = again.predict("switch off the lamp", OPTIONS, draws=draws)
        assert found.draws == taken
        assert found == mixed.predict("switch off the lamp", OPTIONS, draws=taken)[0]


def test_a_frame_teaches_and_answers_come_as_one(posterior: LoadedPosterior, task: LoadedPosterior) -> None:
    frame = pd.DataFrame(EXAMPLES)
    assert posterior.adapt(frame, task="home").posterior.digest() == task.posterior.digest()
    answers = task.predict(["one lamp", "one song", "both"], [OPTIONS, OPTIONS, [*OPTIONS, "neither"]])
    table = answers.frame()
    assert list(table["answer"]) == [item.answer for item in answers]
    assert [len(row) for row in table["probabilities"]] == [2, 2, 3]
    assert table["probabilities"].map(sum).tolist() == pytest.approx([1, 1, 1])


def test_free_text_is_taught_and_answered(posterior: LoadedPosterior) -> None:
    texts = [{"prompt": example["prompt"], "answer": example["answer"]} for example in EXAMPLES]
    task = posterior.adapt(texts, task="words")
    (item,) = task.predict("turn on the lamp")
    assert item.answer == "lights"
    assert item.calibrated
    assert item.options is None
    assert item.finish == "end"
    assert 0 < item.confidence < 1
    untaught, *_ = posterior.predict("turn on the lamp", max_tokens=3)
    assert (untaught.finish, untaught.calibrated) == ("length", False)
    assert len(posterior.predict("turn on the lamp", max_tokens=12)[0].answer) > len(untaught.answer)
    with pytest.raises(InvalidRequest, match="max_tokens is 0"):
        task.predict("turn on the lamp", max_tokens=0)
    # As a row of a frame with options elsewhere has none: NaN.
    mixed = pd.DataFrame(texts).assign(options=float("nan"))
    assert posterior.adapt(mixed, task="words").posterior.digest() == task.posterior.digest()


@pytest.mark.parametrize("count", [1, 3, 9])
def test_answers_draw_themselves(task: LoadedPosterior, tmp_path: Path, count: int) -> None:
    answers = task.predict([f"lamp {number}" for number in range(count)], OPTIONS, draws=4)
    (tmp_path / "shown.png").write_bytes(answers._repr_png_())  # pyright: ignore[reportPrivateUsage] -- notebooks call it
    picture = matplotlib.image.imread(tmp_path / "shown.png")
    assert picture.shape[1] > 500
    assert picture[..., :3].min() < 0.2  # something dark is drawn
    patches = [patch for axes in answers.plot().axes for patch in axes.patches]
    widths = sorted(patch.get_width() for patch in patches if isinstance(patch, Rectangle))
    few = [p for item in answers for p in (item.probabilities or ())]
    told = few if count <= 6 else [item.confidence for item in answers]
    assert widths == pytest.approx(sorted(told))
    assert f"{count} answers of task 'home'" in repr(answers)


def test_what_cannot_be_is_said(posterior: LoadedPosterior, task: LoadedPosterior) -> None:
    with pytest.raises(AbmllError, match="adapt the one that `load` gave"):
        task.adapt(EXAMPLES)
    with pytest.raises(InvalidExamples, match=r"examples\[1\]"):
        posterior.adapt([EXAMPLES[0], {"prompt": "x", "options": OPTIONS, "answer": "neither"}])
    with pytest.raises(InvalidExamples, match="at least one"):
        posterior.adapt([])
    with pytest.raises(InvalidRequest, match="2 questions, but options for 1"):
        task.predict(["a", "b"], [OPTIONS])
    for prompts, options, says in (
        ([" "], OPTIONS, r"prompts\[0\] is blank"),
        ([1, 2], OPTIONS, r"prompts\[0\] is 1"),
        (None, OPTIONS, "prompts is None"),
        ("lamp", "yes", "options is 'yes'"),
        ("lamp", [1, 2], r"options\[0\]"),
        ("lamp", 5, "options is 5"),
        ("a\ud800", OPTIONS, r"prompts\[0\] is 'a.+whole characters"),
    ):
        with pytest.raises(InvalidRequest, match=says):
            task.predict(prompts, options)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidRequest, match="steps is 0"):
        posterior.adapt(EXAMPLES, steps=0)
    for seed in (-1, 1.5, "a", True, 2**53):
        with pytest.raises(InvalidRequest, match="seed is"):
            posterior.adapt(EXAMPLES, seed=seed)  # pyright: ignore[reportArgumentType]
        with pytest.raises(InvalidRequest, match="seed is"):
            task.predict("lamp", OPTIONS, seed=seed)  # pyright: ignore[reportArgumentType]
    for examples in (None, 3, ["x"], [("a", "b")]):
        with pytest.raises(InvalidExamples, match=r"a list of records|must be an object"):
            posterior.adapt(examples)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidExamples, match=r"'prompt' must be .+ there are 'sentence', 'answer'"):
        posterior.adapt([{"sentence": "x", "answer": "y"}])
    with pytest.raises(InvalidExamples, match=r"examples\[0\]: 'text' is no key of an example; name it 'prompt'"):
        posterior.adapt([{"text": "x", "answer": "y"}])
    with pytest.raises(InvalidExamples, match="a list of records"):
        posterior.adapt("examples.jsonl")  # pyright: ignore[reportArgumentType]
    with pytest.raises(AbmllError, match="device 'nonsense' cannot be used"):
        abmll.load(device="nonsense")
    with pytest.raises(InvalidRequest, match="draws is 0"):
        task.predict("lamp", OPTIONS, draws=0)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = abmll.lode


def test_standard_errors_are_those_of_mirrored_draws(task: LoadedPosterior, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.randn(8, 1, 2, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("training.notebook.score_draws", lambda *_: scores)
    (item,) = task.predict("turn on the lamp", OPTIONS)
    assert task.calibration is not None
    entry = task.calibration.nearest(len(EXAMPLES))
    assert entry is not None
    mirrored, independent = (predictive(scores[:, 0], entry.temperature, mirrored=m) for m in (True, False))
    assert item.standard_errors == pytest.approx(mirrored.standard_errors.tolist())
    assert item.standard_error == pytest.approx(mirrored.standard_error.item())
    assert item.standard_error != pytest.approx(independent.standard_error.item(), rel=0.01)
