from __future__ import annotations

import pytest
import torch
from scipy.stats import t as student
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


# Two mirrored pairs. Of the first option: means 0.50 and 0.51, half-differences 0.10 and 0.03; of its lead over the
# second: means 0.25 and 0.23, half-differences 0.15 and 0.05.
PAIRS = torch.tensor([[0.60, 0.20, 0.20], [0.40, 0.30, 0.30], [0.54, 0.26, 0.20], [0.48, 0.30, 0.22]]).log()
VARIANCE = 0.505 * 0.495
# Mean square of the half-differences, with what is usual as 8 pairs more.
HALVES = (8 * USUAL.within**2 * VARIANCE + 0.10**2 + 0.03**2) / (8 + 2)
LEFT = 1 / 2 - 2 / MOST


def moves() -> float:
    pooled = (8 * (USUAL.curvature * HALVES / VARIANCE) ** 2 + (0.51 - 0.50) ** 2 / 2) / 9
    return float(student.ppf(0.975, 9)) * (pooled * LEFT) ** 0.5


def test_the_confidence_moves_by_a_t_quantile_of_what_its_pairs_scatter_and_what_is_usual() -> None:
    assert settled(PAIRS, 1.0, MOST, 1.001 * moves(), USUAL)
    assert not settled(PAIRS, 1.0, MOST, 0.999 * moves(), USUAL)


@pytest.mark.parametrize("side", [-1, 1])
def test_a_threshold_within_reach_of_the_confidence_is_not_settled(side: int) -> None:
    assert settled(PAIRS, 1.0, MOST, 1.0, USUAL, threshold=0.505 + side * 1.001 * moves())
    assert not settled(PAIRS, 1.0, MOST, 1.0, USUAL, threshold=0.505 + side * 0.999 * moves())


def test_an_answer_is_settled_while_its_lead_is_beyond_what_the_leads_scatter_by() -> None:
    lead, own = (0.25 + 0.23) / 2, (0.25 - 0.23) ** 2 / 2
    # Squared ratio of half-differences; that it is at most 2 counts as one pair.
    squared_ratio = (4 + 2 * (0.15**2 + 0.05**2) / (0.10**2 + 0.03**2)) / (1 + 2)
    pooled = (lead / float(student.ppf(0.95, 9))) ** 2 / LEFT
    usual = (9 * pooled - own) / 8 / squared_ratio
    curvature = VARIANCE * usual**0.5 / HALVES
    assert settled(PAIRS, 1.0, MOST, 1.0, Scatter(within=USUAL.within, curvature=0.999 * curvature))
    assert not settled(PAIRS, 1.0, MOST, 1.0, Scatter(within=USUAL.within, curvature=1.001 * curvature))
