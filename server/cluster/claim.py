"""Whose the replicas in a cluster are: at most one living server has an application of Ray Serve by its name."""

from __future__ import annotations

import os
import socket
import time
from typing import Any

from abmll.errors import AbmllError
from server.cluster.ray_process import NAMESPACE
from server.settings import Settings

# A server that was killed is forgotten by Ray within a second or two; one that ends takes its replicas with it first.
_PATIENCE_SECONDS = 15.0
_LOOK_SECONDS = 0.5
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
    """
    import ray
    from ray.exceptions import GetTimeoutError, RayActorError
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
            return owner.remote(f"{socket.gethostname()}, process {os.getpid()}")
        except ValueError:  # the name is taken
            if time.monotonic() > end:
                break
        time.sleep(_LOOK_SECONDS)
    try:
        other: Any = ray.get_actor(name, namespace=NAMESPACE)
        where = ray.get(other.server.remote(), timeout=_ANSWER_SECONDS)
    except (ValueError, RayActorError, GetTimeoutError):
        where = "a place that it does not tell"
    raise AbmllError(
        f"the engines {settings.ray_application!r} in this Ray cluster belong to a server that runs ({where}): end it, "
        "or give this one a name of its own with --ray-application",
        field="ray_application",
    )
