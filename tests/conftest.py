"""A tiny Llama with a tokenizer of its own, made once a session; and the command line."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import hypothesis
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.command_line import CommandLine

# Processes that tests start are forked from one that has imported these: imports are most of a start.
multiprocessing.get_context("forkserver").set_forkserver_preload(
    [
        "pytest",
        "server.run",
        "server.torch_engine",
        "training.base_model",
        "training.benchmark.catalogue",
        "training.benchmark.pictures",
        "training.benchmark.run",
        "training.meta",
        "transformers.models.llama",
    ]
)

# A busy machine is no fault of the code.
hypothesis.settings.register_profile("abmll", deadline=None)
hypothesis.settings.load_profile("abmll")

_CORPUS = (
    "the film was a delight and i would see it again",
    "two hours that i will not get back",
    "please set an alarm for seven tomorrow morning",
    "play some music by that band from the radio",
    "what will the weather be like in the city",
    "positive negative neutral sports business science world",
    "Answer: yes no maybe",
)


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS * 20, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)  # larger than at initialization, so that answers differ from uniform
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def abmll(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    monkeypatch.setenv("COLUMNS", "100")
    return CommandLine(monkeypatch, capsys)
