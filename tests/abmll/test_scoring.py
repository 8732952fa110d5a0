"""Packed scoring beside plain rows of prompt and option."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from abmll.draw_scores import score_draws
from abmll.draws import draw_signs, stack_signs
from abmll.errors import PromptTooLong
from abmll.examples import Template
from abmll.layers import Attached, attach
from abmll.posterior import Normalize
from abmll.scoring import Question, option_scores, pack, tokenize
from tests.abmll.conftest import ARCHITECTURES, random_posterior, tiny_model

QUESTIONS = [
    Question((5, 9, 33), ((2,), (7,))),
    Question((71, 14, 3, 6, 20, 44, 45), ((2, 3), (2, 4, 5), (40,))),
    Question((1,), ((7, 8, 9, 10), (7, 8, 9, 11), (7, 8), (50,), (60, 61))),
    Question(tuple(range(1, 22)), ((7, 8, 9), (10, 11))),  # longer than the windows of some
]


def plain(model: Any, question: Question, normalize: Normalize) -> Tensor:
    scores: list[Tensor] = []
    for option in question.options:
        ids = torch.tensor([[*question.prompt, *option]])
        with torch.no_grad():
            logs = model(input_ids=ids).logits.float().log_softmax(-1)[0, len(question.prompt) - 1 : -1]
        each = logs.gather(1, torch.tensor(option)[:, None])
        scores.append(each.sum() if normalize == "sum" else each.mean())
    return torch.stack(scores)


def model_of(architecture: str) -> Any:
    if architecture == "gpt2":
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=4)).eval()
    if architecture == "mistral with a window":
        config = MistralConfig(
            vocab_size=96, max_position_embeddings=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, sliding_window=8,
        )  # fmt: skip
        torch.manual_seed(0)
        return MistralForCausalLM(config).eval()
    return tiny_model(architecture)


@pytest.mark.parametrize(
    "architecture",
    ["llama", "llama3", "mistral", "mistral with a window", "qwen2", "gemma2", "gpt2", "gpt_neox"],
)
@pytest.mark.parametrize("normalize", ["sum", "mean"])
def test_a_pack_scores_each_option_as_if_alone(architecture: str, normalize: Normalize) -> None:
    model = model_of(architecture)
    with torch.no_grad():
        scores = option_scores(model, pack(QUESTIONS), normalize)
    for row, question in zip(scores, QUESTIONS, strict=True):
        count = len(question.options)
        torch.testing.assert_close(row[:count], plain(model, question, normalize), atol=1e-4, rtol=1e-4)
        assert (row[count:] == -torch.inf).all()


def test_single_token_options_need_no_mask() -> None:
    single = [QUESTIONS[0], Question((9, 9, 9, 9), ((1,), (2,), (3,)))]
    batch = pack(single)
    assert batch.mask is None
    model = tiny_model("llama")
    with torch.no_grad():
        scores = option_scores(model, batch)
    torch.testing.assert_close(scores[1], plain(model, single[1], "sum"), atol=1e-4, rtol=1e-4)


def test_scores_under_draws_are_those_of_each_draw_alone(llama: Attached) -> None:
    posterior = random_posterior(llama, "kronecker", ("q_proj", "v_proj"), 1)
    together = score_draws(llama, posterior, QUESTIONS, [0, 4], 7, normalize="sum")
    narrow = score_draws(llama, posterior, QUESTIONS, [0, 4], 7, normalize="sum", max_tokens=8)
    torch.testing.assert_close(together, narrow, atol=1e-4, rtol=1e-4)
    for row, index in enumerate((0, 4)):
        for column, question in enumerate(QUESTIONS):
            with llama.using(posterior, stack_signs([draw_signs(posterior, 7, index)])) as model:
                expected = plain(model, question, "sum")
            found = together[row, column, : len(question.options)]
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_trunk_runs_once_and_the_scores_are_those_of_each_draw_alone(architecture: str) -> None:
    targets = ARCHITECTURES[architecture]
    attached = attach(tiny_model(architecture), targets, "last")
    assert (attached.trunk, attached.shares_trunk) == (1, True)
    posterior = random_posterior(attached, "kronecker", targets, 1)
    rows: list[int] = []
    first = attached.model.get_submodule(next(iter(attached.layers)).split(".1.")[0] + ".0")
    hook = first.register_forward_hook(lambda module, given, result: rows.append(given[0].shape[0]))
    together = score_draws(attached, posterior, QUESTIONS, range(4), 7)
    assert rows == [len(QUESTIONS)]
    hook.remove()
    attached.shares_trunk = False
    torch.testing.assert_close(together, score_draws(attached, posterior, QUESTIONS, range(4), 7), atol=1e-4, rtol=1e-4)
    assert (together[0] - together[1]).nan_to_num().abs().max() > 1e-3


def test_a_model_that_does_not_hand_repeated_rows_on_runs_all_draws_whole() -> None:
    model = tiny_model("llama")
    # As GPT-J's decoder does, for one.
    model.model.norm.register_forward_pre_hook(lambda module, given: (given[0].view(2, 3, -1),))
    assert not attach(model, ("q_proj",), "last").shares_trunk
    assert not attach(tiny_model("llama"), ("q_proj",)).shares_trunk


class _Letters:
    """A token for each character."""

    pad_token_id: int | None = 0
    eos_token_id: int | None = 0

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [0] * add_special_tokens + [ord(letter) for letter in text]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return "".join(map(chr, token_ids))


def test_prompt_and_longest_option_must_fit_the_context() -> None:
    template = Template(suffix="?", separator=" ")
    question = tokenize(_Letters(), template, "abc ", ["d", "efg"], 9)
    assert question.prompt == (0, *map(ord, "abc?"))
    assert question.options == ((32, 100), (32, 101, 102, 103))
    with pytest.raises(PromptTooLong, match="are 9 tokens; there is room for 8") as caught:
        tokenize(_Letters(), template, "abc ", ["d", "efg"], 8)
    assert caught.value.field == "prompt"
    with pytest.raises(PromptTooLong, match=r"prompt \(3\) and longest option \(7\).*shorten the option") as caught:
        tokenize(_Letters(), template, "a", ["d", "efghij"], 8)
    assert caught.value.field == "options"


def test_passes_are_as_large_as_they_may_be(llama: Attached) -> None:
    options = tuple(tuple(range(10 + number, 16 + number)) for number in range(12))
    few, many = Question((1, 2, 3), ((4,), (5,))), Question((1, 2, 3), options)
    assert (few.packed, many.packed, many.longest) == (3, 63, 9)
    posterior = random_posterior(llama, "kronecker", ("q_proj", "v_proj"), 1)
    sizes: list[int] = []
    model: Any = llama.model
    embedding = model.get_input_embeddings()
    hook = embedding.register_forward_pre_hook(lambda _, given: sizes.append(given[0].numel()))
    with hook:
        score_draws(llama, posterior, [many, few, many, few, many], [0, 1], 0, max_tokens=140)
    # Two draws each: both short ones in one pass, and each long one alone.
    assert sizes == [2 * 2 * 3, 2 * 63, 2 * 63, 2 * 63]
