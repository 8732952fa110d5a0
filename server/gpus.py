"""GPUs that a plan can be made for: what their makers say of memory and speed."""

from __future__ import annotations

from pydantic import BaseModel

from abmll.errors import AbmllError


class Gpu(BaseModel, frozen=True):
    """A GPU.

    Attributes:
        memory: Bytes.
        flops: Floating-point operations a second in bf16, dense.
        flops_float32: The same in float32, without TF32, which torch does not use unless told to.
    """

    memory: int
    flops: float
    flops_float32: float


def _gpu(gib: float, bfloat16: float, float32: float) -> Gpu:
    return Gpu(memory=int(gib * 2**30), flops=bfloat16 * 1e12, flops_float32=float32 * 1e12)


GPUS = {
    "l4": _gpu(22.5, 121, 30.3),
    "l40s": _gpu(44.5, 362, 91.6),
    "rtx4090": _gpu(23.6, 165, 82.6),
    "a100-40gb": _gpu(39.4, 312, 19.5),
    "a100-80gb": _gpu(79.2, 312, 19.5),
    "h100": _gpu(79.1, 989, 67),
    "h200": _gpu(139.7, 989, 67),
    "b200": _gpu(179, 2250, 75),
}


def find_gpu(name: str) -> Gpu:
    """Returns a GPU by name.

    Raises:
        AbmllError: It is not known.
    """
    if name.lower() not in GPUS:
        raise AbmllError(f"no GPU {name!r} is known; known: {', '.join(GPUS)}", field="gpu")
    return GPUS[name.lower()]
