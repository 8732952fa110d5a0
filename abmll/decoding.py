"""How transformers decodes a text: which token comes next, and where the text ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from abmll.sampling import COLDEST, Sampling

# A stop string of so many characters lies in so many of the last tokens: four bytes each, a token each.
_TOKENS_OF_CHARACTER = 4

Tell = Callable[[int, int, float], None]


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


class _Unwanted(StoppingCriteria):
    """Ends the rows whose texts nobody wants any more."""

    def __init__(self, unwanted: Callable[[int], bool]) -> None:
        self.unwanted = unwanted

    def __call__(self, input_ids: Tensor, scores: Any, **more: Any) -> Any:
        """Tells which rows end, shape (rows,)."""
        ended = [self.unwanted(row) for row in range(len(input_ids))]
        return torch.tensor(ended, dtype=torch.bool, device=input_ids.device)


class GumbelNoise(LogitsProcessor):
    """Makes greedy decoding sample, each row by a seed of its own, whatever else is in the batch.

    The token with the largest sum of logit and Gumbel noise is a sample of the softmax (Maddison et al. 2014).

    Args:
        sampling: Temperature, above 0, and top_p.
        seeds: One a row.
        device: Where the logits are.
    """

    def __init__(self, sampling: Sampling, seeds: Sequence[int], device: Any) -> None:
        self.sampling = sampling
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Any:
        """Returns logits plus noise, shape (rows, vocabulary); -inf for tokens that are not to be chosen."""
        logits = scores.float() / max(self.sampling.temperature, COLDEST)
        if self.sampling.top_p < 1:
            ordered, places = logits.sort(dim=-1, descending=True)
            each = ordered.softmax(dim=-1)
            outside = each.cumsum(dim=-1) - each >= self.sampling.top_p
            logits = logits.scatter(-1, places, ordered.masked_fill(outside, float("-inf")))
        noise = [
            torch.empty_like(row).exponential_(generator=g) for row, g in zip(logits, self.generators, strict=True)
        ]
        return logits - torch.stack(noise).log()


class _Teller(LogitsProcessor):
    """Keeps each step's log-probabilities until the tokens are chosen, then tells both; a row that has ended no more.

    Args:
        tell: Told of row, token and log-probability.
        ends: Tokens that end a text; they are not told.
    """

    def __init__(self, tell: Tell, ends: Sequence[int]) -> None:
        self.tell, self.ends = tell, set(ends)
        self.ended: set[int] = set()
        self.log_probs = torch.zeros(0)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Any:
        """Keeps what ``scores``, shape (rows, vocabulary), say and returns them as they are."""
        self.log_probs = scores.float().log_softmax(dim=-1)
        return scores

    def chosen(self, tokens: Sequence[int]) -> None:
        """Tells one step's tokens, one a row."""
        for row, token in enumerate(tokens):
            if token in self.ends:
                self.ended.add(row)
            if row not in self.ended:
                self.tell(row, token, self.log_probs[row, token].item())


class _Stream(BaseStreamer):
    """Hands a teller what transformers has chosen; the prompts, which come first, are left out."""

    def __init__(self, teller: _Teller) -> None:
        self.teller, self.prompts = teller, True

    def put(self, value: Tensor) -> None:
        """Takes one step's tokens, shape (rows,)."""
        if not self.prompts:
            self.teller.chosen(value.tolist())
        self.prompts = False

    def end(self) -> None:
        """Decoding has ended."""


def decode(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    draws: Sequence[int | None] = (),
    tell: Tell | None = None,
    unwanted: Callable[[int], bool] | None = None,
) -> list[list[int]]:
    """Decodes prompts in one batch, padded on the left; each text ends before a token that ends texts.

    After a stop string more tokens may follow, until the longest text is done.

    Args:
        model: A causal language model of transformers, perhaps with a posterior attached.
        tokenizer: Its tokenizer.
        prompts: Token ids of each row's prompt.
        sampling: How tokens are chosen, and where a text ends.
        draws: The draw that each row is under, for its seed; not needed at temperature 0.
        tell: Told of each token of a text as it comes: row, token, and its log-probability in nats before temperature.
        unwanted: Whether nobody wants a row's text any more; it ends at the next token.
    """
    device = next(model.parameters()).device
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    ends = end_tokens(model, tokenizer)
    processors = LogitsProcessorList()
    teller = None if tell is None else _Teller(tell, ends)
    if teller is not None:
        processors.append(teller)
    if sampling.temperature > 0:
        processors.append(GumbelNoise(sampling, [sampling.seed_of(draw) for draw in draws], device))
    criteria = StoppingCriteriaList()
    if sampling.stop:
        criteria.append(StopStrings(tokenizer, sampling.stop, width))
    if unwanted is not None:
        criteria.append(_Unwanted(unwanted))
    output = model.generate(
        ids.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=sampling.max_tokens,
        do_sample=False,
        logits_processor=processors,
        stopping_criteria=criteria or None,
        streamer=None if teller is None else _Stream(teller),
        pad_token_id=tokenizer.pad_token_id or 0,
        eos_token_id=ends or None,
        temperature=None,
        top_p=None,
        top_k=None,
    )
    return [until_end(row, ends) for row in output[:, width:].tolist()]


def with_end(tokens: Sequence[int], tokenizer: Any, sampling: Sampling) -> list[int]:
    """The tokens of a text that no stop string ended, with the one that ends texts where the model gave it."""
    end: int | None = tokenizer.eos_token_id
    return [*tokens, end] if end is not None and len(tokens) < sampling.max_tokens else list(tokens)


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Ids of the tokens that end a text, by model and tokenizer."""
    given = getattr(model.generation_config, "eos_token_id", None)
    ends = set(given if isinstance(given, list) else [given]) | {tokenizer.eos_token_id}
    return sorted(end for end in ends if end is not None)


def until_end(tokens: Sequence[int], ends: Sequence[int]) -> list[int]:
    """The tokens before the first of ``ends``."""
    count = next((number for number, token in enumerate(tokens) if token in ends), len(tokens))
    return list(tokens[:count])
