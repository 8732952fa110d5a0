"""The parts of a running server, started and stopped together."""

from __future__ import annotations

import asyncio
import fcntl
import logging
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from abmll.errors import AbmllError, EngineFailure
from abmll.layers import check_base, checkpoint_fingerprint
from abmll.posterior import Posterior
from abmll.store import StoredPosterior, load_posterior
from server.answers import Answerer
from server.engine import Engine
from server.jobs import JobRegistry
from server.settings import Settings
from server.store import TaskStore
from server.supervisor import Supervisor

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


def checkpoint_folder(model: str, revision: str | None) -> Path:
    """Returns the folder of a model's files: itself, or the hub's cache."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, revision=revision, allow_patterns=["*.safetensors", "*.json"]))


def base_check(settings: Settings) -> Callable[[Posterior], None]:
    """Returns a check that a posterior was made for the base model in use."""
    prints: dict[tuple[str, ...], str] = {}

    def check(posterior: Posterior) -> None:
        names = tuple(posterior.layers)
        if names not in prints:
            folder = checkpoint_folder(settings.base_model, settings.revision)
            prints[names] = checkpoint_fingerprint(folder, names)
        check_base(posterior, prints[names], settings.base_model)

    return check


def make_engine(settings: Settings, prior: StoredPosterior) -> Engine:
    """Builds the engine that the settings name, not yet started."""
    if settings.engine == "vllm":
        from server.vllm_engine import VllmEngine

        return VllmEngine(
            settings.base_model,
            revision=settings.revision,
            context=settings.context,
            targets=prior.posterior.config.targets,
            max_rank=prior.posterior.config.draw_rank,
        )
    import torch

    from server.torch_engine import TorchEngine

    return TorchEngine(
        settings.base_model,
        revision=settings.revision,
        dtype=getattr(torch, settings.dtype),
        device=settings.device,
        context=settings.context,
        threads=settings.threads,
    )


def load_tokenizer(settings: Settings) -> Any:
    """Loads the base model's tokenizer, the same for both engines."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(settings.base_model, revision=settings.revision)


def _lock(store: Path) -> IO[str]:
    """Takes a store for this process: two servers would take each other's jobs for a dead worker's.

    Raises:
        AbmllError: Another server uses it.
    """
    file = (store / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise AbmllError(f"another server uses the store {store}; stop it, or choose another with --store") from error
    return file


class Service:
    """Store, jobs, engine and adaptation process of one server.

    The engine starts in the background, so that the port answers at once: until then ``answerer`` raises.
    The adaptation process starts after it, so that it takes nothing from the start.

    Args:
        settings: The settings.
        on_failure: Called with the error if the start fails.

    Raises:
        AbmllError: Global posterior or store cannot be used, or another server uses the store.
    """

    def __init__(self, settings: Settings, on_failure: Callable[[Exception], None] = lambda _: None) -> None:
        self.settings, self.on_failure = settings, on_failure
        self.prior = load_global(settings)
        self.store = TaskStore(settings.store, self.prior, base_check(settings))
        if Path(settings.base_model).is_dir():  # else when the engine has fetched it
            self.store.check(self.prior.posterior)
        self.registry = JobRegistry(settings.store / "jobs.sqlite3")
        self._lock = _lock(settings.store)
        self.engine: Engine | None = None
        self.supervisor: Supervisor | None = None
        self.failure: Exception | None = None
        self.tokenizer: Any = None
        self._answerer: Answerer | None = None
        self._starting: asyncio.Task[None] | None = None

    @property
    def answerer(self) -> Answerer:
        """What answers questions.

        Raises:
            EngineFailure: The engine is not ready.
        """
        if self._answerer is None:
            raise EngineFailure("the engine is starting; wait until GET /readyz says 200")
        return self._answerer

    @property
    def ready(self) -> bool:
        """Whether questions are answered."""
        return self._answerer is not None and self.engine is not None and self.engine.state().healthy

    async def start(self) -> None:
        """Begins the start."""
        self._starting = asyncio.create_task(self._start(), name="start")

    async def _start(self) -> None:
        try:
            engine = make_engine(self.settings, self.prior)
            await engine.start()
            self.engine = engine
            await asyncio.to_thread(self.store.check, self.prior.posterior)
            self.tokenizer = await asyncio.to_thread(load_tokenizer, self.settings)
            damaged = await asyncio.to_thread(self.store.damaged)
            self._answerer = Answerer(self.settings, engine, self.tokenizer, self.store)
        except Exception as error:
            self.failure = error
            self.on_failure(error)
            return
        logger.info(
            "ready: engine %s, base model %s, %d tasks%s",
            engine.name,
            self.settings.base_model,
            len(self.store.names()),
            f", {len(damaged)} damaged: {', '.join(damaged)}" if damaged else "",
        )
        self.supervisor = Supervisor(self.settings, self.registry)
        self.supervisor.start()

    async def close(self) -> None:
        """Stops everything; jobs under way are taken up again at the next start."""
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        if self.supervisor is not None:
            await self.supervisor.close()
        if self.engine is not None:
            await self.engine.close()
        self._lock.close()
