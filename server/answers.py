"""From a question to a reply: tokens, engine, predictive distribution, calibration."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from abmll.adaptive import settled, stages
from abmll.calibration import ShotCalibration
from abmll.draws import for_all_members
from abmll.entailment import ENTAILS, entailment_prompt
from abmll.errors import DeadlineExceeded, InvalidRequest, PromptTooLong
from abmll.examples import check_options
from abmll.names import GLOBAL
from abmll.posterior import Normalize
from abmll.predictive import predictive
from abmll.scoring import Question
from abmll.sequences import TokenScores
from abmll.store import StoredPosterior
from server.abstention import Limit, limit
from server.admission import Admission
from server.cache import ByteCache, tensor_bytes
from server.calibrations import calibration_of, options_calibration, text_calibration
from server.clock import EngineTime, start_clock
from server.engine import Engine, Served, Tell
from server.feedback import Answered
from server.free_text import check_sampling, free_text
from server.inputs import check_prompt, encode
from server.judgements import Judged, candidates_of, judge_options, judge_text
from server.schemas import (
    MAX_TOKENS,
    GenerateReply,
    GenerateRequest,
    PosteriorId,
    ScoreRequest,
    Timing,
    Usage,
)
from server.settings import Settings
from server.store import TaskStore
from server.texts import LIKELY, tell_tokens

_Scoring = tuple[str, Question, range, int, Normalize]
# Scores are small: this part of the cache's bytes holds thousands of questions.
_SCORES_SHARE = 32
# One mirrored pair: the question is of the language, not of a task, and is asked often.
_ENTAILMENT_DRAWS = 2
# Bytes of a token id in a key.
_TOKEN = 36


@dataclass(frozen=True)
class _Scored:
    """Scores, shape (draws, options) in nats, and the number of tokens of the question."""

    scores: torch.Tensor
    tokens: int


class Answerer:
    """Answers questions with an engine and the store's posteriors.

    Args:
        settings: Defaults and limits.
        engine: A started engine.
        tokenizer: The base model's.
        store: Where the posteriors are.
        admission: The queue before the engine.
        note: Told of each answer.
    """

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        tokenizer: Any,
        store: TaskStore,
        admission: Admission,
        note: Callable[[Answered], None],
    ) -> None:
        self.settings, self.engine, self.tokenizer, self.store = settings, engine, tokenizer, store
        self.admission, self.note = admission, note
        # Equal draws of an equal posterior score equally: a question asked again costs nothing.
        self.scored: ByteCache[_Scoring, _Scored] = ByteCache(
            settings.cache // _SCORES_SHARE, lambda scored: tensor_bytes([scored.scores]) + _TOKEN * scored.tokens
        )

    async def answer(self, request: GenerateRequest, request_id: str, tell: Tell | None = None) -> GenerateReply:
        """Answers one question; ``tell`` is told of each token of a free text as it comes.

        Raises:
            InvalidRequest: The question cannot be answered as asked.
            TaskNotFound: There is no such task.
            EngineFailure: The engine cannot answer at present.
            Overloaded: Too many questions wait.
            DeadlineExceeded: The time for it is up.
        """
        async with self._in_time(request):
            return await self._answer(request, request_id, tell)

    async def score(self, request: ScoreRequest, request_id: str) -> GenerateReply:
        """Scores a finished answer, whole and token by token; raises as ``answer``."""
        async with self._in_time(request):
            return await self._answer(request, request_id)

    @asynccontextmanager
    async def _in_time(self, request: GenerateRequest | ScoreRequest) -> AsyncGenerator[None]:
        seconds = min(request.timeout or self.settings.timeout, self.settings.timeout)
        try:
            async with asyncio.timeout(seconds):
                yield
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"no answer within {seconds:g} s; ask again later, or with fewer draws", field="timeout"
            ) from error

    async def _answer(
        self, request: GenerateRequest | ScoreRequest, request_id: str, tell: Tell | None = None
    ) -> GenerateReply:
        begun, clock = time.monotonic(), start_clock()
        draws = self._check(request)
        stored = await asyncio.to_thread(self.store.choose, request.task, request.version, _lot(request))
        even = for_all_members(draws, stored.posterior.config.members)
        draws = draws if even > self.settings.max_draws else even
        least = None if isinstance(request, ScoreRequest) else limit(request, calibration_of(stored, request))
        question = await self._tokenize(stored, request)
        options: list[str] | None = None
        scores: torch.Tensor | None = None
        text: TokenScores | None = None
        with EngineTime(clock):
            async with self.admission.admitted(request.task):
                if isinstance(request, ScoreRequest):
                    answer, text = await self._given_text(stored, question, request, draws)
                elif request.options is None:
                    answer, text = await self._free_text(stored, question, request, draws, tell)
                else:
                    options = request.options
                    answer, scores = await self._choose(stored, question, request, options, draws, least)
        if text is not None and (isinstance(request, ScoreRequest) or request.tokens):
            answer = replace(answer, tokens=await asyncio.to_thread(tell_tokens, self.tokenizer, text))
        usage = Usage(prompt_tokens=len(question.prompt), answer_tokens=_answer_tokens(question, answer, text))
        abstained = (
            None
            if least is None
            else least.abstain(answer.confidence, candidates_of(answer, options), calibrated=answer.calibrated)
        )
        if abstained is not None:
            answer = replace(answer, answer=None, answer_index=None)
        standard = answer.calibrated
        if options is not None and not isinstance(request, ScoreRequest):
            standard = request.normalize in (None, stored.posterior.config.normalize)
        self.note(
            Answered(
                request_id=request_id,
                task=request.task,
                version=stored.record.version,
                posterior=stored.answering,
                options=options,
                scores=scores,
                standard=standard,
                draws=answer.draws,
                answer=answer.answer_index,
                probabilities=answer.probabilities,
                confidence=answer.confidence,
                epistemic=answer.uncertainty.epistemic,
                begun=begun,
            )
        )
        total = time.monotonic() - begun
        return GenerateReply(
            request_id=request_id,
            task=request.task,
            posterior=PosteriorId(id=stored.digest, version=stored.record.version, task=request.task),
            options=options,
            abstained=abstained,
            usage=usage,
            timing=Timing(total_ms=1e3 * total, engine_ms=1e3 * clock.engine, queue_ms=1e3 * clock.queued),
            **vars(answer),
        )

    def _check(self, request: GenerateRequest | ScoreRequest) -> int:
        check_prompt(request.prompt)
        if isinstance(request, ScoreRequest):
            check_prompt(request.answer, "answer")
        elif request.options is not None:
            check_options(request.options)
            check_sampling(request)
        elif request.stream and (request.abstain_below is not None or request.target_risk is not None):
            raise InvalidRequest(
                "a stream tells the text before its confidence is known: leave stream out, or abstain_below and "
                "target_risk",
                field="stream",
            )
        elif request.meaning == "entailment" and not request.samples:
            raise InvalidRequest(
                "meaning tells samples apart; ask for some with samples, or leave it out", field="meaning"
            )
        elif request.samples > self.settings.max_draws:
            raise InvalidRequest(
                f"samples is {request.samples}, each of a draw; give at most {self.settings.max_draws}", field="samples"
            )
        draws = self.settings.draws if request.draws == "auto" else request.draws
        if not 1 <= draws <= self.settings.max_draws:
            raise InvalidRequest(f"draws is {draws}; give 1 to {self.settings.max_draws}, or 'auto'", field="draws")
        return draws

    async def _tokenize(self, stored: StoredPosterior, request: GenerateRequest | ScoreRequest) -> Question:
        if isinstance(request, ScoreRequest):
            return await self._tokenize_answer(stored, request)
        # A free-text answer, and its end, take part of the context.
        room = self.engine.context - (request.max_tokens + 1 if request.options is None else 0)
        if room < 1:
            raise InvalidRequest(
                f"max_tokens is {request.max_tokens}, but prompt and answer share {self.engine.context} tokens",
                field="max_tokens",
            )
        try:
            return await self._encode(stored, request.prompt, request.options or [], room)
        except PromptTooLong as error:
            if request.options is not None:
                raise
            leaves = f"max_tokens {request.max_tokens} leaves that of the model's {self.engine.context}"
            raise PromptTooLong(f"{error.message}, or lower max_tokens ({leaves})", field="prompt") from error

    async def _tokenize_answer(self, stored: StoredPosterior, request: ScoreRequest) -> Question:
        # vLLM needs room for one token more than it is asked about.
        room = self.engine.context - 1 - request.end
        try:
            question = await self._encode(stored, request.prompt, [request.answer], room)
        except PromptTooLong as error:
            longer = "answer" if error.field == "options" else "prompt"
            raise PromptTooLong(
                f"prompt and answer together exceed the {room} tokens that can be scored: shorten the {longer}",
                field=longer,
            ) from error
        count = len(question.options[0])
        if count > MAX_TOKENS:
            raise PromptTooLong(f"answer is {count} tokens; at most {MAX_TOKENS} are scored", field="answer")
        return question

    async def _encode(self, stored: StoredPosterior, prompt: str, options: Sequence[str], room: int) -> Question:
        return await encode(self.tokenizer, stored.posterior.config.template, prompt, options, room)

    async def _choose(
        self,
        stored: StoredPosterior,
        question: Question,
        request: GenerateRequest,
        options: list[str],
        draws: int,
        least: Limit | None,
    ) -> tuple[Judged, torch.Tensor]:
        """Chooses among options; gives the scores, shape (draws, options), too."""
        served, entry = Served(stored.digest, stored.posterior), options_calibration(stored, request)
        normalize = request.normalize or stored.posterior.config.normalize
        # A mixture of one example has the calibration of none, which tells how draws of a single Gaussian scatter.
        one = stored.posterior.config.members == 1
        if request.draws == "auto" and one and entry is not None and entry.scatter is not None:
            scores = await self._adaptive(served, question, request, draws, entry, least)
        else:
            scores = await self._score(served, question, range(draws), request.seed, normalize)
        return judge_options(options, scores, entry), scores

    async def _score(
        self, served: Served, question: Question, draws: range, seed: int, normalize: Normalize
    ) -> torch.Tensor:
        key = served.key, question, draws, seed, normalize
        found = self.scored.find(key)
        if found is None:
            scores = await self.engine.score(served, question, draws, seed, normalize)
            # The engine's may be a view of a whole batch's, which would be kept with it.
            found = _Scored(scores.clone(), len(question.prompt) + sum(map(len, question.options)))
            self.scored.put(key, found)
        return found.scores

    async def _adaptive(
        self,
        served: Served,
        question: Question,
        request: GenerateRequest,
        most: int,
        entry: ShotCalibration,
        least: Limit | None,
    ) -> torch.Tensor:
        """Scores under a pair of draws, and doubles them until they settle the answer or are all."""
        assert entry.scatter is not None
        threshold = None if least is None else least.threshold
        parts: list[torch.Tensor] = []
        for stage in stages(most):
            normalize = served.posterior.config.normalize
            parts.append(await self._score(served, question, stage, request.seed, normalize))
            if settled(torch.cat(parts), entry.temperature, most, request.tolerance, entry.scatter, threshold):
                break
        return torch.cat(parts)

    async def _free_text(
        self, stored: StoredPosterior, question: Question, request: GenerateRequest, draws: int, tell: Tell | None
    ) -> tuple[Judged, TokenScores]:
        served = Served(stored.digest, stored.posterior)

        async def entails(first: str, second: str) -> bool:
            return await self._entails(request, first, second)

        found = await free_text(self.engine, self.tokenizer, served, question, request, range(draws), entails, tell)
        entry = text_calibration(stored, request) if found.finish == "end" else None
        judged = judge_text(found.text, found.scores, entry)
        return replace(judged, finish=found.finish, semantics=found.semantics), found.scores

    async def _entails(self, request: GenerateRequest, first: str, second: str) -> bool:
        """Asks under the global posterior: a task's has learnt to answer its own questions alone."""
        stored = await asyncio.to_thread(self.store.choose, GLOBAL, None, 0.0)
        prompt = entailment_prompt(request.prompt, first, second)
        try:
            question = await self._encode(stored, prompt, ENTAILS, self.engine.context)
        except PromptTooLong:  # beside a long question there is no room for two answers: they stay apart
            return False
        served, normalize = Served(stored.digest, stored.posterior), stored.posterior.config.normalize
        scores = await self._score(served, question, range(_ENTAILMENT_DRAWS), request.seed, normalize)
        return int(predictive(scores).answer) == 0

    async def _given_text(
        self, stored: StoredPosterior, question: Question, request: ScoreRequest, draws: int
    ) -> tuple[Judged, TokenScores]:
        """Scores a finished text under the draws, with its end or as an option is scored, whatever follows it."""
        served, tokens = Served(stored.digest, stored.posterior), question.options[0]
        end: int | None = self.tokenizer.eos_token_id
        entry = None
        if request.end and end is not None:
            tokens, entry = (*tokens, end), text_calibration(stored, request)
        scores = await self.engine.score_tokens(served, question.prompt, tokens, range(draws), request.seed, LIKELY)
        # Fitted on likeliest texts, it holds for one that is the likeliest in each place under the mean.
        likeliest = bool((scores.others[:, 0] == scores.tokens).all())
        return replace(judge_text(request.answer, scores, entry), calibrated=entry is not None and likeliest), scores


def _answer_tokens(question: Question, answer: Judged, text: TokenScores | None) -> int:
    if text is not None:
        return len(text.tokens)
    assert answer.answer_index is not None
    return len(question.options[answer.answer_index])


def _lot(request: GenerateRequest | ScoreRequest) -> float:
    """Between 0 and 1, by what is asked: the same question meets the same version."""
    options = None if isinstance(request, ScoreRequest) else request.options
    asked = json.dumps([request.task, request.prompt, options, request.seed]).encode()
    return int.from_bytes(hashlib.sha256(asked).digest()[:8], "big") / 2**64
