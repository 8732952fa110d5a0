"""Free-text answers: decoded, scored under the draws, and told apart by what they mean."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from abmll.decoding import with_end
from abmll.entailment import merge_meanings
from abmll.errors import InvalidRequest
from abmll.meanings import group_meanings, meaning_predictive
from abmll.sampling import Sampling
from abmll.scoring import Question
from abmll.sequences import TokenScores
from server.clock import together
from server.engine import Engine, Served, Tell
from server.schemas import Finish, GenerateRequest, Meaning, Semantics, Uncertainty
from server.texts import LIKELY, until_stop

# Of samples, where the request says none: as the model puts it.
_TEMPERATURE = 1.0


@dataclass(frozen=True)
class FreeText:
    """A decoded answer.

    Attributes:
        text: The answer.
        finish: What ended it: the model (``end``), a stop string (``stop``) or a limit (``length``).
        scores: Of its tokens, its end included.
        semantics: What other samples say, where there are any.
    """

    text: str
    finish: Finish
    scores: TokenScores
    semantics: Semantics | None


def check_sampling(request: GenerateRequest) -> None:
    """Checks that what is said of sampling is not said of a question with options.

    Raises:
        InvalidRequest: It is.
    """
    for name, given in (("temperature", request.temperature > 0), ("top_p", request.top_p < 1)):
        if given:
            raise InvalidRequest(f"{name} is for free text; options are scored, not sampled: leave it out", field=name)
    if request.meaning == "entailment":
        raise InvalidRequest("meaning is of free-text samples; leave it out where there are options", field="meaning")
    if request.samples:
        raise InvalidRequest("samples is for free text; with options, ask for more draws", field="samples")


async def free_text(
    engine: Engine,
    tokenizer: Any,
    served: Served,
    question: Question,
    request: GenerateRequest,
    draws: Sequence[int],
    entails: Callable[[str, str], Awaitable[bool]],
    tell: Tell | None = None,
) -> FreeText:
    """Decodes an answer under the posterior mean and scores it under the draws; likewise samples, if asked for.

    ``entails`` says whether one answer says all that another says; ``tell`` is told of each token of the answer as it
    comes.
    """
    sampling = Sampling(request.max_tokens, tuple(request.stop), request.temperature, request.top_p, request.seed)

    def finished(decoded: Sequence[int]) -> tuple[tuple[int, ...], str, Finish]:
        tokens, text, stopped = until_stop(tokenizer, decoded, request.stop)
        if stopped:
            return tuple(tokens), text.strip(), "stop"
        whole = tuple(with_end(tokens, tokenizer, sampling))
        return whole, text.strip(), "end" if whole[-1:] == (tokenizer.eos_token_id,) else "length"

    async def scored(tokens: Sequence[int], others: int = 0) -> TokenScores:
        return await engine.score_tokens(served, question.prompt, tokens, draws, request.seed, others)

    decoded = await engine.generate(served, question.prompt, sampling, tell)
    tokens, text, finish = finished(decoded)
    scores = await scored(tokens, LIKELY if request.tokens else 0)
    if not request.samples:
        return FreeText(text, finish, scores, None)
    sampling = replace(sampling, temperature=request.temperature or _TEMPERATURE)
    samples = await engine.sample(served, question.prompt, sampling, range(request.samples), request.seed)
    sampled = [finished(sample)[:2] for sample in samples]
    wordings = {tokens: text} | dict(sampled)
    rest = [wording for wording in wordings if wording != tokens]
    log_probs = [scores.log_probs] + [one.log_probs for one in await together(map(scored, rest))]
    of_texts = torch.stack([one.double().sum(dim=1) for one in log_probs], dim=1)
    groups = group_meanings(list(wordings.values()))
    if request.meaning == "entailment":
        groups = await merge_meanings(list(wordings.values()), groups, entails)
    told = semantics(wordings, groups, of_texts, [wording for wording, _ in sampled])
    return FreeText(text, finish, scores, told)


def semantics(
    wordings: dict[tuple[int, ...], str],
    groups: Sequence[int],
    log_probs: torch.Tensor,
    samples: Sequence[tuple[int, ...]],
) -> Semantics:
    """Tells the meanings of wordings.

    Args:
        wordings: Tokens and text of each; the answer's first.
        groups: Number of each wording's meaning.
        log_probs: Of the wordings, shape (draws, wordings), nats.
        samples: Tokens of each sample.
    """
    meaning_of = dict(zip(wordings, groups, strict=True))
    result = meaning_predictive(log_probs, groups)
    counts = [0] * (max(groups) + 1)
    for sample in samples:
        counts[meaning_of[sample]] += 1
    mean = log_probs.logsumexp(dim=0)
    likeliest = dict.fromkeys(groups, "")
    for at in mean.argsort().tolist():
        likeliest[groups[at]] = list(wordings.values())[at]
    probabilities = result.probabilities.tolist()
    order = sorted(range(len(counts)), key=lambda group: -probabilities[group])
    return Semantics(
        meanings=[
            Meaning(answer=likeliest[group], probability=probabilities[group], samples=counts[group]) for group in order
        ],
        unseen=probabilities[-1],
        answer_probability=probabilities[0],
        consistency=counts[0] / len(samples),
        uncertainty=Uncertainty(
            total=result.total.item(), aleatoric=result.aleatoric.item(), epistemic=result.epistemic.item()
        ),
    )
