"""Multi-LoRA on the CPU by one matrix product for each run of tokens of the same adapter.

vLLM's CPU path copies an adapter's whole matrix for every token before it multiplies. The tokens of a request lie
together and share an adapter, so a product for each run of them gives the same numbers without the copies. The
functions have the signatures of ``vllm.lora.ops.torch_ops``, so that they could take those functions' place there.

They are put in place in vLLM's worker process, and only where the installed version has the functions that they
replace and gives the same numbers on random input. A token without an adapter (index -1) is left as the base model
has it; vLLM's own code gives it whatever lies in the last slot.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

_HOME = "vllm.lora.punica_wrapper.punica_cpu"
_TOLERANCE = 1e-4


def _runs(starts: Tensor, lengths: Tensor, adapters: Tensor, batches: int) -> Iterator[tuple[slice, int]]:
    """Yields the rows and the adapter of each run, those without an adapter left out."""
    rows = zip(starts[:batches].tolist(), lengths[:batches].tolist(), adapters[:batches].tolist(), strict=True)
    for start, length, adapter in rows:
        if adapter >= 0:
            yield slice(start, start + length), adapter


def _matrix(weights: Tensor, adapter: int, dtype: torch.dtype) -> Tensor:
    """Returns an adapter's matrix, shape (out, in), of weights (slots, out, in) or (slots, 1, out, in)."""
    matrix = weights[adapter]
    return (matrix[0] if matrix.ndim == 3 else matrix).to(dtype)


def sgmv_shrink(
    inputs: Tensor,
    lora_a_weights: Tensor,
    output_tensor: Tensor,
    b_seq_start_loc: Tensor,
    seq_len_tensor: Tensor,
    lora_indices_tensor: Tensor,
    batches: int,
    max_seq_length: int,
    token_nums: int,
    scaling: float,
) -> None:
    """Sets output[rows] = scaling * input[rows] A_i^T for each run of rows of adapter i.

    Args:
        inputs: Activations, shape (tokens, d_in).
        lora_a_weights: All adapters' A, shape (slots, 1, rank, d_in).
        output_tensor: Receives the result, shape (tokens, rank or more).
        b_seq_start_loc: First row of each run, shape (runs,).
        seq_len_tensor: Rows of each run, shape (runs,).
        lora_indices_tensor: Adapter slot of each run, shape (runs,); -1 for none.
        batches: Number of runs.
        max_seq_length: Unused; part of the signature.
        token_nums: Unused; part of the signature.
        scaling: Factor.
    """
    for rows, adapter in _runs(b_seq_start_loc, seq_len_tensor, lora_indices_tensor, batches):
        a = _matrix(lora_a_weights, adapter, output_tensor.dtype)
        output_tensor[rows, : a.shape[0]] = scaling * (inputs[rows].to(output_tensor.dtype) @ a.T)


def sgmv_expand(
    inputs: Tensor,
    lora_b_weights: Tensor,
    output_tensor: Tensor,
    b_seq_start_loc: Tensor,
    seq_len_tensor: Tensor,
    lora_indices_tensor: Tensor,
    batches: int,
    max_seq_length: int,
    token_nums: int,
    add_inputs: bool = False,
) -> None:
    """Adds input[rows] B_i^T to output[rows], or sets it, for each run of rows of adapter i.

    Args:
        inputs: What ``sgmv_shrink`` gave, shape (tokens, rank).
        lora_b_weights: All adapters' B, shape (slots, 1, d_out, rank).
        output_tensor: Receives the result, shape (tokens, d_out); it may be padded to more or fewer columns.
        b_seq_start_loc: First row of each run, shape (runs,).
        seq_len_tensor: Rows of each run, shape (runs,).
        lora_indices_tensor: Adapter slot of each run, shape (runs,); -1 for none.
        batches: Number of runs.
        max_seq_length: Unused; part of the signature.
        token_nums: Unused; part of the signature.
        add_inputs: Whether to add to what is there.
    """
    width = min(lora_b_weights.shape[-2], output_tensor.shape[1])
    runs = (b_seq_start_loc, seq_len_tensor, lora_indices_tensor, batches, max_seq_length, token_nums)
    sgmv_expand_slice(inputs, lora_b_weights[..., :width, :], output_tensor, *runs, 0, width, add_inputs)


def sgmv_expand_slice(
    inputs: Tensor,
    lora_b_weights: Tensor,
    output_tensor: Tensor,
    b_seq_start_loc: Tensor,
    seq_len_tensor: Tensor,
    lora_indices_tensor: Tensor,
    batches: int,
    max_seq_length: int,
    token_nums: int,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = False,
) -> None:
    """As ``sgmv_expand``, into the columns from ``slice_offset`` on, ``slice_size`` of them."""
    columns = slice(slice_offset, slice_offset + slice_size)
    for rows, adapter in _runs(b_seq_start_loc, seq_len_tensor, lora_indices_tensor, batches):
        b = _matrix(lora_b_weights, adapter, output_tensor.dtype)
        target = output_tensor[rows, columns]
        target.addmm_(inputs[rows].to(target.dtype), b.T, beta=1 if add_inputs else 0)


REPLACEMENTS: dict[str, Callable[..., None]] = {
    "sgmv_shrink": sgmv_shrink,
    "sgmv_expand": sgmv_expand,
    "sgmv_expand_slice": sgmv_expand_slice,
}


def _sample(name: str, rank: int = 8, width: int = 24, offset: int = 8) -> tuple[list[Any], Tensor]:
    """Random arguments for one of the functions, and the tensor among them that it changes."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    lengths, adapters = torch.tensor([3, 1, 5, 2]), torch.tensor([2, 0, 1, 2])
    starts = lengths.cumsum(0) - lengths
    tokens = int(lengths.sum())
    runs = [starts, lengths, adapters, len(lengths), int(lengths.max()), tokens]
    if name == "sgmv_shrink":
        output = torch.zeros(tokens, rank)
        return [random(tokens, width), random(3, 1, rank, width), output, *runs, 0.5], output
    output = random(tokens, width + 2 * offset if name == "sgmv_expand_slice" else width)
    last = [offset, width, True] if name == "sgmv_expand_slice" else [True]
    return [random(tokens, rank), random(3, 1, width, rank), output, *runs, *last], output


def difference(module: Any, name: str) -> str | None:
    """Says how a function of vLLM differs from its replacement; None where it may be replaced.

    Args:
        module: The module that holds vLLM's function.
        name: Its name.
    """
    original, ours = getattr(module, name, None), REPLACEMENTS[name]
    if original is None:
        return f"this version of vLLM has no {name}"
    if list(inspect.signature(original).parameters) != list(inspect.signature(ours).parameters):
        return f"this version of vLLM calls {name} with other arguments"
    results: list[Tensor] = []
    for function in (original, ours):
        arguments, output = _sample(name)
        function(*arguments)
        results.append(output)
    if not torch.allclose(*results, atol=_TOLERANCE, rtol=_TOLERANCE):
        return f"this version of vLLM computes something else in {name}"
    return None


def install(module: Any) -> str | None:
    """Puts all replacements in place, or none.

    Args:
        module: The module whose functions are replaced.

    Returns:
        Why none was; None if all were.
    """
    for name in REPLACEMENTS:
        reason = difference(module, name)
        if reason is not None:
            return reason
    for name, function in REPLACEMENTS.items():
        setattr(module, name, function)
    return None


class SegmentedLora:
    """What vLLM's worker learns by ``worker_extension_cls``; the engine calls it by ``collective_rpc``."""

    def use_segmented_lora(self) -> str | None:
        """Puts the replacements in place in this worker; says why not, or None."""
        import importlib

        try:
            module = importlib.import_module(_HOME)
            return install(module)
        except Exception as error:  # whatever another version does, vLLM's own code still stands
            return f"this version of vLLM could not be checked: {error!r}"
