"""Opening a posterior's base model."""

from __future__ import annotations

from typing import Any

from training.settings import choose_device


def dtype_of(name: str) -> Any:
    """Returns what ``load_base`` takes for the dtype of a name.

    Raises:
        AbmllError: It is none of float32, bfloat16 and nf4.
    """
    from abmll.errors import AbmllError
    from training.base_model import weights_dtype

    if name not in ("float32", "bfloat16", "nf4"):
        raise AbmllError(f"dtype is {name!r}; give float32, bfloat16 or nf4", field="dtype")
    return weights_dtype(name)


def join_ranks(device: str | None, shard_base: bool, jobs: int = 1, *, share_tasks: bool = False) -> Any:
    """Joins the processes that hold the base model together, if they shall; else this one is alone.

    Args:
        device: See ``Ranks.join``.
        shard_base: Whether they hold it together.
        jobs: Processes that each would start.
        share_tasks: Whether processes that do not hold it together have something else to share.

    Raises:
        AbmllError: There is one process only, or each is to start others.
    """
    from abmll.errors import AbmllError
    from training.ranks import ALONE, Ranks

    if not shard_base:
        return Ranks.join(device) if share_tasks else ALONE
    if jobs > 1:
        raise AbmllError(f"--jobs {jobs} would load the whole base model in each process; leave it out", field="jobs")
    return Ranks.join(device, sharded=True)


def open_base(posterior: Any, model: str | None, dtype: str, device: str | None, ranks: Any) -> tuple[Any, Any, Any]:
    """Loads a posterior's base model, checks that it is the one, and attaches.

    Args:
        posterior: The posterior.
        model: Another name of its base model.
        dtype: Of the frozen weights.
        device: Where to put them.
        ranks: The processes that hold the model together, see ``join_ranks``.

    Returns:
        The base model, its attached layers, and the posterior on the same device.

    Raises:
        AbmllError: The model cannot be had, or the posterior was made for another.
    """
    from abmll.layers import attach, check_base
    from training.base_model import load_base
    from training.embedded import resolve

    name = model or posterior.config.base_model
    revision = posterior.config.base_revision if name == posterior.config.base_model else None
    base = load_base(
        resolve(name),
        revision=revision,
        dtype=dtype_of(dtype),
        device=choose_device(ranks.device(device)),
        shards=ranks.shards,
    )
    attached = attach(base.model, posterior.config.targets, posterior.config.layers, ranks.together, base.weights)
    check_base(posterior, attached.fingerprint(), name)
    return base, attached, posterior.map(lambda tensor: tensor.to(base.device))
