from __future__ import annotations

import importlib.util

import pytest

from abmll.errors import AbmllError
from server.vllm_setup import adapter_rank, check_options, fused, parse_options

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM exists for Linux only")


def test_arguments_of_the_engine_are_read_as_json_where_they_are_json() -> None:
    texts = ["gpu_memory_utilization=0.5", "tensor-parallel-size=2", "load_format=dummy", "a=b=c", 'x={"y": true}']
    assert parse_options(texts) == {
        "gpu_memory_utilization": 0.5,
        "tensor_parallel_size": 2,
        "load_format": "dummy",
        "a": "b=c",
        "x": {"y": True},
    }
    for wrong in ("tensor_parallel_size", "=2"):
        with pytest.raises(AbmllError, match="is not NAME=VALUE"):
            parse_options([wrong])
    with pytest.raises(AbmllError, match="seed is given twice"):
        parse_options(["seed=1", "seed=2"])


@needs_vllm
def test_arguments_that_vllm_does_not_have_or_abmll_sets() -> None:
    check_options({"gpu_memory_utilization": 0.5, "tensor_parallel_size": 2})
    with pytest.raises(AbmllError, match="no argument tensor_paralel_size; did you mean tensor_parallel_size"):
        check_options({"tensor_paralel_size": 2})
    for name in ("enable_lora", "logprobs_mode", "worker_extension_cls"):
        with pytest.raises(AbmllError, match=f"{name} is set by abmll itself"):
            check_options({name: False})


def test_ranks_and_names_as_vllm_knows_them() -> None:
    assert [adapter_rank(rank) for rank in (1, 2, 8, 9, 300)] == [1, 8, 8, 16, 320]
    with pytest.raises(AbmllError, match="at most 512"):
        adapter_rank(513)
    assert [fused(name) for name in ("q_proj", "up_proj", "o_proj")] == ["qkv_proj", "gate_up_proj", "o_proj"]
