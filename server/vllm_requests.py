"""What vLLM is asked to do with a prompt, and what it decoded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from server.engine import Sampling


def ask_params(tokens: Sequence[int]) -> Any:
    """For the log-probabilities of chosen tokens, at most 128, as the next token."""
    return _params(max_tokens=1, temperature=0.0, logprob_token_ids=list(tokens), detokenize=False, ignore_eos=True)


def read_params(count: int) -> Any:
    """For the log-probability of each token of the prompt, and of the ``count`` likeliest in its place."""
    return _params(max_tokens=1, temperature=0.0, prompt_logprobs=count, detokenize=False, ignore_eos=True)


def decode_params(max_tokens: int, stop: Sequence[str], sampling: Sampling, draw: int | None) -> Any:
    """For a text under one draw, or under the mean."""
    return _params(
        max_tokens=max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed_of(draw),
        stop=list(stop),
        detokenize=bool(stop),
    )


def decoded(output: Any) -> list[int]:
    """The tokens of a text, without the one that ended it."""
    completion = output.outputs[0]
    tokens = list(completion.token_ids)
    ended = completion.finish_reason == "stop" and not isinstance(completion.stop_reason, str)
    return tokens[:-1] if ended else tokens


def _params(**given: Any) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY, **given)
