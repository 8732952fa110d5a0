"""Keys and values of a beginning that questions share: read once under each draw, then kept."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from abmll.draw_scores import under_draws
from abmll.draws import Signs, draw_signs, stack_signs
from abmll.layers import Attached, same_values
from abmll.posterior import Posterior
from abmll.scoring import Batch, Question, option_scores, pack, sliding_window

logger = logging.getLogger(__name__)

_VARYING_ROPE = ("dynamic", "longrope")


@dataclass(frozen=True)
class Beginning:
    """What the model keeps of a prompt's first tokens, under several draws.

    Attributes:
        tokens: How many.
        layers: Keys and values of each block, shape (draws, heads, tokens, width); of the trunk's, (1, ...).
    """

    tokens: int
    layers: tuple[tuple[Tensor, Tensor], ...]

    def before(self, rows: int, draws: slice = slice(None)) -> DynamicCache:
        """Returns it as what stands before each of ``rows`` questions under each of some draws, draw-major."""

        def chosen(kept: Tensor) -> Tensor:
            return (kept if len(kept) == 1 else kept[draws]).repeat_interleave(rows, 0)

        cache = DynamicCache()
        for number, (keys, values) in enumerate(self.layers):
            cache.update(chosen(keys), chosen(values), number)
        return cache


@torch.inference_mode()
def read_beginning(
    attached: Attached, posterior: Posterior, signs: dict[str, Signs], tokens: Sequence[int]
) -> Beginning:
    """Reads the first tokens of prompts under several draws.

    Args:
        attached: The model.
        posterior: On the model's device.
        signs: Stacked signs of the draws.
        tokens: The tokens.

    Raises:
        NotImplementedError: The model keeps something else than keys and values.
    """
    device = next(attached.model.parameters()).device
    cache = DynamicCache()

    def run(model: nn.Module, batch: Batch, draws: int) -> Tensor:
        decoder = model.get_decoder()  # pyright: ignore[reportCallIssue] -- a transformers model's method
        given = {"input_ids": batch.ids, "position_ids": batch.positions}
        return decoder(**given, past_key_values=cache, use_cache=True).last_hidden_state

    under_draws(attached, posterior, signs, pack([Question(tuple(tokens), ())]).to(device), run)
    layers: list[tuple[Tensor, Tensor]] = []
    for layer in cache.layers:
        if not isinstance(layer, DynamicLayer) or layer.keys is None or layer.values is None:
            raise NotImplementedError(f"{type(layer).__name__} keeps no keys and values of each token")
        layers.append((layer.keys.clone(), layer.values.clone()))
    return Beginning(len(tokens), tuple(layers))


@torch.inference_mode()
def reuses_beginnings(attached: Attached, posterior: Posterior) -> bool:
    """Whether questions after a kept beginning score as they do whole; models differ in what they keep.

    Not where a token attends to the newest alone (sliding windows), or where positions depend on how many there are.
    """
    config = attached.model.config.get_text_config()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    if _windowed(config) or any(kind in str(getattr(config, "rope_parameters", "")) for kind in _VARYING_ROPE):
        return False
    device = next(attached.model.parameters()).device
    question = Question((1, 2, 3, 2, 1, 3), ((1, 2), (3,)))
    signs = stack_signs([draw_signs(posterior, 0, index) for index in range(2)])
    rest = replace(question, prompt=question.prompt[3:])

    def whole(model: nn.Module, batch: Batch, draws: int) -> Tensor:
        return option_scores(model, batch, "sum", draws)

    try:
        beginning = read_beginning(attached, posterior, signs, question.prompt[:3])

        def parted(model: nn.Module, batch: Batch, draws: int) -> Tensor:
            return option_scores(model, batch, "sum", draws, beginning.before(1))

        expected = under_draws(attached, posterior, signs, pack([question]).to(device), whole)
        found = under_draws(attached, posterior, signs, pack([rest], before=3).to(device), parted)
    except Exception as error:  # whatever a model's code does with keys and values that it does not expect
        logger.warning("beginnings that questions share are read anew each time: %s: %s", type(error).__name__, error)
        return False
    return same_values(found, expected, next(attached.model.parameters()).dtype)


def _windowed(config: Any) -> bool:
    window, kinds = sliding_window(config)
    # A window as wide as the context leaves nothing out.
    narrow = window is not None and window < config.max_position_embeddings
    return narrow or not set(kinds or ()) <= {"full_attention", "sliding_attention"}
