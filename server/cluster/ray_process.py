"""Ray in this process: joined where there is a cluster, else begun on this machine."""

from __future__ import annotations

import logging
import math
import os
import secrets
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from abmll.errors import AbmllError
from server.settings import Settings

_CONNECT_SECONDS = 5.0
# Where Ray looks for a token that the environment does not name.
_TOKEN = "~/.ray/auth_token"
# Names of ours in a cluster that others use, too.
NAMESPACE = "abmll"
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nobody outside is told
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_ENABLE_AUTO_CONNECT": "0",  # else whatever is called after the end begins another Ray
    "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1",  # it aborts a process that takes three seconds to end
    "RAY_worker_niceness": "0",  # by default engines would wait for whatever else the machine does
}


def join(settings: Settings) -> None:
    """Joins the cluster that the settings name, or begins one of this machine alone.

    Raises:
        AbmllError: Ray is not installed, or nobody answers at the address.
    """
    os.environ.update({name: value for name, value in _ENVIRONMENT.items() if name not in os.environ})
    _authenticate(settings)
    try:
        import ray
    except ImportError as error:
        raise AbmllError(f"--replicas needs Ray ({error}); pip install 'abmll[cluster]'", field="replicas") from error
    if ray.is_initialized():
        return
    quiet: dict[str, Any] = {"namespace": NAMESPACE, "logging_level": logging.WARNING, "log_to_driver": True}
    if settings.ray_address is None:
        # Ray's count of CPUs is of what it may hand out: the operator has said how many engines this machine takes.
        engines = (settings.max_replicas or settings.replicas or 1) * replica_resources(settings, 0)["num_cpus"]
        adaptation = adaptation_resources(settings)
        count = max(os.cpu_count() or 1, engines + settings.adapt_jobs * adaptation["num_cpus"])
        # Those of the operator's own naming are this machine's, too.
        own = {name: amount * settings.adapt_jobs for name, amount in adaptation["resources"].items()}
        ray.init(address="local", include_dashboard=False, num_cpus=math.ceil(count), resources=own, **quiet)
        return
    try:
        if settings.ray_address != "auto":  # Ray itself would go on trying for minutes
            host, _, port = settings.ray_address.rpartition(":")
            socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
        ray.init(address=settings.ray_address, **quiet)
    except (OSError, RuntimeError, ValueError) as error:
        raise AbmllError(
            f"no Ray cluster answers at {settings.ray_address}: {error}; check --ray-address, and `ray status` there; "
            f"if it wants a token: RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or {_TOKEN}",
            field="ray_address",
        ) from error


def _authenticate(settings: Settings) -> None:
    """Says whether Ray uses a token, where the operator has not; before Ray is imported, which reads it then.

    A cluster wants a token where ``ray start --head`` found one, but who joins it has to say so. A cluster of this
    server's own has a token that nobody else knows: Ray would write one into the operator's home, where each later
    ``ray start --head`` would find it.
    """
    if "RAY_AUTH_MODE" in os.environ:
        return
    given = "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ
    if settings.ray_address is None:
        os.environ["RAY_AUTH_MODE"] = "token"
        if not given:
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    elif given or Path(_TOKEN).expanduser().is_file():
        os.environ["RAY_AUTH_MODE"] = "token"


def leave(settings: Settings) -> None:
    """Leaves the cluster; ends it where it was begun here."""
    import ray

    if ray.is_initialized():
        if settings.ray_address is None:
            from ray import serve

            serve.shutdown()
        ray.shutdown()


def replica_resources(settings: Settings, gpus: float) -> dict[str, float]:
    """What Ray sets aside for one engine.

    Args:
        settings: The server's.
        gpus: GPUs in the cluster.
    """
    taken = 0
    if gpus and settings.engine == "vllm":
        sizes = (settings.vllm_options.get(f"{kind}_parallel_size", 1) for kind in ("tensor", "pipeline"))
        taken = 1
        for size in sizes:
            taken *= int(size)
    elif gpus and settings.device.startswith(("auto", "cuda")):
        taken = 1
    return {"num_cpus": settings.threads or 1, "num_gpus": taken}


def adaptation_resources(settings: Settings) -> dict[str, Any]:
    """What Ray sets aside for one adaptation: as the operator says, else the CPUs and the GPU that it runs on."""
    wanted = dict(settings.adapt_resources)
    cpus = wanted.pop("CPU", settings.adapt_threads)
    gpus = wanted.pop("GPU", 1.0 if settings.adapt_device.startswith("cuda") else 0.0)
    memory = {"memory": wanted.pop("memory")} if "memory" in wanted else {}
    return {"num_cpus": cpus, "num_gpus": gpus, "resources": wanted, **memory}


def by_name(aside: Mapping[str, Any]) -> dict[str, float]:
    """What Ray sets aside, as a cluster names what it has; without memory."""
    named = {"CPU": aside["num_cpus"], "GPU": aside["num_gpus"], **aside.get("resources", {})}
    return {name: amount for name, amount in named.items() if amount}


def told(resources: Mapping[str, float]) -> str:
    """Resources as an operator reads them."""
    return ", ".join(f"{name} {amount:g}" for name, amount in sorted(resources.items()))
