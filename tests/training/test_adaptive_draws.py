"""Adaptive draws on tasks of the benchmark, with the embedded model."""

from __future__ import annotations

import random

import torch

from abmll.adaptive import draws_needed, fit_scatter
from abmll.calibration import fit_temperature_prior
from abmll.draw_scores import score_draws
from abmll.layers import attach
from abmll.metrics import expected_calibration_error
from abmll.predictive import predictive
from abmll.store import load_posterior
from training.adaptation import AdaptConfig, run_inner
from training.base_model import load_base
from training.benchmark.world import World
from training.embedded import POSTERIOR, resolve
from training.episodes import draw_support, label

MOST, TOLERANCE = 16, 0.02


def test_answers_and_calibration_are_those_of_all_draws() -> None:
    base, stored = load_base(resolve(None)), load_posterior(POSTERIOR)
    attached, theta = attach(base.model, stored.posterior.config.targets), stored.posterior
    inner = AdaptConfig.from_record(stored.record.training)
    scores: list[torch.Tensor] = []
    answers: list[torch.Tensor] = []
    for task in World().tasks(12, seed=11):
        support, query = draw_support(task, 8, random.Random(0))
        labelled, asked = (label(base, theta.config.template, part) for part in (support, query[:32]))
        phi = run_inner(attached, theta, labelled, inner, torch.Generator().manual_seed(0)).phi
        scores.append(score_draws(attached, phi, [item.question for item in asked], range(MOST), 0))
        answers.append(torch.tensor([item.answer for item in asked]))
    temperature = fit_temperature_prior([None] * 6, list(zip(scores[:6], answers[:6], strict=True))).median
    scatter = fit_scatter([item[:8] for item in scores[:6]], [temperature] * 6)  # as calibration: of 8 draws
    assert scatter is not None
    tested, right = torch.cat(scores[6:], dim=1), torch.cat(answers[6:])
    whole = predictive(tested, temperature)
    counts: list[int] = []
    adaptive: list[torch.Tensor] = []
    for number in range(tested.shape[1]):
        count = draws_needed(tested[:, number], temperature, TOLERANCE, scatter)
        counts.append(count)
        adaptive.append(predictive(tested[:count, number], temperature).probabilities)
    probabilities = torch.stack(adaptive)
    confidence, answer = probabilities.max(dim=-1)
    moved = (confidence - whole.confidence).abs()
    ece = [
        expected_calibration_error(c, a == right) for c, a in ((confidence, answer), (whole.confidence, whole.answer))
    ]
    mean = sum(counts) / len(counts)
    print(
        f"temperature {temperature:.2f}: {mean:.2f} of {MOST} draws; "
        f"same answer {(answer == whole.answer).double().mean():.3f}; "
        f"moved by more than {TOLERANCE}: {(moved > TOLERANCE).double().mean():.3f}; "
        f"ECE {ece[0]:.3f}, of all draws {ece[1]:.3f}"
    )
    assert mean < 0.8 * MOST
    assert (answer == whole.answer).double().mean() >= 0.98
    assert (moved <= TOLERANCE).double().mean() >= 0.93
    assert abs(ece[0] - ece[1]) < 0.02
