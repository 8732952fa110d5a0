"""Exact log-probabilities of answer options, all options of a question in one pass over its prompt.

A row holds the prompt's tokens once, then each option's tokens but the last; a mask lets an option see
the prompt and itself only, and its positions go on from the prompt's. The result is that of scoring
prompt + option one by one, at the cost of the prompt plus the options' inner tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from abmll.errors import InvalidRequest, PromptTooLong
from abmll.examples import Template
from abmll.posterior import Normalize

if TYPE_CHECKING:
    from transformers import Cache


class Tokenizer(Protocol):
    """What is needed of a transformers tokenizer."""

    pad_token_id: int | None
    eos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]:
        """Returns token ids."""
        ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = ...) -> str:
        """Returns the text of token ids."""
        ...


@dataclass(frozen=True)
class Question:
    """A tokenized question.

    Attributes:
        prompt: Token ids of the templated prompt.
        options: Token ids of each templated option; empty for free text.
    """

    prompt: tuple[int, ...]
    options: tuple[tuple[int, ...], ...]

    @property
    def longest(self) -> int:
        """Tokens of the prompt with its longest option."""
        return len(self.prompt) + max((len(option) for option in self.options), default=0)

    @property
    def packed(self) -> int:
        """Tokens of its row in a pass: the prompt, and each option but its last token."""
        return len(self.prompt) + sum(max(0, len(option) - 1) for option in self.options)


def tokenize(tokenizer: Tokenizer, template: Template, prompt: str, options: Sequence[str], context: int) -> Question:
    """Tokenizes a question; prompt and options apart, so that an option is always the same tokens.

    Args:
        tokenizer: The base model's tokenizer.
        template: The posterior's text format.
        prompt: The question.
        options: The answers; empty for free text.
        context: The most tokens the model takes.

    Raises:
        PromptTooLong: Prompt and longest option exceed ``context``.
    """
    ids = tuple(tokenizer.encode(template.prompt(prompt), add_special_tokens=True))
    encoded = tuple(tuple(tokenizer.encode(template.option(o), add_special_tokens=False)) for o in options)
    question = Question(ids, encoded)
    if question.longest > context:
        option = question.longest - len(ids)
        what = f"prompt ({len(ids)}) and longest option ({option}) are" if options else "the prompt is"
        mend, field = ("the option", "options") if option > len(ids) else ("the prompt", "prompt")
        raise PromptTooLong(
            f"{what} {question.longest} tokens; there is room for {context}: shorten {mend}", field=field
        )
    return question


def tokenize_apart(
    tokenizer: Tokenizer, template: Template, prompt: str, options: Sequence[str], context: int
) -> Question:
    """Tokenizes a question whose options the model can tell apart: a tokenizer may know no capitals, say.

    Args and errors are those of ``tokenize``, and:

    Raises:
        InvalidRequest: Two options are the same tokens, and would share a probability.
    """
    question = tokenize(tokenizer, template, prompt, options, context)
    first: dict[tuple[int, ...], str] = {}
    for position, (tokens, option) in enumerate(zip(question.options, options, strict=True)):
        if tokens in first:
            where = f"options[{position}]"
            raise InvalidRequest(
                f"{where} {option!r} is the same to the model as {first[tokens]!r}; word one of them differently",
                field=where,
            )
        first[tokens] = option
    return question


@dataclass(frozen=True)
class Batch:
    """Questions packed for one forward pass.

    Attributes:
        ids: Token ids, shape (rows, tokens).
        positions: Position ids, shape (rows, tokens).
        mask: What each token may attend to, shape (rows, 1, tokens, tokens before and here); None if plainly causal.
        where: Flat indices into (rows, tokens) of the positions whose logits are needed, shape (n,).
        of: For each scored token, its entry in ``where``, shape (m,).
        token: For each scored token, its id, shape (m,).
        slot: For each scored token, its option's flat index into (rows, options), shape (m,).
        lengths: Tokens of each option, shape (rows, options); 0 where a row has fewer options.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor | None
    where: Tensor
    of: Tensor
    token: Tensor
    slot: Tensor
    lengths: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """Returns the batch on another device."""
        mask = None if self.mask is None else self.mask.to(device)
        tensors = {name: tensor.to(device) for name, tensor in vars(self).items() if name != "mask"}
        return Batch(**tensors, mask=mask)

    def also(self, others: Tensor) -> Batch:
        """Returns the batch with more tokens scored at each needed position, for options of which none share one.

        Args:
            others: Token ids, shape (n, k).

        Returns:
            The batch; at each position its own token is scored, then the k others.
        """
        count = 1 + others.shape[-1]
        return replace(
            self,
            of=self.of.repeat_interleave(count),
            token=torch.cat([self.token[:, None], others[self.of]], dim=1).flatten(),
            slot=self.slot.repeat_interleave(count),
        )

    def repeat(self, times: int) -> Batch:
        """Returns the batch ``times`` over, draw-major: row d * rows + i is question i of draw d."""
        if times == 1:
            return self
        rows, tokens = self.ids.shape
        steps = torch.arange(times, device=self.ids.device)[:, None]

        def shifted(index: Tensor, step: int) -> Tensor:
            return (index[None, :] + steps * step).flatten()

        return Batch(
            ids=self.ids.repeat(times, 1),
            positions=self.positions.repeat(times, 1),
            mask=None if self.mask is None else self.mask.repeat(times, 1, 1, 1),
            where=shifted(self.where, rows * tokens),
            of=shifted(self.of, len(self.where)),
            token=self.token.repeat(times),
            slot=shifted(self.slot, self.lengths.numel()),
            lengths=self.lengths.repeat(times, 1),
        )


def pack(questions: Sequence[Question], pad: int = 0, before: int = 0) -> Batch:
    """Packs tokenized questions, padded on the right, into one batch on the CPU.

    Args:
        questions: The questions; of their prompts, what the model has not read yet.
        pad: Token of the padding.
        before: Tokens that the model has read already, the beginning of each prompt.
    """
    inner = [[option[:-1] for option in question.options] for question in questions]
    sizes = [len(q.prompt) + sum(map(len, tails)) for q, tails in zip(questions, inner, strict=True)]
    rows, tokens = len(questions), max(sizes)
    width = max(len(question.options) for question in questions)
    ids = torch.full((rows, tokens), pad, dtype=torch.long)
    positions = torch.zeros((rows, tokens), dtype=torch.long)
    lengths = torch.zeros((rows, width), dtype=torch.long)
    needed = before > 0 or any(tail for tails in inner for tail in tails)
    mask = torch.zeros((rows, 1, tokens, before + tokens), dtype=torch.bool) if needed else None
    causal = torch.ones((tokens, tokens), dtype=torch.bool).tril()
    where: dict[int, int] = {}
    of: list[int] = []
    token: list[int] = []
    slot: list[int] = []
    for row, (question, tails) in enumerate(zip(questions, inner, strict=True)):
        prompt = len(question.prompt)
        ids[row, :prompt] = torch.tensor(question.prompt)
        positions[row, :prompt] = torch.arange(before, before + prompt)
        if mask is not None:
            mask[row, 0, :, :before] = True
            mask[row, 0, :prompt, before : before + prompt] = causal[:prompt, :prompt]
            mask[row, 0, sizes[row] :, 0] = True  # padding must attend to something, or softmax gives NaN
        start = prompt
        for number, (option, tail) in enumerate(zip(question.options, tails, strict=True)):
            stop = start + len(tail)
            lengths[row, number] = len(option)
            if tail:
                ids[row, start:stop] = torch.tensor(tail)
                positions[row, start:stop] = torch.arange(before + prompt, before + prompt + len(tail))
                assert mask is not None
                mask[row, 0, start:stop, before : before + prompt] = True
                mask[row, 0, start:stop, before + start : before + stop] = causal[: len(tail), : len(tail)]
            predictors = [prompt - 1, *range(start, stop)]
            for predictor, token_id in zip(predictors, option, strict=True):
                of.append(where.setdefault(row * tokens + predictor, len(where)))
                token.append(token_id)
                slot.append(row * width + number)
            start = stop
    return Batch(
        ids=ids,
        positions=positions,
        mask=mask,
        where=torch.tensor(list(where), dtype=torch.long),
        of=torch.tensor(of, dtype=torch.long),
        token=torch.tensor(token, dtype=torch.long),
        slot=torch.tensor(slot, dtype=torch.long),
        lengths=lengths,
    )


def _logits(model: nn.Module, hidden: Tensor) -> Tensor:
    """Applies the output head as the model's own forward does, in float32 after the product."""
    logits = model.get_output_embeddings()(hidden)  # pyright: ignore[reportCallIssue] -- a transformers model's method
    logits = logits if logits.dtype == torch.float64 else logits.float()
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _masks(model: nn.Module, batch: Batch) -> Tensor | dict[str, Tensor] | None:
    """The batch's mask as a model's layers take it; those with a sliding window see the nearest tokens alone."""
    if batch.mask is None:
        return None
    dtype = next(model.parameters()).dtype

    def added(allowed: Tensor) -> Tensor:
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(
            ~allowed, torch.finfo(dtype).min
        )

    window, kinds = sliding_window(model.config.get_text_config())  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    if window is None or batch.mask.shape[-1] != batch.mask.shape[-2]:
        return added(batch.mask)
    distance = batch.positions[:, None, :, None] - batch.positions[:, None, None, :]
    near = added(batch.mask & (distance < window))
    return near if kinds is None else {"full_attention": added(batch.mask), "sliding_attention": near}


def sliding_window(config: Any) -> tuple[int | None, Sequence[str] | None]:
    """Tokens that layers with a sliding window see, None: there is none; and the kinds of layers, None: one kind."""
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = getattr(config, "layer_types", None)
    if window is None or (kinds is not None and "sliding_attention" not in kinds):
        return None, kinds
    return window, kinds


def _next_logits(model: nn.Module, batch: Batch, draws: int, past: Cache | None) -> Tensor:
    """Logits at the batch's needed positions, shape (draws * n, vocabulary)."""
    mask = _masks(model, batch)
    decoder = model.get_decoder()  # pyright: ignore[reportCallIssue] -- a transformers model's method
    given = {"use_cache": False} if past is None else {"past_key_values": past, "use_cache": True}
    hidden = decoder(input_ids=batch.ids, position_ids=batch.positions, attention_mask=mask, **given)
    where = replace(batch, mask=None).repeat(draws).where
    return _logits(model, hidden.last_hidden_state.flatten(0, 1)[where])


def token_log_probs(model: nn.Module, batch: Batch, draws: int = 1, past: Cache | None = None) -> Tensor:
    """Returns log p(token | what stands before it) of each scored token, shape (draws * m,), float32.

    Args:
        model: The model, perhaps attached.
        batch: The packed questions.
        draws: The model runs the batch so many times over from some block on, see ``Attached.using``.
        past: Keys and values of what stands before each row; those of the batch are added.
    """
    logits = _next_logits(model, batch, draws, past)
    normalizer = logits.logsumexp(dim=-1)
    batch = replace(batch, mask=None).repeat(draws)
    return logits[batch.of, batch.token] - normalizer[batch.of]


def likeliest_tokens(model: nn.Module, batch: Batch, count: int) -> Tensor:
    """Returns the ids of the likeliest next tokens at each needed position, likeliest first, shape (n, count).

    Args:
        model: The model, perhaps attached.
        batch: The packed questions.
        count: How many; the whole vocabulary if that is smaller.
    """
    logits = _next_logits(model, batch, 1, None)
    return logits.topk(min(count, logits.shape[-1])).indices


def option_scores(
    model: nn.Module, batch: Batch, normalize: Normalize = "sum", draws: int = 1, past: Cache | None = None
) -> Tensor:
    """Scores every option of every question.

    Args:
        model: A causal language model of transformers, perhaps with a posterior attached.
        batch: The packed questions.
        normalize: ``sum``, the log-probability of the option's text; ``mean``, per token of it.
        draws: As for ``token_log_probs``.
        past: As for ``token_log_probs``.

    Returns:
        Scores in nats, shape (draws * rows, options), float32; -inf where a row has fewer options.
    """
    each = token_log_probs(model, batch, draws, past)
    batch = replace(batch, mask=None).repeat(draws)
    scores = each.new_zeros(batch.lengths.numel()).index_add(0, batch.slot, each).view_as(batch.lengths)
    if normalize == "mean":
        scores = scores / batch.lengths.clamp_min(1)
    return scores.masked_fill(batch.lengths == 0, float("-inf"))
