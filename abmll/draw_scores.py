"""Option scores of many questions under several draws of one posterior, with a transformers model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from abmll.draws import Signs, draw_signs, stack_signs
from abmll.layers import Attached
from abmll.posterior import Normalize, Posterior
from abmll.scoring import Batch, Question, option_scores, pack


def rows_of_draws(signs: dict[str, Signs], rows: int, device: torch.device) -> dict[str, Signs]:
    """Repeats stacked signs for a draw-major batch: (draws, d) to (draws * rows, d)."""
    return {name: each.map(lambda tensor: tensor.to(device).repeat_interleave(rows, 0)) for name, each in signs.items()}


def under_draws(
    attached: Attached,
    posterior: Posterior,
    signs: dict[str, Signs],
    batch: Batch,
    function: Callable[[nn.Module, Batch, int], Tensor],
) -> Tensor:
    """Applies a function of the model to a batch under several draws; the trunk, where there is one, runs once.

    Args:
        attached: The model.
        posterior: On the model's device.
        signs: Stacked signs of the draws.
        batch: The packed questions, on the model's device.
        function: Of the model, a batch, and how often the model runs that over.

    Returns:
        Values, draw-major.
    """
    draws, rows = len(next(iter(signs.values())).u), len(batch.ids)
    repeated = rows_of_draws(signs, rows, batch.ids.device)
    if attached.shares_trunk:
        with attached.using(posterior, repeated, draws) as model:
            return function(model, batch, draws)
    with attached.using(posterior, repeated) as model:
        return function(model, batch.repeat(draws), 1)


@torch.inference_mode()
def score_draws(
    attached: Attached,
    posterior: Posterior,
    questions: Sequence[Question],
    draws: Sequence[int],
    seed: int,
    *,
    normalize: Normalize | None = None,
    max_tokens: int = 4096,
) -> Tensor:
    """Scores every option of every question under each draw.

    Args:
        attached: The model.
        posterior: On the model's device.
        questions: Any number of them.
        draws: Indices of the draws, as in ``draw_signs``; empty for the posterior mean alone.
        seed: Seed of the draws.
        normalize: How scores treat length; as the posterior was trained by default.
        max_tokens: Padded tokens in one forward pass, over all draws.

    Returns:
        Scores in nats, shape (draws, questions, options) on the CPU; one "draw" for the mean.
    """
    device = next(attached.model.parameters()).device
    width = max(len(question.options) for question in questions)
    stacked = stack_signs([draw_signs(posterior, seed, index) for index in draws]) if draws else None
    times = max(1, len(draws))
    result = torch.full((times, len(questions), width), float("-inf"))
    order = sorted(range(len(questions)), key=lambda i: questions[i].packed)
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and (stop + 1 - start) * times * questions[order[stop]].packed <= max_tokens:
            stop += 1
        chosen = order[start:stop]
        batch = pack([questions[i] for i in chosen]).to(device)

        def score(model: nn.Module, batch: Batch, draws: int) -> Tensor:
            return option_scores(model, batch, normalize or posterior.config.normalize, draws).cpu()

        if stacked is None:
            with attached.using(posterior) as model:
                scores = score(model, batch, 1)
        else:
            scores = under_draws(attached, posterior, stacked, batch, score)
        result[:, chosen, : scores.shape[-1]] = scores.view(times, len(chosen), -1)
        start = stop
    return result
