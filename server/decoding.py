"""Where a text that transformers decodes ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

# A stop string of so many characters lies in so many of the last tokens: four bytes each, a token each.
_TOKENS_OF_CHARACTER = 4


class StopStrings(StoppingCriteria):
    """Ends a row once its new text, not its prompt, holds one of several strings.

    Args:
        tokenizer: The base model's.
        stop: The strings.
        width: Tokens of the padded prompts.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], width: int) -> None:
        self.tokenizer, self.stop, self.width = tokenizer, stop, width
        self.tail = 1 + _TOKENS_OF_CHARACTER * max(map(len, stop))

    def __call__(self, input_ids: Tensor, scores: Any, **more: Any) -> Any:
        """Tells which rows end, shape (rows,)."""
        first = max(self.width, input_ids.shape[1] - self.tail)
        texts = self.tokenizer.batch_decode(input_ids[:, first:], skip_special_tokens=True)
        ended = [any(string in text for string in self.stop) for text in texts]
        return torch.tensor(ended, dtype=torch.bool, device=input_ids.device)


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Ids of the tokens that end a text, by model and tokenizer."""
    given = getattr(model.generation_config, "eos_token_id", None)
    ends = set(given if isinstance(given, list) else [given]) | {tokenizer.eos_token_id}
    return sorted(end for end in ends if end is not None)


def until_end(tokens: Sequence[int], ends: Sequence[int]) -> list[int]:
    """The tokens before the first of ``ends``."""
    count = next((number for number, token in enumerate(tokens) if token in ends), len(tokens))
    return list(tokens[:count])
