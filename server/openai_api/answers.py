"""From replies of the server's own to those of OpenAI's API."""

from __future__ import annotations

import math
from collections.abc import Sequence

from server.openai_api.replies import (
    AssistantMessage,
    ChatChoice,
    ChatLogprobs,
    CompletionChoice,
    CompletionLogprobs,
    Confidence,
    FinishReason,
    TokenLogprob,
    TokenUsage,
    TopLogprob,
)
from server.schemas import GenerateReply

# Of what has a probability of 0, which JSON has no logarithm for.
_LEAST = -9999.0


def chat_choice(index: int, reply: GenerateReply, top: int | None) -> ChatChoice:
    """A choice of a chat; ``top`` as in ``logprobs_of``."""
    return ChatChoice(
        index=index,
        message=AssistantMessage(content=reply.answer, refusal=refusal_of(reply)),
        finish_reason=finish_of(reply),
        logprobs=chat_logprobs(reply, top),
        abmll=confidence_of(reply),
    )


def completion_choice(index: int, reply: GenerateReply, top: int | None) -> CompletionChoice:
    """A choice of a completion; ``top`` as in ``logprobs_of``."""
    return CompletionChoice(
        index=index,
        text=reply.answer or "",
        finish_reason=finish_of(reply),
        logprobs=completion_logprobs(reply, top),
        abmll=confidence_of(reply),
    )


def confidence_of(reply: GenerateReply) -> Confidence:
    """What is this server's own in a reply."""
    return Confidence.model_validate(reply, from_attributes=True)


def refusal_of(reply: GenerateReply) -> str | None:
    """Why there is no answer; None where there is one."""
    return None if reply.abstained is None else reply.abstained.reason


def finish_of(reply: GenerateReply) -> FinishReason:
    """What ended the answer, in OpenAI's words."""
    if reply.abstained is not None:
        return "content_filter"
    return "length" if reply.finish == "length" else "stop"


def usage_of(replies: Sequence[GenerateReply], prompts: int) -> TokenUsage:
    """Tokens of all replies; a prompt with several choices counts once, as with OpenAI."""
    each = len(replies) // prompts
    asked = sum(reply.usage.prompt_tokens for reply in replies[::each])
    answered = sum(reply.usage.answer_tokens for reply in replies)
    return TokenUsage(prompt_tokens=asked, completion_tokens=answered, total_tokens=asked + answered)


def logprobs_of(reply: GenerateReply, top: int | None) -> list[TokenLogprob] | None:
    """The answer's tokens with their predictive log-probabilities; with options, the answer as one.

    Args:
        reply: The server's reply.
        top: Tokens to tell in each place, or options; None: tell nothing.
    """
    if top is None or reply.answer is None:
        return None
    if reply.options is not None and reply.probabilities is not None:
        pairs = [_logprob(*pair) for pair in zip(reply.options, reply.probabilities, strict=True)]
        pairs.sort(key=lambda pair: -pair.logprob)
        return [TokenLogprob(**pairs[0].model_dump(), top_logprobs=pairs[:top], uncertainty=reply.uncertainty)]
    tokens = reply.tokens or []
    return [
        TokenLogprob(
            **_logprob(text, token.probability).model_dump(),
            top_logprobs=[_logprob(other.text, other.probability) for other in token.likeliest[:top]],
            uncertainty=token.uncertainty,
        )
        for text, token in zip(_parts([token.text for token in tokens], reply.answer), tokens, strict=False)
    ]


def _parts(texts: Sequence[str], answer: str) -> list[str]:
    """The tokens' parts of an answer: without the white space around it, its end, and the string that stopped it."""
    start = len(joined := "".join(texts)) - len(joined.lstrip())
    found: list[str] = []
    told = -start
    for text in texts:
        if told >= len(answer):
            break
        found.append(answer[max(0, told) : max(0, told + len(text))])
        told += len(text)
    return found


def chat_logprobs(reply: GenerateReply, top: int | None) -> ChatLogprobs | None:
    """The answer token by token, in a chat's form."""
    if top is None:
        return None
    return ChatLogprobs(content=logprobs_of(reply, top), confidence=reply.confidence, calibrated=reply.calibrated)


def completion_logprobs(reply: GenerateReply, top: int | None) -> CompletionLogprobs | None:
    """The answer token by token, in a completion's form."""
    if top is None:
        return None
    tokens = logprobs_of(reply, top) or []
    offsets = [0]
    for token in tokens:
        offsets.append(offsets[-1] + len(token.token))
    return CompletionLogprobs(
        tokens=[token.token for token in tokens],
        token_logprobs=[token.logprob for token in tokens],
        top_logprobs=[{other.token: other.logprob for other in token.top_logprobs} for token in tokens],
        text_offset=offsets[:-1],
        confidence=reply.confidence,
        calibrated=reply.calibrated,
    )


def _logprob(text: str, probability: float) -> TopLogprob:
    value = math.log(probability) if probability > 0 else _LEAST
    return TopLogprob(token=text, bytes=list(text.encode()), logprob=value)
