"""Whose the replicas in a cluster are: at most one living server has an application of Ray Serve by its name."""

from __future__ import annotations

import os
import socket
import time
from typing import Any

from abmll.errors import AbmllError, EngineFailure
from server.cluster.ray_process import NAMESPACE
from server.settings import Settings

# A server that was killed is forgotten by Ray within a second or two; one that ends takes its replicas with it first.
_PATIENCE_SECONDS = 30.0
_LOOK_SECONDS = 0.5
_START_SECONDS = 60.0
_ANSWER_SECONDS = 10.0


class Owner:
    """An actor that lives as long as its server is in the cluster.

    Args:
        server: Where that is, for people.
    """

    def __init__(self, server: str) -> None:
        self._server = server

    def server(self) -> str:
        """Where the server is."""
        return self._server


def claim(settings: Settings) -> Any:
    """Makes this server the owner of its application in the cluster that it has joined.

    Returns:
        What holds the claim until the server leaves the cluster; keep it.

    Raises:
        AbmllError: Another server that lives has it.
        EngineFailure: Ray cannot hold the claim.
    """
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    name = f"owner of {settings.ray_application}"
    # On this machine, so that no other machine's death ends the claim.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    owner: Any = ray.remote(num_cpus=0, max_restarts=-1)(Owner).options(
        name=name, namespace=NAMESPACE, scheduling_strategy=here
    )
    end = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            claimed = owner.remote(f"{socket.gethostname()}, process {os.getpid()}")
            break
        except ValueError as error:  # the name is taken
            if time.monotonic() > end:
                raise AbmllError(
                    f"the engines {settings.ray_application!r} in this Ray cluster belong to a server that runs "
                    f"({_owner_of(name)}): end it, or give this one a name of its own with --ray-application",
                    field="ray_application",
                ) from error
        time.sleep(_LOOK_SECONDS)
    try:
        ray.get(claimed.server.remote(), timeout=_START_SECONDS)  # only one that lives keeps others away
    except RayError as error:
        raise EngineFailure(f"Ray does not hold this server's claim on its engines: {error}") from error
    return claimed


def _owner_of(name: str) -> str:
    import ray
    from ray.exceptions import RayError

    try:
        other: Any = ray.get_actor(name, namespace=NAMESPACE)
        return ray.get(other.server.remote(), timeout=_ANSWER_SECONDS)
    except (ValueError, RayError):
        return "where, it does not say"
