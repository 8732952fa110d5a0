"""Our LoRA functions for the CPU beside vLLM's own."""

from __future__ import annotations

import importlib
import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from server import segmented_lora
from server.segmented_lora import REPLACEMENTS, difference, install

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM exists for Linux only")


def originals() -> Any:
    return importlib.import_module("vllm.lora.ops.torch_ops")


def runs(lengths: list[int], adapters: list[int]) -> list[Any]:
    sizes = torch.tensor(lengths)
    return [sizes.cumsum(0) - sizes, sizes, torch.tensor(adapters), len(lengths), max(lengths), sum(lengths)]


@needs_vllm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[1], [5], [2, 7, 1, 3]])
def test_shrink_and_expand_are_those_of_vllm(dtype: torch.dtype, lengths: list[int]) -> None:
    generator = torch.Generator().manual_seed(sum(lengths))
    tokens, rank, width, slots = sum(lengths), 8, 32, 4
    meta = runs(lengths, torch.randint(0, slots, (len(lengths),), generator=generator).tolist())
    x = torch.randn(tokens, width, generator=generator).to(dtype)
    a = torch.randn(slots, 1, rank, width, generator=generator).to(dtype)
    b = torch.randn(slots, 1, width, rank, generator=generator).to(dtype)
    start = torch.randn(tokens, 3 * width, generator=generator).to(dtype)
    results: list[torch.Tensor] = []
    for module in (originals(), segmented_lora):
        inner, output = torch.zeros(tokens, rank), start.clone()
        module.sgmv_shrink(x, a, inner, *meta, 2.0)
        module.sgmv_expand_slice(inner, b, output, *meta, width, width, True)
        module.sgmv_expand(inner, b, output, *meta, False)
        results += [inner, output]
    # The sums' order differs, and bf16 rounds once before the addition or after it.
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(results[0], results[2], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(results[1], results[3], atol=10 * tolerance, rtol=tolerance)
    assert torch.equal(results[3][:, 2 * width :], start[:, 2 * width :])
    assert not torch.equal(results[3][:, width : 2 * width], start[:, width : 2 * width])


def test_a_token_without_adapter_keeps_what_the_base_model_gave() -> None:
    meta = runs([2, 3], [-1, 1])
    inner, output = torch.zeros(5, 4), torch.ones(5, 6)
    module: Any = segmented_lora
    module.sgmv_shrink(torch.ones(5, 6), torch.ones(2, 1, 4, 6), inner, *meta, 1.0)
    module.sgmv_expand_slice(inner, torch.ones(2, 1, 6, 4), output, *meta, 0, 6, True)
    assert torch.equal(output[:2], torch.ones(2, 6))
    assert torch.equal(output[2:], torch.full((3, 6), 25.0))


@needs_vllm
def test_the_installed_vllm_takes_the_replacements() -> None:
    module = SimpleNamespace(**{name: getattr(originals(), name) for name in REPLACEMENTS})
    assert install(module) is None
    assert all(getattr(module, name) is function for name, function in REPLACEMENTS.items())


@needs_vllm
def test_another_version_keeps_its_own_code() -> None:
    def module(**changed: Any) -> Any:
        return SimpleNamespace(**({name: getattr(originals(), name) for name in REPLACEMENTS} | changed))

    def fewer(inputs: Any, lora_a_weights: Any) -> None: ...

    def twice(
        inputs: Any,
        lora_a_weights: Any,
        output_tensor: Any,
        b_seq_start_loc: Any,
        seq_len_tensor: Any,
        lora_indices_tensor: Any,
        batches: Any,
        max_seq_length: Any,
        token_nums: Any,
        scaling: Any,
    ) -> None:
        parts = (b_seq_start_loc, seq_len_tensor, lora_indices_tensor, batches, max_seq_length, token_nums)
        originals().sgmv_shrink(inputs, lora_a_weights, output_tensor, *parts, 2 * scaling)

    absent = SimpleNamespace()
    for other, reason in ((module(sgmv_shrink=fewer), "arguments"), (module(sgmv_shrink=twice), "something else")):
        before = dict(vars(other))
        found = install(other)
        assert found is not None
        assert reason in found
        assert vars(other) == before
    assert difference(absent, "sgmv_expand") == "this version of vLLM has no sgmv_expand"
