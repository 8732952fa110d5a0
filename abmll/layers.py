"""The variational linear layer, and how a posterior is attached to a causal language model."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn

from abmll.draws import Signs, drawn_core, scale_factors
from abmll.errors import InvalidPosterior, PosteriorMismatch
from abmll.posterior import LayerPosterior, Posterior, PosteriorConfig, block_number, init_layer
from abmll.together import Together

logger = logging.getLogger(__name__)

_FINGERPRINT_ENTRIES = 1024

# Gives a module's weight by module name.
Weights = Callable[[str], Tensor]


class VariationalLinear(nn.Module):
    """A frozen linear layer plus the Gaussian update that is attached at the moment.

    The pass is z = W0 x + B (A x) + u * S (v * x) with signs u, v for each batch row (Flipout, Wen et
    al. 2018; DESIGN section 2), computed from S's factors: no d_out x d_in tensor, forward or backward. For
    ``subspace`` it is z = W0 x + B (C + diag(u) S diag(v)) (A x).
    """

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.posterior: LayerPosterior | None = None
        self.signs: Signs | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Applies the layer to x, shape (rows, tokens, d_in); gives (rows, tokens, d_out).

        Some models (OPT) flatten rows and tokens, rows first; shape (rows * tokens, d_in) is taken too.

        Without a posterior, the base layer; without signs, the posterior's mean; with signs of shape
        (rows, ...), one draw a row.
        """
        z = self.base(x)
        layer, signs = self.posterior, self.signs
        if layer is None:
            return z
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(layer.a.dtype)
            update = _update(layer, x, signs) if layer.core is None else _core_update(layer, x, signs)
        return z + update.to(z.dtype)


def _update(layer: LayerPosterior, x: Tensor, signs: Signs | None) -> Tensor:
    update = (x @ layer.a.T) @ layer.b.T
    if signs is None:
        return update
    b_scale, a_scale = scale_factors(layer)
    # (rows, d_in, k) and (rows, k, d_out): signs go on the factors, not on activations.
    inward = a_scale.T * signs.v[:, :, None]
    outward = b_scale.T * signs.u[:, None, :]
    noise = (x.reshape(len(signs.u), -1, x.shape[-1]) @ inward) @ outward
    return update + noise.view_as(update)


def _core_update(layer: LayerPosterior, x: Tensor, signs: Signs | None) -> Tensor:
    projected, drawn = x @ layer.a.T, drawn_core(layer, signs)
    if signs is None:
        return (projected @ drawn.T) @ layer.b.T
    moved = projected.reshape(len(drawn), -1, projected.shape[-1]) @ drawn.transpose(1, 2)
    return moved.view_as(projected) @ layer.b.T


class Attached:
    """A causal language model whose targeted layers take a posterior.

    Attributes:
        model: The model; its own weights are frozen.
        layers: Module name to the layer put in its place.
        trunk: Number of blocks below the first that has such a layer: all draws agree in them.
        blocks: The blocks above the trunk.
        together: The processes that hold the model together; None where this one has all of it.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, VariationalLinear],
        together: Together | None = None,
        weights: Weights | None = None,
    ) -> None:
        self.model = model
        self.layers = layers
        self.together = together
        self._weights = weights
        numbers = [block_number(name) for name in layers]
        self.trunk, self.blocks = 0, list[nn.Module]()
        if None not in numbers:
            self.trunk = min(number for number in numbers if number is not None)
            stack = model.get_submodule(next(iter(layers)).split(f".{numbers[0]}.")[0])
            self.blocks = [block for name, block in stack.named_children() if int(name) >= self.trunk]

    def fingerprint(self) -> str:
        """Hash of the weights below the posterior, see ``fingerprint``."""
        return fingerprint(self._weights or (lambda name: self.layers[name].base.weight), self.layers)

    @contextmanager
    def using(
        self, posterior: Posterior | None, signs: Mapping[str, Signs] | None = None, draws: int = 1
    ) -> Generator[nn.Module, None, None]:
        """Runs the model under a posterior while the context lasts; under the base weights for None.

        Args:
            posterior: Parameters, on the model's device.
            signs: Module name to signs with one row a batch row; None for the mean.
            draws: Above the trunk the batch is run so many times over, draw-major; ``signs`` are of that batch.

        Raises:
            PosteriorMismatch: The posterior's layers are not this model's.
        """
        if posterior is not None and posterior.layers.keys() != self.layers.keys():
            raise PosteriorMismatch(
                f"the posterior is over {len(posterior.layers)} layers, the model has {len(self.layers)} attached"
            )
        repeat = _Repeat(draws, self.blocks)
        hooks = [block.register_forward_pre_hook(repeat, with_kwargs=True) for block in self.blocks if draws > 1]
        try:
            for name, layer in self.layers.items():
                layer.posterior = None if posterior is None else posterior.layers[name]
                layer.signs = None if signs is None else signs[name]
            yield self.model
        finally:
            for hook in hooks:
                hook.remove()
            for layer in self.layers.values():
                layer.posterior = layer.signs = None

    @cached_property
    def shares_trunk(self) -> bool:
        """Whether the trunk can be run once for all draws; tried once, for models differ in what they hand on."""
        if self.trunk == 0:
            return False
        device = next(self.model.parameters()).device
        ids = torch.tensor([[1, 2, 3], [3, 2, 1]], device=device)
        positions = torch.arange(3, device=device).expand(2, 3)
        decoder = self.model.get_decoder()  # pyright: ignore[reportCallIssue] -- a transformers model's method
        run = partial(decoder, input_ids=ids, position_ids=positions, use_cache=False)
        try:
            with torch.no_grad(), self.using(None):
                alone = run().last_hidden_state
            with torch.no_grad(), self.using(None, draws=2):
                together = run().last_hidden_state
        except Exception as error:  # whatever a model's code does with rows that it does not expect
            logger.warning("every draw is run whole: %s: %s", type(error).__name__, error)
            return False
        return together.shape[0] == 4 and same_values(together, alone.repeat(2, 1, 1), alone.dtype)

    def detach(self) -> nn.Module:
        """Puts the original layers back and returns the model."""
        for name, layer in self.layers.items():
            parent, _, child = name.rpartition(".")
            setattr(self.model.get_submodule(parent), child, layer.base)
        return self.model


def same_values(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    """Whether two tensors agree, but for the rounding of a model of that dtype."""
    tolerance = 1e-3 if dtype in (torch.float32, torch.float64) else 5e-2
    return torch.allclose(one, other, rtol=tolerance, atol=tolerance)


class _Repeat:
    """What is given to a block above the trunk, so many times over: the hidden states once, all else for each block."""

    def __init__(self, times: int, blocks: Sequence[nn.Module]) -> None:
        self.times, self.blocks = times, blocks
        self.rows = 0

    def __call__(self, block: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if block is self.blocks[0]:
            self.rows = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)).shape[0]
        return self._all(args), self._all(kwargs)

    def _all(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            # Hidden states that a block below has repeated have other rows; tensors of one dimension have none.
            whole = value.ndim > 1 and value.shape[0] == self.rows
            return value.repeat(self.times, *[1] * (value.ndim - 1)) if whole else value
        if isinstance(value, tuple):
            return tuple(map(self._all, cast("tuple[Any, ...]", value)))
        if isinstance(value, dict):
            return {key: self._all(item) for key, item in cast("dict[str, Any]", value).items()}
        return value


def target_layers(model: nn.Module, targets: Iterable[str], layers: str = "all") -> dict[str, nn.Linear]:
    """Returns the model's linear layers whose last name is a target, in the model's order.

    Args:
        model: The model.
        targets: Last names of modules.
        layers: Which blocks count, see ``PosteriorConfig.layers``.

    Raises:
        PosteriorMismatch: A target matches no layer, or one that is not linear; or there are no blocks to choose from.
    """
    wanted = set(targets)
    found: dict[str, nn.Linear] = {}
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in wanted:
            if not isinstance(module, nn.Linear):
                raise PosteriorMismatch(f"{name} is a {type(module).__name__}; only linear layers can be targeted")
            found[name] = module
    missing = sorted(wanted - {name.rsplit(".", 1)[-1] for name in found})
    if missing or not found:
        linear = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise PosteriorMismatch(f"the model has no layer {missing}; its linear layers are {linear}", field="targets")
    if layers == "all":
        return found
    blocks = sorted({block for name in found if (block := block_number(name)) is not None})
    if not blocks:
        raise PosteriorMismatch(f"{next(iter(found))} is in no numbered block; use layers: all", field="layers")
    count = 1 if layers == "last" else math.ceil(len(blocks) * int(layers.removeprefix("top-").removesuffix("%")) / 100)
    return {name: layer for name, layer in found.items() if block_number(name) in blocks[-count:]}


def attach(
    model: nn.Module,
    targets: Iterable[str],
    layers: str = "all",
    together: Together | None = None,
    weights: Weights | None = None,
) -> Attached:
    """Freezes a model and puts a ``VariationalLinear`` in the place of each targeted layer, see ``target_layers``.

    Args:
        model: The model.
        targets: Last names of modules.
        layers: Which blocks count.
        together: The processes that hold the model together.
        weights: The weights as they were before the model's own were packed; None where they are as they were.

    Raises:
        PosteriorMismatch: A target matches no linear layer.
    """
    variational: dict[str, VariationalLinear] = {}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, base in target_layers(model, targets, layers).items():
        parent, _, child = name.rpartition(".")
        variational[name] = VariationalLinear(base)
        setattr(model.get_submodule(parent), child, variational[name])
    return Attached(model, variational, together, weights)


def init_posterior(attached: Attached, config: PosteriorConfig, seed: int) -> Posterior:
    """Returns the starting posterior for a model: mean zero, deviation ``config.scale_init``."""
    generator = torch.Generator().manual_seed(seed)
    layers = {
        name: init_layer(layer.base.out_features, layer.base.in_features, config, generator)
        for name, layer in attached.layers.items()
    }
    return Posterior(config.model_copy(update={"base_fingerprint": attached.fingerprint()}), layers)


def fingerprint(weight: Weights, names: Iterable[str]) -> str:
    """Hash of the first entries of each targeted weight, as bf16, whatever the dtype it is loaded in.

    Args:
        weight: Gives a module's weight by module name.
        names: The targeted modules.
    """
    state = hashlib.sha256()
    for name in names:
        tensor = weight(name).detach()
        # Other processes have the rest of a DTensor; importing its class to ask for it would slow every start.
        if hasattr(tensor, "full_tensor"):
            tensor = cast("Any", tensor).full_tensor()
        state.update(f"{name}{tuple(tensor.shape)}".encode())
        rows = -(-_FINGERPRINT_ENTRIES // tensor.shape[1])
        entries = tensor[:rows].flatten()[:_FINGERPRINT_ENTRIES].to("cpu", torch.bfloat16)
        state.update(entries.view(torch.int16).numpy().tobytes())
    return state.hexdigest()[:16]


def checkpoint_fingerprint(folder: Path, names: Iterable[str]) -> str:
    """``fingerprint`` of a model folder's safetensors files, without loading the model.

    Raises:
        PosteriorMismatch: A targeted weight is not in the folder.
        InvalidPosterior: The folder has no safetensors file.
    """
    return fingerprint(checkpoint_weights(folder), names)


def checkpoint_weights(folder: Path) -> Weights:
    """Returns what gives a module's weight, by its name, out of a model folder's safetensors files.

    What is returned raises ``PosteriorMismatch`` for a weight that is not there.

    Raises:
        InvalidPosterior: The folder has no safetensors file.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InvalidPosterior(f"{folder} has no *.safetensors file; abmll reads no other weights")
    where: dict[str, Path] = {}
    for file in files:
        with safe_open(file, "pt") as reader:
            where |= dict.fromkeys(reader.keys(), file)
    return partial(_checkpoint_weight, folder, where)


# No function within a function: other processes are given it.
def _checkpoint_weight(folder: Path, where: Mapping[str, Path], name: str) -> Tensor:
    key = f"{name}.weight"
    if key not in where:
        raise PosteriorMismatch(f"the base model in {folder} has no weight {key}, which the posterior targets")
    with safe_open(where[key], "pt") as reader:
        return reader.get_tensor(key)


def check_base(posterior: Posterior, actual: str, model_name: str) -> None:
    """Checks that a posterior was made for the base model in use.

    Args:
        posterior: The posterior.
        actual: The fingerprint of the model in use, over the posterior's layers.
        model_name: The model in use, for the message.

    Raises:
        PosteriorMismatch: The fingerprints differ.
    """
    expected = posterior.config.base_fingerprint
    if expected is not None and expected != actual:
        raise PosteriorMismatch(
            f"the posterior was made for {posterior.config.base_model} (weights {expected}), "
            f"but the base model in use is {model_name} (weights {actual}); serve it with its own base model"
        )
