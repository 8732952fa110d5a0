"""KL divergence between posteriors, in closed form and in float32 or better."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from abmll.posterior import LayerPosterior, Posterior

# |b a + c| may pass through zero, where log S has a pole; this floor is far under any useful scale.
SCALE_FLOOR = 1e-8
_BLOCK_ENTRIES = 1 << 22


def _precise(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _kl_kronecker(q: LayerPosterior, p: LayerPosterior) -> Tensor:
    d_out, d_in = q.b.shape[-2], q.a.shape[-1]
    log_s = _precise(q.scale["log_s"]) - _precise(p.scale["log_s"])
    log_t = _precise(q.scale["log_t"]) - _precise(p.scale["log_t"])
    log_ratio = d_in * log_s.sum(-1) + d_out * log_t.sum(-1)
    # expm1 keeps the digits when q is near p: log r + r^2/2 - 1/2 would cancel.
    x, y = torch.expm1(2 * log_s).sum(-1), torch.expm1(2 * log_t).sum(-1)
    half_squares = 0.5 * (d_in * x + d_out * y + x * y)
    s_p, t_p = _precise(p.scale["log_s"]).exp(), _precise(p.scale["log_t"]).exp()
    # M_q - M_p = (B_q - B_p) A_q + B_p (A_q - A_p): exactly 0 for equals, and no digits lost near them.
    q_a, q_b, p_a, p_b = (_precise(tensor) for tensor in (q.a, q.b, p.a, p.b))
    b = torch.cat([q_b - p_b, p_b], dim=-1) / s_p[..., :, None]
    a = torch.cat([q_a, q_a - p_a], dim=-2) / t_p[..., None, :]
    mean_term = 0.5 * ((b.mT @ b) * (a @ a.mT)).sum((-2, -1))
    return (half_squares - log_ratio + mean_term).sum()


def _kl_subspace(q: LayerPosterior, p: LayerPosterior) -> Tensor:
    assert q.core is not None
    assert p.core is not None
    log_s = _precise(q.scale["log_s"]) - _precise(p.scale["log_s"])
    shift = (_precise(q.core) - _precise(p.core)) / _precise(p.scale["log_s"]).exp()
    return (0.5 * torch.expm1(2 * log_s) - log_s + 0.5 * shift**2).sum()


def _kl_dense_rows(q: LayerPosterior, p: LayerPosterior, start: int, stop: int) -> Tensor:
    def scale(layer: LayerPosterior) -> Tensor:
        rows = _precise(layer.scale["b"])[start:stop] @ _precise(layer.scale["a"]) + layer.offset
        return rows.abs().clamp_min(SCALE_FLOOR)

    s_q, s_p = scale(q), scale(p)
    shift = _precise(q.b)[start:stop] @ _precise(q.a) - _precise(p.b)[start:stop] @ _precise(p.a)
    log_ratio = s_q.log() - s_p.log()
    return (0.5 * torch.expm1(2 * log_ratio) - log_ratio + 0.5 * (shift / s_p) ** 2).sum()


def _kl_lowrank(q: LayerPosterior, p: LayerPosterior) -> Tensor:
    d_out, d_in = q.b.shape[0], q.a.shape[1]
    rows = max(1, _BLOCK_ENTRIES // d_in)
    total = q.b.new_zeros((), dtype=torch.promote_types(q.b.dtype, torch.float32))
    for start in range(0, d_out, rows):
        stop = min(d_out, start + rows)
        if d_out > rows and torch.is_grad_enabled():
            # Recomputing a block in the backward pass keeps the peak at one block.
            block = checkpoint(_kl_dense_rows, q, p, start, stop, use_reentrant=False)
            assert isinstance(block, Tensor)
        else:
            block = _kl_dense_rows(q, p, start, stop)
        total = total + block
    return total


def kl_layer(q: LayerPosterior, p: LayerPosterior) -> Tensor:
    """KL(q || p) of one layer in nats, a scalar in float32 (float64 for float64 parameters).

    For ``kronecker`` and ``subspace`` also of several, whose parameters are stacked along a first dimension.

    Elementwise Gaussians: sum_ij log(S_p/S_q) + (S_q^2 + (M_q - M_p)^2) / (2 S_p^2) - 1/2
    (arXiv 2508.14285, eq. 3, with diagonal covariance). ``kronecker`` needs no dense matrix: the
    squares factorize over s and t, and the mean's part is an inner product of r x r Gram matrices.
    ``lowrank`` is summed in blocks of rows. In ``subspace`` the sum is over the core's entries: the factors around it
    are shared, or point estimates of a task's own, which do not enter.
    """
    if q.family != p.family:
        raise ValueError(f"KL needs one scale family, got {q.family} and {p.family}")
    with torch.autocast(q.a.device.type, enabled=False):
        return {"kronecker": _kl_kronecker, "lowrank": _kl_lowrank, "subspace": _kl_subspace}[q.family](q, p)


def kl(q: Posterior, p: Posterior) -> Tensor:
    """KL(q || p) in nats, summed over all layers: a scalar, differentiable in both.

    Layers of one shape are taken together where that needs no dense matrix: on a GPU a training step takes as long as
    launching its kernels does.
    """
    if q.layers.keys() != p.layers.keys():
        raise ValueError("KL needs posteriors over the same layers")
    if max(q.config.members, p.config.members) > 1:
        raise ValueError("KL of a mixture has no closed form; the mean of its members' is at least as large")
    alike: dict[object, list[str]] = {}
    for name, layer in q.layers.items():
        key = name if layer.family == "lowrank" else (layer.a.shape, layer.b.shape, layer.family, p.layers[name].family)
        alike.setdefault(key, []).append(name)
    stacks = [(_stacked(q, names), _stacked(p, names)) for names in alike.values()]
    return torch.stack([kl_layer(*stack) for stack in stacks]).sum()


def _stacked(posterior: Posterior, names: Sequence[str]) -> LayerPosterior:
    """Layers of one shape as one, their parameters stacked along a new first dimension; one layer as it is."""
    layers = [posterior.layers[name] for name in names]
    if len(layers) == 1:
        return layers[0]
    each = [layer.tensors() for layer in layers]
    return layers[0].with_tensors({key: torch.stack([tensors[key] for tensors in each]) for key in each[0]})
