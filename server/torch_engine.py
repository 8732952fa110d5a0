"""The torch engine: transformers in one thread, all draws of all waiting questions in one pass."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from abmll.beginnings import Beginning, read_beginning, reuses_beginnings
from abmll.decoding import decode
from abmll.draw_scores import rows_of_draws, under_draws
from abmll.draws import Signs, draw_signs, stack_signs
from abmll.errors import AbmllError, EngineFailure
from abmll.layers import Attached, attach
from abmll.posterior import Posterior
from abmll.sampling import Sampling
from abmll.scoring import Batch, Normalize, Question, likeliest_tokens, option_scores, pack, token_log_probs
from abmll.sequences import TokenScores, no_tokens
from server.background import in_background
from server.cache import ByteCache, tensor_bytes
from server.clock import current_clock
from server.engine import EngineState, Served, Tell
from server.passes import KEPT, Item, Kind, row_tokens, teller
from server.shared_beginnings import SharedBeginnings
from training.allocator import keep_freed_memory
from training.base_model import BaseModel, WeightsDtype, load_base

logger = logging.getLogger(__name__)

# Padded tokens in one pass over all draws, by device. Measured on a CPU with 2 cores: between 2k and 4k
# activations stay in cache; a GPU wants large passes.
PASS_TOKENS = {"cpu": 2048, "cuda": 65536}
_BEGINNINGS_SHARE = 4


class TorchEngine:
    """``Engine`` on a transformers model.

    One thread runs passes; while it does, questions queue. The next pass takes the oldest question and
    those waiting that may share its pass, nearest in length first, up to ``pass_tokens`` padded tokens.
    Signs of a draw are the same for all posteriors of one shape over the same layers, and are kept; so are the keys
    and values of a beginning that several questions share.

    Args:
        model: Hub name or folder of the base model.
        targets: Module names that posteriors target.
        layers: Which blocks they target them in, see ``PosteriorConfig.layers``.
        revision: Commit or tag on the hub.
        dtype: Of the base model's weights, see ``load_base``.
        device: cpu, cuda, or auto: the accelerator where there is one.
        context: The most tokens to take; the model's own limit by default.
        threads: CPU threads; torch's choice by default.
        pass_tokens: Padded tokens in one pass, over all draws.
        cache_bytes: Bytes of posteriors, and of draws' signs, to keep; of beginnings, a quarter.
    """

    name = "torch"

    def __init__(
        self,
        model: str,
        *,
        targets: Sequence[str],
        layers: str = "all",
        revision: str | None = None,
        dtype: WeightsDtype = torch.float32,
        device: str = "cpu",
        context: int | None = None,
        threads: int | None = None,
        pass_tokens: int | None = None,
        cache_bytes: int = 1 << 30,
    ) -> None:
        self.model, self.revision = model, revision
        self.dtype: WeightsDtype = dtype
        self.targets, self.layers = tuple(targets), layers
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self.context = context or 0  # the model's own limit, once started
        self.threads = threads
        self.pass_tokens = pass_tokens or PASS_TOKENS.get(self.device.split(":")[0], 65536)
        self._base: BaseModel | None = None
        self._attached: Attached | None = None
        self._signs: ByteCache[tuple[Any, ...], dict[str, Signs]] = ByteCache(
            cache_bytes, lambda signs: tensor_bytes(t for sign in signs.values() for t in (sign.u, sign.v))
        )
        self._placed: ByteCache[str, Posterior] = ByteCache(
            cache_bytes, lambda posterior: tensor_bytes(posterior.tensors().values())
        )
        self._beginnings: ByteCache[tuple[Any, ...], Beginning] = ByteCache(
            cache_bytes // _BEGINNINGS_SHARE,
            lambda kept: tensor_bytes(tensor for pair in kept.layers for tensor in pair),
        )
        self._shared = SharedBeginnings()
        self._reuses: bool | None = None  # tried with the first posterior
        self._waiting: list[Item] = []
        self._running: list[Item] = []
        self._wake = asyncio.Event()
        self._thread: ThreadPoolExecutor | None = None
        self._loop: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Loads the model; see ``Engine``.

        Raises:
            AbmllError: The base model cannot be had.
        """
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="abmll-engine")
        await asyncio.get_running_loop().run_in_executor(self._thread, self._load)
        self._loop = in_background(self._serve(), "the engine")

    def _load(self) -> None:
        keep_freed_memory()
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        given = self.context or None
        self._base = load_base(self.model, revision=self.revision, dtype=self.dtype, device=self.device, context=given)
        self.context = self._base.context
        self._attached = attach(self._base.model, self.targets, self.layers)

    async def close(self) -> None:
        """Frees the model; requests under way fail with ``EngineFailure``."""
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.gather(self._loop, return_exceptions=True)
            self._loop = None
        for item in [*self._waiting, *self._running]:
            if not item.result.done():
                item.result.set_exception(EngineFailure("the server is shutting down; ask again elsewhere"))
        self._waiting, self._running = [], []
        if self._thread is not None:
            await asyncio.to_thread(self._thread.shutdown)
            self._thread = None
        self._base = self._attached = None

    async def score(
        self, served: Served, question: Question, draws: Sequence[int], seed: int, normalize: Normalize = "sum"
    ) -> Tensor:
        """Scores each option under each draw, shape (draws, options); see ``Engine``."""
        return await self._ask(Kind(normalize, served.key, tuple(draws), seed), served, question)

    async def generate(
        self,
        served: Served,
        prompt: Sequence[int],
        sampling: Sampling,
        tell: Tell | None = None,
    ) -> list[int]:
        """Decodes under the posterior mean; see ``Engine``."""
        kind = Kind("generate", served.key, sampling=sampling)
        (text,) = await self._ask(kind, served, Question(tuple(prompt), ()), tell)
        return text

    async def sample(
        self,
        served: Served,
        prompt: Sequence[int],
        sampling: Sampling,
        draws: Sequence[int],
        seed: int,
    ) -> list[list[int]]:
        """Decodes one text under each draw, all in one batch; see ``Engine``."""
        kind = Kind("generate", served.key, tuple(draws), seed, sampling)
        return await self._ask(kind, served, Question(tuple(prompt), ()))

    async def score_tokens(
        self,
        served: Served,
        prompt: Sequence[int],
        tokens: Sequence[int],
        draws: Sequence[int],
        seed: int,
        others: int = 0,
    ) -> TokenScores:
        """Scores each token, and likely others in its place, under each draw; see ``Engine``."""
        if not tokens:
            return no_tokens(len(draws), others)
        question = Question(tuple(prompt), (tuple(tokens),))
        return await self._ask(Kind("tokens", served.key, tuple(draws), seed, others=others), served, question)

    async def release(self, key: str) -> None:
        """Forgets a posterior; its draws' signs are those of all posteriors and stay."""
        self._placed.pop(key)
        for kept in self._beginnings.present():
            if kept[0] == key:
                self._beginnings.pop(kept)

    def state(self) -> EngineState:
        """Reports the engine's state; resident "adapters" are draws whose signs are kept."""
        signs = self._signs
        healthy = self._loop is not None and not self._loop.done()
        return EngineState(healthy, len(signs), signs.loads, signs.hits, signs.evictions, len(self._waiting))

    async def _ask(self, kind: Kind, served: Served, question: Question, tell: Tell | None = None) -> Any:
        if self._loop is None or self._loop.done():
            raise EngineFailure("the engine is not running; wait until GET /readyz says 200")
        if kind.work != "generate" and self._reuses is not False:
            shared = self._shared.shared((kind.key, kind.seed, kind.draws), question.prompt)
            kind = replace(kind, beginning=question.prompt[:shared])
        item = Item(kind, served, question, asyncio.get_running_loop().create_future(), current_clock(), tell)
        self._waiting.append(item)
        self._wake.set()
        return await item.result

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._wake.wait()
            batch = self._next()
            if not batch:
                self._wake.clear()
                continue
            self._running = batch
            now = time.perf_counter()
            for item in batch:
                if item.clock is not None:
                    item.clock.queued += now - item.arrived
            try:
                results = await loop.run_in_executor(self._thread, self._run, batch)
            except AbmllError as error:
                self._fail(batch, error)
            except Exception as error:
                logger.exception("a pass failed")
                self._fail(batch, EngineFailure(f"the engine failed on this request: {type(error).__name__}"))
            else:
                for item, result in zip(batch, results, strict=True):
                    if not item.result.done():
                        item.result.set_result(result)
            self._running = []

    @staticmethod
    def _fail(batch: Sequence[Item], error: AbmllError) -> None:
        for item in batch:
            if not item.result.done():
                item.result.set_exception(error)

    def _next(self) -> list[Item]:
        """Takes the next pass's questions from the queue."""
        self._waiting = [item for item in self._waiting if not item.result.done()]  # callers that went away
        if not self._waiting:
            return []
        oldest = self._waiting[0]
        size = oldest.question.longest
        same = [item for item in self._waiting if item.kind == oldest.kind]
        same.sort(key=lambda item: abs(item.question.longest - size))  # stable: the oldest stays first
        times = max(1, len(oldest.kind.draws))
        taken: list[Item] = []
        longest = 0
        for item in same:
            longest = max(longest, row_tokens(item.question, oldest.kind) + oldest.kind.new_tokens)
            if taken and (len(taken) + 1) * times * longest > self.pass_tokens:
                break
            taken.append(item)
        chosen = {id(item) for item in taken}
        self._waiting = [item for item in self._waiting if id(item) not in chosen]
        return taken

    @torch.inference_mode()
    def _run(self, batch: Sequence[Item]) -> list[Any]:
        """Runs one pass, in the engine's thread."""
        assert self._base is not None
        posterior = self._placed.get(batch[0].served.key, lambda: self._place(batch[0].served.posterior))
        assert self._attached is not None
        if self._reuses is None and posterior.layers.keys() == self._attached.layers.keys():
            self._reuses = reuses_beginnings(self._attached, posterior)
        kind, questions = batch[0].kind, [item.question for item in batch]
        if kind.work == "generate":
            return self._decode(posterior, batch, kind)
        if kind.beginning and not self._reuses:
            kind = replace(kind, beginning=())
        read = len(kind.beginning)
        rest = [replace(question, prompt=question.prompt[read:]) for question in questions]
        packed = pack(rest, before=read).to(self.device)
        if kind.work == "tokens":
            return self._token_scores(posterior, questions, packed, kind)
        normalize: Normalize = "mean" if kind.work == "mean" else "sum"
        values = self._draws(
            posterior, packed, kind, lambda model, batch, *more: option_scores(model, batch, normalize, *more)
        ).view(len(kind.draws), len(questions), -1)
        return [values[:, row, : len(question.options)].clone() for row, question in enumerate(questions)]

    def _token_scores(
        self, posterior: Posterior, questions: Sequence[Question], packed: Batch, kind: Kind
    ) -> list[TokenScores]:
        """Scores texts, each its question's one option, token by token."""
        assert self._attached is not None
        others = torch.zeros(len(packed.token), 0, dtype=torch.long, device=packed.token.device)
        if kind.others:
            # Whole prompts: what is kept of a beginning is of draws, not of the mean.
            at_once = max(1, self.pass_tokens // max(question.longest for question in questions))
            with self._attached.using(posterior) as model:
                parts = [
                    likeliest_tokens(model, pack(questions[start : start + at_once]).to(self.device), kind.others)
                    for start in range(0, len(questions), at_once)
                ]
            others = torch.cat(parts)
        values = self._draws(posterior, packed.also(others), kind, token_log_probs)
        values = values.view(len(kind.draws), len(others), -1)
        lengths = [len(question.options[0]) for question in questions]
        texts = zip(packed.token.cpu().split(lengths), values.split(lengths, dim=1), others.cpu().split(lengths),
                    strict=True)  # fmt: skip
        return [
            TokenScores(tokens.clone(), scores[..., 0].clone(), likely.clone(), scores[..., 1:].clone())
            for tokens, scores, likely in texts
        ]

    def _place(self, posterior: Posterior) -> Posterior:
        return posterior.map(lambda tensor: tensor.to(self.device, torch.float32))

    def _draws(
        self, posterior: Posterior, batch: Batch, kind: Kind, function: Callable[[nn.Module, Batch, int, Any], Tensor]
    ) -> Tensor:
        """Applies a function of the model under each draw: shape (draws, values of one draw), on the CPU.

        A question with more draws than a pass holds takes several.
        """
        assert self._attached is not None
        rows, tokens = batch.ids.shape
        read = len(kind.beginning)
        at_once = max(1, self.pass_tokens // (rows * (tokens + read // KEPT)))
        # What is kept of a beginning must not depend on the questions that follow it.
        kept_at_once = max(1, self.pass_tokens // read) if read else at_once
        parts: list[Tensor] = []
        for first in range(0, len(kind.draws), kept_at_once):
            kept = kind.draws[first : first + kept_at_once]
            beginning = self._beginning(posterior, kind, kept) if read else None
            for start in range(0, len(kept), at_once):
                some = slice(start, start + at_once)
                past = None if beginning is None else beginning.before(rows, some)
                values = under_draws(
                    self._attached,
                    posterior,
                    self._stacked(posterior, kind.seed, kept[some]),
                    batch,
                    lambda model, batch, draws, past=past: function(model, batch, draws, past),
                )
                parts.append(values.view(len(kept[some]), -1).cpu())
        return torch.cat(parts)

    def _beginning(self, posterior: Posterior, kind: Kind, draws: tuple[int, ...]) -> Beginning:
        assert self._attached is not None
        attached = self._attached
        return self._beginnings.get(
            (kind.key, kind.seed, draws, kind.beginning),
            lambda: read_beginning(attached, posterior, self._stacked(posterior, kind.seed, draws), kind.beginning),
        )

    def _stacked(self, posterior: Posterior, seed: int, draws: Sequence[int]) -> dict[str, Signs]:
        shape = tuple((*layer.noise_shape, layer.members) for layer in posterior.layers.values())
        return stack_signs(
            [self._signs.get((shape, seed, i), lambda i=i: draw_signs(posterior, seed, i)) for i in draws]
        )

    def _decode(self, posterior: Posterior, batch: Sequence[Item], kind: Kind) -> list[list[list[int]]]:
        """Decodes prompts together: each prompt's texts, one a draw, or one under the mean."""
        assert self._base is not None
        assert self._attached is not None
        assert kind.sampling is not None
        prompts = [item.question.prompt for item in batch]
        rows, width = len(prompts), max(map(len, prompts))
        draws: tuple[int | None, ...] = kind.draws or (None,)
        at_once = max(1, self.pass_tokens // (rows * (width + kind.new_tokens)))
        texts: list[list[int]] = []
        for start in range(0, len(draws), at_once):
            some = draws[start : start + at_once]
            drawn = [draw for draw in some if draw is not None]
            signs = (
                rows_of_draws(self._stacked(posterior, kind.seed, drawn), rows, self._base.device) if drawn else None
            )
            with self._attached.using(posterior, signs):
                of_rows = [draw for draw in some for _ in prompts]
                texts += decode(
                    self._base.model,
                    self._base.tokenizer,
                    prompts * len(some),
                    kind.sampling,
                    of_rows,
                    teller(batch),
                    lambda row: batch[row % rows].result.done(),
                )
        return [texts[row::rows] for row in range(rows)]
