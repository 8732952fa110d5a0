"""What a server is made of, loaded as its settings say: global posterior, base model's files, tokenizer, engine."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from abmll.errors import PosteriorMismatch
from abmll.layers import check_base, checkpoint_fingerprint
from abmll.posterior import Posterior, PosteriorConfig
from abmll.store import StoredPosterior, load_posterior
from server.engine import Engine
from server.settings import Settings
from server.tracing import vllm_arguments
from training.hub import fetch

logger = logging.getLogger(__name__)


def load_global(settings: Settings) -> StoredPosterior:
    """Reads the global posterior.

    Raises:
        InvalidPosterior: It is absent or damaged.
    """
    stored = load_posterior(settings.global_posterior)
    if stored.calibration is None:
        logger.warning("the global posterior has no calibration; confidences are raw probabilities")
    return stored


def with_revision(settings: Settings, config: PosteriorConfig) -> Settings:
    """Where no revision is asked for, takes the one that the posterior was made with, if it is of the same model."""
    if settings.revision is not None or settings.model != config.base_model:
        return settings
    return settings.model_copy(update={"revision": config.base_revision})


def base_check(settings: Settings, prior: Posterior) -> Callable[[Posterior], None]:
    """Returns a check that a posterior was made for the base model in use, over the global posterior's layers."""
    prints: dict[tuple[str, ...], str] = {}

    def check(posterior: Posterior) -> None:
        names = tuple(posterior.layers)
        if posterior.layers.keys() != prior.layers.keys():
            raise PosteriorMismatch(
                f"the posterior is over {len(posterior.layers)} layers, the global posterior over other "
                f"{len(prior.layers)}; teach the task again"
            )
        if names not in prints:
            folder = fetch(settings.base_model, settings.revision).folder
            prints[names] = checkpoint_fingerprint(folder, names)
        check_base(posterior, prints[names], settings.base_model)

    return check


def make_engine(settings: Settings, config: PosteriorConfig) -> Engine:
    """Builds the engine that the settings name, for posteriors of this kind; not yet started."""
    if settings.engine == "vllm":
        from server.vllm_engine import VllmEngine

        return VllmEngine(
            settings.base_model,
            revision=settings.revision,
            context=settings.context,
            targets=config.targets,
            layers=config.layers,
            max_rank=config.draw_rank,
            cache_bytes=settings.cache,
            options=vllm_arguments(settings) | settings.vllm_options,
        )
    from server.torch_engine import TorchEngine
    from training.base_model import weights_dtype

    return TorchEngine(
        settings.base_model,
        targets=config.targets,
        layers=config.layers,
        revision=settings.revision,
        dtype=weights_dtype(settings.dtype),
        device=settings.device,
        context=settings.context,
        threads=settings.threads,
        cache_bytes=settings.cache,
    )


def load_tokenizer(settings: Settings) -> Any:
    """Loads the base model's tokenizer, the same for both engines.

    Raises:
        AbmllError: It cannot be had.
    """
    from training import base_model  # loads transformers, which takes seconds

    return base_model.load_tokenizer(settings.base_model, revision=settings.revision)
