from __future__ import annotations

import pytest
import torch
from torch import Tensor

from abmll.adaptive import Scatter, draws_needed, fit_scatter, settled, stages
from abmll.predictive import predictive

MOST, TOLERANCE = 16, 0.02
USUAL = Scatter(within=0.1, curvature=0.5)


def questions(count: int, noise: float, seed: int) -> Tensor:
    """Scores under mirrored draws, shape (draws, questions, 3): noise that cancels in a pair but for its square."""
    generator = torch.Generator().manual_seed(seed)
    centre = 1.5 * torch.randn(count, 3, generator=generator)
    size = noise * torch.rand(count, 1, generator=generator) * 2
    half = size * torch.randn(MOST // 2, count, 3, generator=generator)
    return centre + torch.stack([half, -half], dim=1).flatten(0, 1)


@pytest.mark.parametrize("noise", [0.1, 0.4, 0.8])
def test_what_is_settled_stays_as_often_as_promised(noise: float) -> None:
    scatter = fit_scatter([questions(300, noise, 0)], [1.0])
    assert scatter is not None
    scores = questions(400, noise, 1)
    whole = predictive(scores)
    within = same = total = 0
    for number in range(scores.shape[1]):
        own = scores[:, number]
        count = draws_needed(own, 1.0, TOLERANCE, scatter)
        total += count
        part = predictive(own[:count])
        within += abs(part.confidence - whole.confidence[number]).item() <= TOLERANCE
        same += bool(part.answer == whole.answer[number])
    print(f"noise {noise}: {total / 400:.1f} of {MOST} draws, {within / 4:.1f} % within, {same / 4:.1f} % same answer")
    assert within >= 0.93 * 400  # 95 % is promised
    assert same >= 0.98 * 400
    if noise == 0.1:
        assert total / 400 < MOST / 3


def test_a_question_that_scatters_more_than_others_takes_more_draws() -> None:
    scatter = fit_scatter([questions(300, 0.1, 0)], [1.0])
    assert scatter is not None
    means = [
        sum(draws_needed(scores[:, n], 1.0, TOLERANCE, scatter) for n in range(60)) / 60
        for scores in (questions(60, 0.1, 2), questions(60, 1.2, 2))
    ]
    assert means[1] > 2 * means[0]


@pytest.mark.parametrize("options", [2, 8])
def test_an_answer_that_leads_little_is_kept_as_often_as_promised(options: int) -> None:
    """Questions on which two options are almost as likely: the answer is what further draws could change."""
    generator = torch.Generator().manual_seed(options)
    centre = torch.zeros(600, options)
    centre[:, 0] = 0.04 * torch.rand(600, generator=generator)
    half = 0.25 * torch.randn(MOST // 2, 600, options, generator=generator)
    scores = centre + torch.stack([half, -half], dim=1).flatten(0, 1)
    scatter = fit_scatter([scores[:, :200]], [1.0])
    assert scatter is not None
    whole = predictive(scores)
    counts = [draws_needed(scores[:, n], 1.0, TOLERANCE, scatter) for n in range(200, 600)]
    kept = [
        bool(predictive(scores[:count, n]).answer == whole.answer[n])
        for n, count in zip(range(200, 600), counts, strict=True)
    ]
    print(f"{options} options: {sum(counts) / 400:.1f} of {MOST} draws, {sum(kept) / 4:.1f} % same answer")
    assert sum(kept) >= 0.95 * 400
    assert sum(counts) / 400 < MOST


def test_ties_and_single_draws_settle_nothing() -> None:
    tie = torch.tensor([[1.0, 1.0]]).expand(8, 2)
    assert not settled(tie, 1.0, 16, 0.1, USUAL)
    clear = torch.tensor([[3.0, -3.0]]).expand(8, 2)
    assert settled(clear, 1.0, 16, 0.01, USUAL)
    assert settled(clear[:2], 1.0, 16, 0.01, USUAL)
    assert not settled(clear[:1], 1.0, 16, 0.01, USUAL)
    assert not settled(clear[:2], 1.0, 16, 0.0, USUAL)
    assert fit_scatter([clear[:2, None]], [1.0]) is None
    near = predictive(clear[:, None]).confidence.item()
    assert not settled(clear, 1.0, 16, 0.01, USUAL, threshold=near)
    assert settled(clear, 1.0, 16, 0.01, USUAL, threshold=0.5)


def test_stages_double_up_to_all_draws_each_taken_once() -> None:
    assert [stage.stop for stage in stages(16)] == [2, 4, 8, 16]
    for most in (1, 2, 3, 7, 12):
        assert [index for stage in stages(most) for index in stage] == list(range(most))


def test_a_last_draw_without_its_mirror_image_still_counts() -> None:
    doubtful = torch.tensor([[0.5, 0.0], [-0.2, 0.0]])
    assert not settled(doubtful, 1.0, 3, 0.0, USUAL)
