from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from abmll.draw_scores import score_draws
from abmll.draws import draw, draw_signs, save_adapter, stack_signs
from abmll.errors import EngineFailure, PosteriorMismatch
from abmll.layers import attach
from abmll.posterior import Posterior
from abmll.sampling import Sampling
from abmll.scoring import Question, option_scores, pack, tokenize
from abmll.sequences import TokenScores
from server.engine import Served
from server.torch_engine import TorchEngine
from tests.server.conftest import TARGETS, greedy, random_posterior
from training.base_model import BaseModel, load_base

T = TypeVar("T")
QUESTIONS = (
    ("the film was a delight", ["positive", "negative"]),
    ("play some music by that band", ["music", "weather in the city", "alarm"]),
    ("two hours", ["yes", "no", "maybe", "i would see it again"]),
)


def with_engine(folder: Path, use: Callable[[TorchEngine], Awaitable[T]], **options: Any) -> T:
    async def run() -> T:
        engine = TorchEngine(str(folder), targets=TARGETS, **options)
        await engine.start()
        try:
            return await use(engine)
        finally:
            await engine.close()

    return asyncio.run(run())


def served(posterior: Posterior) -> Served:
    return Served(posterior.digest(), posterior)


def questions(base: BaseModel, posterior: Posterior) -> list[Question]:
    template = posterior.config.template
    return [tokenize(base.tokenizer, template, p, o, base.context) for p, o in QUESTIONS]


def peft_scores(folder: Path, posterior: Posterior, question: Question, seed: int, index: int, tmp: Path) -> Tensor:
    """Scores options one by one, prompt and option in plain rows, under a saved adapter."""
    save_adapter(draw(posterior, seed, index), posterior, tmp)
    model: Any = PeftModel.from_pretrained(load_base(str(folder)).model, str(tmp)).eval()
    scores: list[Tensor] = []
    for option in question.options:
        ids = torch.tensor([[*question.prompt, *option]])
        with torch.inference_mode():
            logs = model(input_ids=ids).logits.float().log_softmax(-1)[0, len(question.prompt) - 1 : -1]
        scores.append(logs.gather(1, torch.tensor(option)[:, None]).sum())
    return torch.stack(scores)


@pytest.mark.parametrize("family", ["kronecker", "lowrank", "subspace", "mixture"])
def test_scores_are_those_of_peft_with_the_draws_adapters(
    tiny_model_folder: Path, base: BaseModel, tmp_path: Path, family: str
) -> None:
    posterior = random_posterior(tiny_model_folder, 3, family=family)
    asked = questions(base, posterior)

    async def use(engine: TorchEngine) -> list[Tensor]:
        return await asyncio.gather(*(engine.score(served(posterior), q, [0, 5], seed=7) for q in asked))

    for number, (question, scores) in enumerate(zip(asked, with_engine(tiny_model_folder, use), strict=True)):
        for row, index in enumerate([0, 5]):
            expected = peft_scores(tiny_model_folder, posterior, question, 7, index, tmp_path / f"{number}-{index}")
            torch.testing.assert_close(scores[row], expected, atol=1e-4, rtol=1e-5)


def test_concurrent_questions_of_several_posteriors_get_what_they_get_alone(
    tiny_model_folder: Path, base: BaseModel
) -> None:
    posteriors = [random_posterior(tiny_model_folder, seed) for seed in (1, 2)]
    asked = questions(base, posteriors[0])
    cases = [(p, q, seed, n) for p in posteriors for q in asked for seed in (0, 1) for n in ("sum", "mean")]

    async def use(engine: TorchEngine) -> tuple[list[Tensor], list[Tensor]]:
        def ask(posterior: Posterior, question: Question, seed: int, normalize: Any) -> Awaitable[Tensor]:
            return engine.score(served(posterior), question, range(4), seed, normalize)

        alone = [await ask(*case) for case in cases]
        return alone, await asyncio.gather(*(ask(*case) for case in cases))

    alone, together = with_engine(tiny_model_folder, use)
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(alone[0], alone[len(cases) // 2])  # the same question, the other posterior


def test_more_draws_than_a_pass_holds_are_the_same_draws(tiny_model_folder: Path, base: BaseModel) -> None:
    posterior = random_posterior(tiny_model_folder, 1)
    question = questions(base, posterior)[1]

    async def use(engine: TorchEngine) -> Tensor:
        return await engine.score(served(posterior), question, range(9), 0)

    whole = with_engine(tiny_model_folder, use)
    parts = with_engine(tiny_model_folder, use, pass_tokens=40)
    torch.testing.assert_close(whole, parts, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layers", ["all", "last"])
def test_a_beginning_that_questions_share_is_read_once(tiny_model_folder: Path, layers: str) -> None:
    posterior = random_posterior(tiny_model_folder, 1, layers=layers)
    other = random_posterior(tiny_model_folder, 2, layers=layers)
    rng = random.Random(0)
    beginning = tuple(rng.choices(range(5, 60), k=100))
    asked = [Question((*beginning, *rng.choices(range(5, 60), k=9 + n)), ((7, 8), (9,), (7, 10, 11))) for n in range(4)]
    read: list[int] = []

    async def score(engine: TorchEngine, posterior: Posterior, question: Question) -> Tensor:
        return await engine.score(served(posterior), question, range(4), 0)

    async def together(engine: TorchEngine) -> list[Tensor]:
        loaded: Any = engine._base  # pyright: ignore[reportPrivateUsage]
        model = loaded.model
        model.get_input_embeddings().register_forward_hook(lambda module, given, out: read.append(given[0].numel()))
        found = [await score(engine, posterior, question) for question in asked[:2]]
        del read[:]
        found += await asyncio.gather(*(score(engine, posterior, question) for question in asked[2:]))
        assert sum(read) < (1 if layers == "last" else 4) * 2 * 25  # of about 115 tokens a question
        torch.testing.assert_close(await score(engine, other, asked[3]), whole(other, asked[3]), atol=1e-4, rtol=1e-4)
        kept = engine._beginnings  # pyright: ignore[reportPrivateUsage]
        assert len(kept) == 1
        await engine.release(posterior.digest())
        assert len(kept) == 0
        return found

    def whole(posterior: Posterior, question: Question) -> Tensor:
        attached = attach(load_base(str(tiny_model_folder)).model, posterior.config.targets, layers)
        return score_draws(attached, posterior, [question], range(4), 0, normalize="sum")[:, 0]

    for question, found in zip(asked, with_engine(tiny_model_folder, together, layers=layers), strict=True):
        torch.testing.assert_close(found, whole(posterior, question), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("others", [0, 5])
def test_token_log_probs_sum_to_the_options_score(tiny_model_folder: Path, base: BaseModel, others: int) -> None:
    posterior = random_posterior(tiny_model_folder, 1)
    question = questions(base, posterior)[2]
    option = question.options[-1]

    async def use(engine: TorchEngine) -> tuple[TokenScores, Tensor]:
        tokens = engine.score_tokens(served(posterior), question.prompt, option, range(3), 0, others)
        return await asyncio.gather(tokens, engine.score(served(posterior), question, range(3), 0))

    found, scores = with_engine(tiny_model_folder, use)
    assert found.tokens.tolist() == list(option)
    assert found.log_probs.shape == (3, len(option))
    assert found.other_log_probs.shape == (3, len(option), others)
    torch.testing.assert_close(found.log_probs.sum(1), scores[:, -1], atol=1e-5, rtol=1e-5)


def test_likely_tokens_are_the_means_and_scored_under_each_draw_whatever_shares_the_batch(
    tiny_model_folder: Path, base: BaseModel
) -> None:
    posterior = random_posterior(tiny_model_folder, 1)
    texts = [(question.prompt, question.options[-1]) for question in questions(base, posterior)]
    attached = attach(load_base(str(tiny_model_folder)).model, TARGETS)

    async def use(engine: TorchEngine) -> list[TokenScores]:
        asked = [engine.score_tokens(served(posterior), *text, range(3), 0, others=4) for text in texts]
        return await asyncio.gather(*asked)

    for (prompt, option), found in zip(texts, with_engine(tiny_model_folder, use), strict=True):
        ids = torch.tensor([[*prompt, *option[:-1]]])
        with torch.inference_mode(), attached.using(posterior) as model:
            mean: Any = model(input_ids=ids)
        expected = mean.logits[0, len(prompt) - 1 :].topk(4).indices
        assert found.others.tolist() == expected.tolist()
        for index in range(3):
            signs = stack_signs([draw_signs(posterior, 0, index)])
            with torch.inference_mode(), attached.using(posterior, signs) as model:
                drawn: Any = model(input_ids=ids)
            log_probs = drawn.logits[0, len(prompt) - 1 :].log_softmax(-1).gather(-1, expected)
            torch.testing.assert_close(found.other_log_probs[index], log_probs, atol=1e-4, rtol=1e-4)


def test_decoding_is_the_argmax_at_each_step_whatever_shares_the_batch(
    tiny_model_folder: Path, base: BaseModel
) -> None:
    posterior = random_posterior(tiny_model_folder, 1)
    asked = questions(base, posterior)

    async def use(engine: TorchEngine) -> list[list[int]]:
        return await asyncio.gather(*(engine.generate(served(posterior), q.prompt, Sampling(6)) for q in asked))

    from abmll.layers import attach

    fresh = load_base(str(tiny_model_folder))
    attached = attach(fresh.model, posterior.config.targets)
    for question, tokens in zip(asked, with_engine(tiny_model_folder, use), strict=True):
        with attached.using(posterior) as model:
            assert tokens == greedy(model, question.prompt, 6, base.tokenizer.eos_token_id)


def test_tokens_are_told_as_they_come_with_their_probability_each_text_to_its_own_reader(
    tiny_model_folder: Path, base: BaseModel
) -> None:
    posterior = random_posterior(tiny_model_folder, 1)
    asked = questions(base, posterior)
    told: dict[int, list[tuple[int, float]]] = {number: [] for number in range(len(asked))}

    async def use(engine: TorchEngine) -> list[list[int]]:
        def ask(number: int, temperature: float) -> Any:
            tell = None if number == 1 else lambda *of: told[number].append(of)
            sampling = Sampling(6 + number, temperature=temperature, seed=5)
            return engine.generate(served(posterior), asked[number].prompt, sampling, tell)

        cold = await asyncio.gather(*(ask(number, 0.0) for number in range(len(asked))))
        told[0].clear()
        return [await ask(0, 1.5), *cold[1:]]

    texts = with_engine(tiny_model_folder, use)
    attached = attach(load_base(str(tiny_model_folder)).model, TARGETS)
    for number, tokens in enumerate(texts):
        if number == 1:
            assert told[number] == []
            continue
        assert [token for token, _ in told[number]] == tokens
        alone = Question(asked[number].prompt, (tuple(tokens),))
        whole = score_draws(attached, posterior, [alone], [], 0, normalize="sum").item()
        assert sum(log_prob for _, log_prob in told[number]) == pytest.approx(whole, abs=1e-3)  # before temperature


def test_the_mean_of_a_zero_posterior_is_the_base_model(tiny_model_folder: Path, base: BaseModel) -> None:
    posterior = random_posterior(tiny_model_folder, 1, noise=0.0)
    silent = posterior.with_tensors(
        {key: t - 60.0 if ".scale.log" in key else torch.zeros_like(t) for key, t in posterior.tensors().items()}
    )
    asked = questions(base, posterior)

    async def use(engine: TorchEngine) -> Tensor:
        return await engine.score(served(silent), asked[0], [0], 0)

    with torch.inference_mode():
        expected = option_scores(base.model, pack(asked[:1]))
    torch.testing.assert_close(with_engine(tiny_model_folder, use), expected, atol=1e-5, rtol=1e-5)


def test_closing_fails_what_is_under_way_and_what_comes_later(tiny_model_folder: Path, base: BaseModel) -> None:
    posterior = random_posterior(tiny_model_folder, 1)
    question = questions(base, posterior)[0]

    async def run() -> list[Any]:
        engine = TorchEngine(str(tiny_model_folder), targets=TARGETS)
        await engine.start()
        asked = [asyncio.create_task(engine.score(served(posterior), question, range(8), s)) for s in range(20)]
        await asyncio.sleep(0)
        await engine.close()
        with pytest.raises(EngineFailure):
            await engine.score(served(posterior), question, [0], 0)
        assert not engine.state().healthy
        return await asyncio.gather(*asked, return_exceptions=True)

    for result in asyncio.run(run()):
        assert isinstance(result, EngineFailure | Tensor)


def test_a_posterior_over_other_layers_is_refused_and_the_engine_goes_on(
    tiny_model_folder: Path, base: BaseModel
) -> None:
    posterior = random_posterior(tiny_model_folder, 1)
    other = Posterior(posterior.config, dict(list(posterior.layers.items())[:1]))
    question = questions(base, posterior)[0]

    async def use(engine: TorchEngine) -> Tensor:
        await engine.score(served(posterior), question, [0], 0)
        with pytest.raises(PosteriorMismatch):
            await engine.score(served(other), question, [0], 0)
        return await engine.score(served(posterior), question, [0], 0)

    assert torch.isfinite(with_engine(tiny_model_folder, use)).all()


def test_a_text_under_each_draw_is_that_draws_own_whatever_shares_the_batch(
    tiny_model_folder: Path, base: BaseModel
) -> None:
    posterior = random_posterior(tiny_model_folder, 1)
    asked = questions(base, posterior)
    cold, warm = Sampling(6, temperature=1e-4), Sampling(6, temperature=1.5, seed=3)

    async def use(engine: TorchEngine) -> list[Any]:
        def sample(question: Question, sampling: Sampling) -> Any:
            return engine.sample(served(posterior), question.prompt, sampling, range(3), 0)

        likeliest = await asyncio.gather(*(sample(question, cold) for question in asked))
        together = await asyncio.gather(*(sample(question, warm) for question in asked))
        alone = [await sample(question, warm) for question in asked]
        other = await sample(asked[0], replace(warm, seed=4))
        mean = [
            await engine.generate(served(posterior), asked[0].prompt, sampling)
            for sampling in (warm, warm, replace(warm, seed=4))
        ]
        return [likeliest, together, alone, other, mean]

    likeliest, together, alone, other, mean = with_engine(tiny_model_folder, use)
    assert together == alone
    assert other != alone[0]
    assert mean[0] == mean[1] != mean[2]
    attached = attach(load_base(str(tiny_model_folder)).model, TARGETS)
    for question, texts in zip(asked, likeliest, strict=True):
        for index, tokens in enumerate(texts):
            signs = stack_signs([draw_signs(posterior, 0, index)])
            with attached.using(posterior, signs) as model:
                assert tokens == greedy(model, question.prompt, 6, base.tokenizer.eos_token_id)
