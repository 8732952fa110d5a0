"""The real vLLM beside the same posterior in transformers."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
import torch
from torch import Tensor

import server.vllm_engine
from abmll.draw_scores import score_draws
from abmll.draws import draw_signs, stack_signs
from abmll.errors import EngineFailure
from abmll.layers import Attached, attach
from abmll.posterior import Posterior
from abmll.sampling import Sampling
from abmll.scoring import Question, tokenize
from abmll.sequences import TokenScores
from server.engine import Served
from server.local_server import processes_below
from server.texts import until_stop
from server.vllm_engine import VllmEngine
from tests.architectures import write_model
from tests.server.conftest import TARGETS, greedy, random_posterior
from training.base_model import BaseModel, load_base

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM exists for Linux only"),
    pytest.mark.filterwarnings("ignore"),  # vLLM's own, in its import and start
    pytest.mark.slow,
]
T = TypeVar("T")


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0.0)


class Loop:
    """An event loop in a thread, which outlives single tests as a server's does."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(480)


@pytest.fixture(scope="module")
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.loop.call_soon_threadsafe(made.loop.stop)


def start(loop: Loop, folder: Path, **options: Any) -> VllmEngine:
    posterior = random_posterior(folder, 1)
    engine = VllmEngine(str(folder), targets=posterior.config.targets, max_rank=16, slots=3, **options)
    loop.run(engine.start())
    return engine


@pytest.fixture(scope="module")
def engine(loop: Loop, tiny_model_folder: Path) -> Iterator[VllmEngine]:
    made = start(loop, tiny_model_folder)
    yield made
    loop.run(made.close())
    assert not made.state().healthy


@pytest.fixture(scope="module")
def reference(tiny_model_folder: Path) -> tuple[BaseModel, Attached]:
    base = load_base(str(tiny_model_folder))
    return base, attach(base.model, TARGETS)


def served(posterior: Posterior) -> Served:
    return Served(posterior.digest(), posterior)


def questions(base: BaseModel, posterior: Posterior) -> list[Question]:
    asked = [
        ("the film was a delight", ["positive", "negative"]),
        ("play some music by that band from the radio " * 3, ["music", "weather in the city", "alarm"]),
        ("two hours", ["yes", "no", "maybe", "i would see it again"]),
    ]
    return [tokenize(base.tokenizer, posterior.config.template, p, o, base.context) for p, o in asked]


def expected(attached: Attached, posterior: Posterior, question: Question, draws: range, seed: int) -> Tensor:
    return score_draws(attached, posterior, [question], draws, seed, normalize="sum")[:, 0]


def test_lora_on_the_cpu_runs_by_our_code(engine: VllmEngine) -> None:
    assert engine.slow_lora is None


@pytest.mark.parametrize("family", ["kronecker", "lowrank", "subspace", "mixture"])
def test_scores_are_those_of_the_torch_model(
    loop: Loop, engine: VllmEngine, reference: tuple[BaseModel, Attached], tiny_model_folder: Path, family: str
) -> None:
    base, attached = reference
    posterior = random_posterior(tiny_model_folder, 3, family=family)
    for question in questions(base, posterior):
        scores = loop.run(engine.score(served(posterior), question, range(4), 7))
        assert_close(scores, expected(attached, posterior, question, range(4), 7))
        means = loop.run(engine.score(served(posterior), question, range(4), 7, "mean"))
        lengths = torch.tensor([len(option) for option in question.options])
        assert_close(means * lengths, scores)


# Biases; capped scores, windows and tied embeddings. A start takes a minute: the other architectures have no test here.
@pytest.mark.parametrize("architecture", ["qwen2", "gemma-2"])
def test_scores_of_other_architectures_are_those_of_the_torch_model(
    loop: Loop, architecture: str, tiny_model_folder: Path, tmp_path: Path
) -> None:
    folder = write_model(architecture, tiny_model_folder, tmp_path / "model")
    base = load_base(str(folder))
    attached, posterior = attach(base.model, TARGETS), random_posterior(folder, 3)
    engine = start(loop, folder)
    try:
        for question in questions(base, posterior):
            scores = loop.run(engine.score(served(posterior), question, range(4), 7))
            assert_close(scores, expected(attached, posterior, question, range(4), 7))
            assert (scores[0] - scores[1]).abs().max() > 1e-2  # draws do something
    finally:
        loop.run(engine.close())


def test_a_posterior_over_the_top_block_alone_is_served(
    loop: Loop, engine: VllmEngine, tiny_model_folder: Path
) -> None:
    base = load_base(str(tiny_model_folder))
    attached = attach(base.model, TARGETS, "last")
    posterior = random_posterior(tiny_model_folder, 5, layers="last")
    for question in questions(base, posterior):
        scores = loop.run(engine.score(served(posterior), question, range(4), 7))
        assert_close(scores, expected(attached, posterior, question, range(4), 7))


def test_concurrent_questions_of_several_posteriors_do_not_mix(
    loop: Loop, engine: VllmEngine, reference: tuple[BaseModel, Attached], tiny_model_folder: Path
) -> None:
    base, attached = reference
    posteriors = [random_posterior(tiny_model_folder, seed) for seed in (11, 12)]
    cases = [(p, q, seed) for p in posteriors for q in questions(base, posteriors[0]) for seed in (0, 1)]

    async def ask() -> list[Tensor]:
        return await asyncio.gather(*(engine.score(served(p), q, range(3), seed) for p, q, seed in cases))

    for scores, (posterior, question, seed) in zip(loop.run(ask()), cases, strict=True):
        assert_close(scores, expected(attached, posterior, question, range(3), seed))


def test_scores_stay_right_when_adapters_are_given_up_and_made_again(
    loop: Loop, engine: VllmEngine, reference: tuple[BaseModel, Attached], tiny_model_folder: Path
) -> None:
    base, attached = reference
    question = questions(base, random_posterior(tiny_model_folder, 1))[1]
    # More adapters than vLLM's slots (3) and its memory (12) hold.
    posteriors = [random_posterior(tiny_model_folder, seed) for seed in range(20, 26)]
    for again in range(2):
        for posterior in posteriors:
            scores = loop.run(engine.score(served(posterior), question, range(4), 0))
            assert_close(scores, expected(attached, posterior, question, range(4), 0))
            if not again:
                before = engine.state()
                loop.run(engine.release(served(posterior).key))
                after = engine.state()
                assert (after.adapters, after.evictions) == (before.adapters - 4, before.evictions + 4)


def test_free_text_is_the_torch_models_and_its_tokens_scores_too(
    loop: Loop,
    engine: VllmEngine,
    reference: tuple[BaseModel, Attached],
    tiny_model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, attached = reference
    posterior = random_posterior(tiny_model_folder, 5)
    question = questions(base, posterior)[0]
    tokens = loop.run(engine.generate(served(posterior), question.prompt, Sampling(6)))
    with attached.using(posterior) as model:
        assert tokens == greedy(model, question.prompt, 6, base.tokenizer.eos_token_id)
    assert tokens
    said = base.tokenizer.decode(tokens)
    stop = said[len(said) // 2 :][:2]
    cut, text, stopped = until_stop(
        base.tokenizer, loop.run(engine.generate(served(posterior), question.prompt, Sampling(6, (stop,)))), [stop]
    )
    assert stopped
    assert cut == tokens[: len(cut)]
    assert text == said[: said.index(stop)]
    each = loop.run(engine.score_tokens(served(posterior), question.prompt, tokens, range(2), 0, others=7))
    whole = expected(attached, posterior, Question(question.prompt, (tuple(tokens), (1,))), range(2), 0)[:, 0]
    assert_close(each.log_probs.sum(1), whole)
    for longest in (server.vllm_engine.READ_TOKENS, 0):  # read in one pass a draw, or asked place by place
        monkeypatch.setattr(server.vllm_engine, "READ_TOKENS", longest)
        plain = loop.run(engine.score_tokens(served(posterior), question.prompt, tokens, range(2), 0))
        assert_close(plain.log_probs, each.log_probs)
        assert plain.tokens.tolist() == tokens
        assert (plain.others.shape, plain.other_log_probs.shape) == ((len(tokens), 0), (2, len(tokens), 0))
    assert each.others.shape == (len(tokens), 7)
    assert each.others[:, 0].tolist() == tokens  # decoding was greedy
    for at, others in enumerate(each.others.tolist()):
        before = (*question.prompt, *tokens[:at])
        likely = expected(attached, posterior, Question(before, tuple((token,) for token in others)), range(2), 0)
        assert_close(each.other_log_probs[:, at], likely)


def test_texts_under_draws_are_the_torch_models_and_come_again_by_their_seed(
    loop: Loop, engine: VllmEngine, reference: tuple[BaseModel, Attached], tiny_model_folder: Path
) -> None:
    base, attached = reference
    posterior = random_posterior(tiny_model_folder, 6)
    question = questions(base, posterior)[0]

    def sample(sampling: Sampling) -> list[list[int]]:
        return loop.run(engine.sample(served(posterior), question.prompt, sampling, range(2), 0))

    for index, tokens in enumerate(sample(Sampling(6))):
        signs = stack_signs([draw_signs(posterior, 0, index)])
        with attached.using(posterior, signs) as model:
            assert tokens == greedy(model, question.prompt, 6, base.tokenizer.eos_token_id)
    warm = Sampling(6, temperature=1.5, top_p=0.95, seed=3)
    assert sample(warm) == sample(warm) != sample(Sampling(6, temperature=1.5, top_p=0.95, seed=4))


def test_likely_tokens_are_the_same_while_options_are_scored(
    loop: Loop, engine: VllmEngine, reference: tuple[BaseModel, Attached], tiny_model_folder: Path
) -> None:
    base, _ = reference
    posterior = random_posterior(tiny_model_folder, 1)
    question = questions(base, posterior)[0]
    text = question.options[-1]

    async def look() -> TokenScores:
        return await engine.score_tokens(served(posterior), question.prompt, text, range(2), 0, others=6)

    async def together() -> list[Any]:
        others = [engine.score(served(posterior), asked, range(4), 3) for asked in questions(base, posterior)]
        return await asyncio.gather(look(), *others, look(), look())

    alone = loop.run(look())
    for found in loop.run(together()):
        if isinstance(found, TokenScores):
            assert found.others.tolist() == alone.others.tolist()
            assert_close(found.other_log_probs, alone.other_log_probs)
    nothing = loop.run(engine.score_tokens(served(posterior), question.prompt, [], range(2), 0, others=6))
    assert nothing.log_probs.shape == (2, 0)


def test_tokens_are_told_as_they_come_with_their_probability_while_options_are_scored(
    loop: Loop, engine: VllmEngine, reference: tuple[BaseModel, Attached], tiny_model_folder: Path
) -> None:
    base, attached = reference
    posterior = random_posterior(tiny_model_folder, 6)
    asked = questions(base, posterior)
    told: list[tuple[int, float]] = []

    async def together() -> list[Any]:
        others = [engine.score(served(posterior), question, range(4), 3) for question in asked]
        text = engine.generate(served(posterior), asked[0].prompt, Sampling(12), lambda *of: told.append(of))
        return await asyncio.gather(text, *others)

    tokens = loop.run(together())[0]
    assert [token for token, _ in told] == tokens
    alone = Question(asked[0].prompt, (tuple(tokens),))
    whole = score_draws(attached, posterior, [alone], [], 0, normalize="sum").item()
    assert sum(log_prob for _, log_prob in told) == pytest.approx(whole, abs=1e-3)


def test_a_text_that_is_given_up_keeps_its_adapter_until_vllm_knows(
    loop: Loop,
    engine: VllmEngine,
    reference: tuple[BaseModel, Attached],
    tiny_model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    posterior = served(random_posterior(tiny_model_folder, 31))
    prompt = questions(reference[0], posterior.posterior)[1].prompt
    llm, cache = engine._llm, engine._adapters  # pyright: ignore[reportPrivateUsage]
    there: list[bool] = []
    abort = llm.abort

    async def aborted(*given: Any, **named: Any) -> None:
        await asyncio.sleep(0.05)
        there.append(any(posterior.key in path.name for path in cache.folder.iterdir()))
        await abort(*given, **named)

    async def leave() -> None:
        monkeypatch.setattr(llm, "abort", aborted)
        monkeypatch.setattr(cache, "budget", 0)
        begun = asyncio.Event()
        tell: Any = lambda *_: begun.set()  # noqa: E731
        asking = asyncio.create_task(engine.generate(posterior, prompt, Sampling(150), tell))
        await asyncio.wait_for(begun.wait(), 60)
        asking.cancel()
        await asyncio.wait([asking])
        assert asking.cancelled()

    loop.run(leave())
    assert there == [True]
    assert not [path for path in cache.folder.iterdir() if posterior.key in path.name]


def test_a_dead_engine_fails_its_requests_at_once_and_says_so(
    loop: Loop, engine: VllmEngine, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last here: it kills what the others ask, as another engine would be half a minute's start."""
    posterior = random_posterior(tiny_model_folder, 1)
    question = Question((1, 2, 3), ((4,), (5,)))
    loop.run(engine.score(served(posterior), question, range(2), 0))

    async def forgotten(*_: Any, **__: Any) -> AsyncIterator[Any]:
        """What vLLM does with a request that it takes in while its engine dies."""
        await asyncio.Event().wait()
        yield

    async def ask() -> Tensor:
        return await engine.score(served(posterior), question, range(2), 0)

    with monkeypatch.context() as patched:
        patched.setattr(engine._llm, "generate", forgotten)  # pyright: ignore[reportPrivateUsage]
        waiting = asyncio.run_coroutine_threadsafe(ask(), loop.loop)
        with pytest.raises(TimeoutError):
            waiting.result(3)  # a living engine may take its time
    for process in processes_below(os.getpid(), "VLLM::"):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    begin = time.monotonic()
    with pytest.raises(EngineFailure):
        loop.run(engine.score(served(posterior), question, range(2, 4), 0))
    with pytest.raises(EngineFailure):
        waiting.result(30)
    assert time.monotonic() - begin < 30
    assert not engine.state().healthy
    loop.run(engine.close())
