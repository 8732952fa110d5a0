"""Questions after a kept beginning, beside the same questions whole."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from abmll.beginnings import read_beginning, reuses_beginnings
from abmll.draw_scores import score_draws, under_draws
from abmll.draws import draw_signs, stack_signs
from abmll.layers import attach
from abmll.scoring import Question, option_scores, pack
from tests.abmll.conftest import ARCHITECTURES, random_posterior, tiny_model

BEGINNING = (5, 9, 33, 71, 14, 3)
QUESTIONS = [
    Question((*BEGINNING, 2), ((2,), (7,))),
    Question((*BEGINNING, 71, 14, 3, 6), ((2, 3), (2, 4, 5), (40,))),
]


@pytest.mark.parametrize("layers", ["all", "last"])
@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "gemma2"])
def test_scores_after_a_kept_beginning_are_those_of_the_whole(architecture: str, layers: str) -> None:
    targets = ARCHITECTURES[architecture]
    attached = attach(tiny_model(architecture), targets, layers)
    posterior = random_posterior(attached, "kronecker", targets, 1)
    assert reuses_beginnings(attached, posterior)
    signs = stack_signs([draw_signs(posterior, 7, index) for index in range(3)])
    kept = read_beginning(attached, posterior, signs, BEGINNING)
    assert kept.layers[0][0].shape[0] == (1 if layers == "last" else 3)  # the trunk has one for all draws
    rest = [replace(question, prompt=question.prompt[len(BEGINNING) :]) for question in QUESTIONS]

    def score(model: Any, batch: Any, draws: int) -> Tensor:
        with torch.no_grad():
            return option_scores(model, batch, "mean", draws, kept.before(len(rest)))

    for _ in range(2):  # what is kept is not used up
        found = under_draws(attached, posterior, signs, pack(rest, before=len(BEGINNING)), score).view(3, 2, -1)
        expected = score_draws(attached, posterior, QUESTIONS, range(3), 7, normalize="mean")
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("change", [{"sliding_window": 32}, {"layer_types": ["linear_attention", "full_attention"]}])
def test_models_whose_tokens_see_a_part_of_what_came_before_keep_nothing(change: dict[str, Any]) -> None:
    model = tiny_model("mistral")
    attached = attach(model, ("q_proj",))
    for name, value in change.items():
        setattr(model.config, name, value)
    assert not reuses_beginnings(attached, random_posterior(attached, "kronecker", ("q_proj",), 1))


def test_a_model_that_keeps_nothing_is_told() -> None:
    model = tiny_model("llama")
    inner = model.model.forward
    model.model.forward = lambda **given: inner(**{k: v for k, v in given.items() if k != "past_key_values"})
    attached = attach(model, ("q_proj",))
    assert not reuses_beginnings(attached, random_posterior(attached, "kronecker", ("q_proj",), 1))
