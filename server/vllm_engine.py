"""The production engine: vLLM, with draws as LoRA adapters and all draws of a question in one batch."""

from __future__ import annotations

import asyncio
import itertools
import logging
import multiprocessing
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import torch
from torch import Tensor

from abmll.errors import AbmllError, EngineFailure
from abmll.posterior import LayerPosterior, Normalize, Posterior, PosteriorConfig
from abmll.sampling import Sampling
from abmll.scoring import Question
from abmll.sequences import TokenScores, no_tokens
from server.adapter_folder import AdapterFolder
from server.adapters import Adapter, AdapterCache
from server.clock import current_clock
from server.engine import EngineState, Served, Tell
from server.tracing import trace_headers
from server.trie import Step, option_steps, token_steps
from server.vllm_process import own
from server.vllm_requests import Following, ask_params, decode_params, decoded, read_params
from server.vllm_setup import adapter_rank, fused, set_environment, target_shapes
from training.hub import fetch

logger = logging.getLogger(__name__)

# Longer texts are scored place by place: reading one, vLLM holds logits of all its tokens, a megabyte each for Llama-3.
READ_TOKENS = 1024
_LOOK_SECONDS = 1.0
_DEAD = "vLLM's engine process has died; ask again once it has been started anew"


class VllmEngine:
    """vLLM's ``AsyncLLM`` behind the engine protocol.

    Args:
        model: Hub name or folder.
        targets: Module names that posteriors target.
        layers: Which blocks they target them in, see ``PosteriorConfig.layers``.
        max_rank: Largest rank of a draw.
        revision: Commit or tag on the hub.
        context: The most tokens to take; the model's own limit by default.
        slots: Adapters that run in one step.
        cache_bytes: Bytes of adapters to keep.
        dtype: Of the weights; float32 on a CPU and the checkpoint's own on a GPU by default.
        options: Further arguments of vLLM's ``AsyncEngineArgs``.

    Attributes:
        slow_lora: On a CPU, why vLLM's own slower LoRA code is in use; None where ours is.
    """

    name = "vllm"

    def __init__(
        self,
        model: str,
        *,
        targets: Sequence[str],
        layers: str = "all",
        max_rank: int,
        revision: str | None = None,
        context: int | None = None,
        slots: int = 33,
        cache_bytes: int = 1 << 30,
        dtype: str | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.model, self.revision, self.context = model, revision, context or 0
        self.layers = layers
        self.targets, self.rank, self.slots = tuple(targets), adapter_rank(max_rank), slots
        self.dtype, self.options = dtype, options or {}
        self._folder = AdapterFolder()
        self._cache_bytes = cache_bytes
        self._llm: Any = None
        self._cache: AdapterCache | None = None
        self.slow_lora: str | None = None
        self._requests = itertools.count()
        self._waiting = 0
        self._closed = False
        self._building: asyncio.Future[Any] | None = None

    async def start(self) -> None:
        """Loads the model and warms up every path, so that nothing is left to compile."""
        set_environment()
        own()
        self._building = asyncio.ensure_future(asyncio.to_thread(self._build))
        try:
            self._llm = await asyncio.shield(self._building)
        except AbmllError:
            raise
        except Exception as error:
            raise EngineFailure(f"vLLM could not start with {self.model}: {error}") from error
        config = self._llm.model_config
        self.context = int(config.max_model_len)
        dtype = torch.float32 if self._on_cpu else torch.bfloat16
        self._cache = AdapterCache(self._folder.path, self.rank, dtype, self._cache_bytes)
        if self._on_cpu:
            self.slow_lora = (await self._llm.collective_rpc("use_segmented_lora"))[0]
            if self.slow_lora is not None:
                logger.warning("LoRA runs by vLLM's own slower code on the CPU: %s", self.slow_lora)
        await self._warm_up()

    def _build(self) -> Any:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM

        self._on_cpu = current_platform.is_cpu()
        values: dict[str, Any] = {
            # Of a hub's name it would take pickled weights where there are no others.
            "model": str(fetch(self.model, self.revision).folder),
            "dtype": self.dtype or ("float32" if self._on_cpu else "auto"),
            "max_model_len": self.context or None,
            "enable_lora": True,
            "max_lora_rank": self.rank,
            "max_loras": self.slots,
            "max_cpu_loras": 4 * self.slots,
            # LoRA on what posteriors target alone: on a CPU 3.5 times faster than on every module.
            "lora_target_modules": sorted({fused(target) for target in self.targets}),
            "enable_prefix_caching": True,
            "max_logprobs": 128,
        }
        if self._on_cpu:
            # The smallest blocks there are, so that short prompts are shared between a question's requests too.
            values |= {
                "block_size": 32,
                "max_num_seqs": 256,
                "enforce_eager": True,
                "worker_extension_cls": "server.segmented_lora.SegmentedLora",
            }
        return AsyncLLM.from_engine_args(AsyncEngineArgs(**(values | self.options)))

    async def _warm_up(self) -> None:
        config = PosteriorConfig(base_model=self.model, family="subspace", rank=1)
        shapes = await asyncio.to_thread(target_shapes, self.model, self.revision, self.targets, self.layers)
        zero = {
            name: LayerPosterior(
                torch.zeros(1, d_in), torch.zeros(d_out, 1), {"log_s": torch.zeros(1, 1)}, core=torch.zeros(1, 1)
            )
            for name, (d_out, d_in) in shapes.items()
        }
        served = Served("warm-up", Posterior(config, zero))
        question = Question((1, 2, 3), ((4,), (5, 6)))
        await self.score(served, question, range(2), 0)
        await self.score_tokens(served, question.prompt, [4, 5], range(2), 0, others=4)
        await self.score_tokens(served, question.prompt, [4, 5], range(2), 0)
        await self.generate(served, question.prompt, Sampling(4))
        await self.sample(served, question.prompt, Sampling(4, temperature=1.0, top_p=0.9), range(2), 0)
        await self.release(served.key)

    async def close(self) -> None:
        """Ends vLLM's processes and removes the adapters."""
        self._closed = True
        await self._end_building()
        llm, self._llm = self._llm, None
        if llm is not None:
            handler = getattr(llm, "output_handler", None)
            if handler is not None:
                handler.cancel()  # or it reports the end that we want as an engine's death
                await asyncio.gather(handler, return_exceptions=True)
            await asyncio.to_thread(llm.shutdown)
            # Its __del__ would do it again, perhaps when the interpreter has already taken its module apart.
            llm.shutdown = lambda: None
        await asyncio.to_thread(self._folder.remove)

    async def _end_building(self) -> None:
        """Cuts a start short that is under way: vLLM gives up once its processes are gone."""
        while self._building is not None and not self._building.done():
            for child in multiprocessing.active_children():
                child.kill()
            await asyncio.wait({self._building}, timeout=0.2)
        if self._llm is None and self._building is not None and self._building.exception() is None:
            self._llm = self._building.result()

    async def score(
        self, served: Served, question: Question, draws: Sequence[int], seed: int, normalize: Normalize = "sum"
    ) -> Tensor:
        """Scores each option under each draw, see ``Engine.score``."""
        steps = option_steps(question)
        step_of = {(step.before, token): number for number, step in enumerate(steps) for token in step.tokens}
        values = await self._ask_steps(served, question.prompt, steps, draws, seed)
        scores = torch.zeros(len(draws), len(question.options), dtype=torch.float64)
        for number, option in enumerate(question.options):
            places = [(step_of[option[:at], token], token) for at, token in enumerate(option)]
            for row, found in enumerate(values):
                scores[row, number] = sum(found[step][token] for step, token in places)
        if normalize == "mean":
            scores /= torch.tensor([len(option) for option in question.options])
        return scores.float()

    async def score_tokens(
        self,
        served: Served,
        prompt: Sequence[int],
        tokens: Sequence[int],
        draws: Sequence[int],
        seed: int,
        others: int = 0,
    ) -> TokenScores:
        """Scores given tokens one by one under each draw, see ``Engine.score_tokens``."""
        if not tokens:
            return no_tokens(len(draws), others)
        asked = tuple(prompt)
        if not others and len(prompt) + len(tokens) <= READ_TOKENS:
            read = await self._read(served, asked, tokens, draws, seed, 0)
            own = [[place[token].logprob for place, token in zip(places, tokens, strict=True)] for places in read]
            none = torch.zeros(len(draws), len(tokens), 0)
            return TokenScores(torch.tensor(tokens), torch.tensor(own), none[0].long(), none)
        likely = await self._likeliest(served, asked, tokens, others) if others else [()] * len(tokens)
        steps = [
            Step(step.before, tuple(dict.fromkeys((*step.tokens, *more))))
            for step, more in zip(token_steps(tokens), likely, strict=True)
        ]
        values = await self._ask_steps(served, asked, steps, draws, seed)
        return TokenScores(
            tokens=torch.tensor(tokens),
            log_probs=torch.tensor([[found[at][token] for at, token in enumerate(tokens)] for found in values]),
            others=torch.tensor(likely, dtype=torch.long),
            other_log_probs=torch.tensor(
                [[[found[at][token] for token in more] for at, more in enumerate(likely)] for found in values]
            ),
        )

    async def _likeliest(
        self, served: Served, prompt: tuple[int, ...], tokens: Sequence[int], count: int
    ) -> list[tuple[int, ...]]:
        """The likeliest tokens in each token's place under the posterior mean, likeliest first."""
        (places,) = await self._read(served, prompt, tokens, [None], 0, count)
        found = [tuple(sorted(place, key=lambda token: place[token].rank)[:count]) for place in places]
        if len(set(map(len, found))) > 1:
            raise EngineFailure("vLLM gave no log-probabilities of likely tokens; ask again without tokens")
        return found

    async def _read(
        self,
        served: Served,
        prompt: tuple[int, ...],
        tokens: Sequence[int],
        draws: Sequence[int | None],
        seed: int,
        count: int,
    ) -> list[list[dict[int, Any]]]:
        """Has prompt and tokens read in one pass a draw; what vLLM tells of each token's place, by token.

        That is the log-probability of the token itself and of the ``count`` likeliest. They are told of the prompt, not
        sampled: where a batch has rows that ask for chosen tokens, as ``_ask_steps`` does, vLLM's sampler gives none of
        the likeliest to the others.
        """
        params = read_params(count)
        async with self._holding(served, seed, draws) as adapters:
            outputs = await self._gather([((*prompt, *tokens), params, adapter) for adapter in adapters])
        read: list[list[dict[int, Any]]] = [output.prompt_logprobs[len(prompt) :] for output in outputs]
        if any(len(places) != len(tokens) for places in read):
            raise EngineFailure("vLLM gave no log-probabilities of given tokens; ask again")
        return read

    async def _ask_steps(
        self, served: Served, prompt: tuple[int, ...], steps: Sequence[Step], draws: Sequence[int], seed: int
    ) -> list[list[dict[int, float]]]:
        """Asks all steps under all draws at once; for each draw, each step's log-probabilities by token."""
        params = [ask_params(step.tokens) for step in steps]
        async with self._holding(served, seed, list(draws)) as adapters:
            outputs = await self._gather(
                [
                    (prompt + step.before, sampling, adapter)
                    for adapter in adapters
                    for step, sampling in zip(steps, params, strict=True)
                ]
            )
        answers = iter(outputs)
        return [
            [
                {token: first[token].logprob for token in step.tokens}
                for step, first in ((step, next(answers).outputs[0].logprobs[0]) for step in steps)
            ]
            for _ in draws
        ]

    async def generate(
        self,
        served: Served,
        prompt: Sequence[int],
        sampling: Sampling,
        tell: Tell | None = None,
    ) -> list[int]:
        """Decodes under the posterior mean, see ``Engine.generate``."""
        return (await self._decode(served, prompt, sampling, [None], 0, tell))[0]

    async def sample(
        self,
        served: Served,
        prompt: Sequence[int],
        sampling: Sampling,
        draws: Sequence[int],
        seed: int,
    ) -> list[list[int]]:
        """Decodes one text under each draw, see ``Engine.sample``."""
        return await self._decode(served, prompt, sampling, draws, seed)

    async def _decode(
        self,
        served: Served,
        prompt: Sequence[int],
        sampling: Sampling,
        draws: Sequence[int | None],
        seed: int,
        tell: Tell | None = None,
    ) -> list[list[int]]:
        params = [decode_params(sampling, draw, told=tell is not None) for draw in draws]
        follow = None if tell is None else Following(tell)
        async with self._holding(served, seed, draws) as adapters:
            outputs = await self._gather(
                [(tuple(prompt), one, adapter) for one, adapter in zip(params, adapters, strict=True)], follow
            )
        return [decoded(output) for output in outputs]

    @asynccontextmanager
    async def _holding(
        self, served: Served, seed: int, draws: Sequence[int | None]
    ) -> AsyncGenerator[list[Adapter], None]:
        """Holds the adapters of draws; whatever fails inside while the engine dies is the engine's death."""
        try:
            async with self._adapters.holding(served, seed, draws) as adapters:
                yield adapters
        except EngineFailure:
            raise
        except Exception as error:
            if self._dead:
                raise EngineFailure(_DEAD) from error
            raise

    async def _gather(
        self, requests: Sequence[tuple[tuple[int, ...], Any, Adapter]], follow: Callable[[Any], None] | None = None
    ) -> list[Any]:
        self._waiting += 1
        tasks = [asyncio.ensure_future(self._one(*request, follow)) for request in requests]
        try:
            outputs = await self._unless_dead(tasks)
        finally:
            self._waiting -= 1
            for task in tasks:
                task.add_done_callback(lambda task: task.cancelled() or task.exception())  # one failure is told
                task.cancel()
            # An adapter's folder may go only when vLLM has been told that nobody waits for it.
            await asyncio.wait(tasks, timeout=_LOOK_SECONDS)
        clock, metrics = current_clock(), outputs[0].metrics
        if clock is not None and metrics is not None:
            clock.queued += max(0.0, getattr(metrics, "scheduled_ts", 0.0) - getattr(metrics, "queued_ts", 0.0))
        return outputs

    async def _unless_dead(self, tasks: Sequence[asyncio.Future[Any]]) -> list[Any]:
        """Awaits requests, or the engine's death: vLLM does not tell it to one that it takes in at that moment."""
        waiting = set(tasks)
        while waiting:
            done, waiting = await asyncio.wait(waiting, timeout=_LOOK_SECONDS, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
            if waiting and self._dead:
                raise EngineFailure(_DEAD)
        return [task.result() for task in tasks]

    async def _one(
        self, prompt: tuple[int, ...], params: Any, adapter: Adapter, follow: Callable[[Any], None] | None
    ) -> Any:
        from vllm.lora.request import LoRARequest
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        llm = self._llm
        if llm is None:
            raise EngineFailure(_DEAD)
        lora = LoRARequest(adapter.path.name, adapter.number, str(adapter.path))
        request_id = f"abmll-{next(self._requests)}"
        last: Any = None
        try:
            stream = llm.generate(
                {"prompt_token_ids": list(prompt)},
                params,
                request_id=request_id,
                lora_request=lora,
                trace_headers=trace_headers(),
            )
            async for output in stream:
                last = output
                if follow is not None:
                    follow(output)
        except EngineDeadError as error:
            raise EngineFailure(_DEAD) from error
        except EngineGenerateError as error:
            logger.error("vLLM failed on a request", exc_info=error)
            raise EngineFailure("vLLM failed on this request; ask again") from error
        if last is None or not last.outputs:
            raise EngineFailure("vLLM ended a request without an answer")
        return last

    @property
    def _adapters(self) -> AdapterCache:
        if self._cache is None or self._dead:
            raise EngineFailure(_DEAD)
        return self._cache

    @property
    def _dead(self) -> bool:
        return self._closed or self._llm is None or self._llm.errored

    async def release(self, key: str) -> None:
        """Gives up a posterior's adapters, see ``Engine.release``."""
        await self._adapters.release(key)

    def state(self) -> EngineState:
        """Reports the engine's state."""
        cache = self._cache
        if cache is None:
            return EngineState(False, 0, 0, 0, 0, self._waiting)
        return EngineState(not self._dead, len(cache), cache.loads, cache.hits, cache.evictions, self._waiting)
