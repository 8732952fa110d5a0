"""What vLLM is asked to do with a prompt, and what it decoded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from abmll.sampling import Sampling
from server.engine import Tell


def ask_params(tokens: Sequence[int]) -> Any:
    """For the log-probabilities of chosen tokens, at most 128, as the next token."""
    return _params(max_tokens=1, temperature=0.0, logprob_token_ids=list(tokens), detokenize=False, ignore_eos=True)


def read_params(count: int) -> Any:
    """For the log-probability of each token of the prompt, and of the ``count`` likeliest in its place."""
    return _params(max_tokens=1, temperature=0.0, prompt_logprobs=count, detokenize=False, ignore_eos=True)


def decode_params(sampling: Sampling, draw: int | None, *, told: bool) -> Any:
    """For a text under one draw, or under the mean; with each token as it comes where it is ``told``."""
    return _params(
        told=told,
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed_of(draw),
        stop=list(sampling.stop),
        detokenize=bool(sampling.stop),
    )


def decoded(output: Any) -> list[int]:
    """The tokens of a text, without the one that ended it."""
    completion = output.outputs[0]
    tokens = list(completion.token_ids)
    ended = completion.finish_reason == "stop" and not isinstance(completion.stop_reason, str)
    return tokens[:-1] if ended else tokens


class Following:
    """Tells the tokens of a text as vLLM's outputs for it come, each of which holds all tokens so far."""

    def __init__(self, tell: Tell) -> None:
        self.tell, self.told = tell, 0

    def __call__(self, output: Any) -> None:
        """Tells what is new, without the token that ends the text."""
        log_probs, tokens = output.outputs[0].logprobs, decoded(output)
        for at in range(self.told, len(tokens)):
            self.tell(tokens[at], log_probs[at][tokens[at]].logprob)
        self.told = max(self.told, len(tokens))


def _params(*, told: bool = False, **given: Any) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    if told:
        return SamplingParams(output_kind=RequestOutputKind.CUMULATIVE, logprobs=0, **given)
    return SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY, **given)
