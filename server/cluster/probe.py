"""What `abmll doctor` runs in a process of its own: joins the Ray cluster, tells what it has; a line of JSON."""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import Any

from abmll.errors import AbmllError
from server.cluster.ray_process import adaptation_resources, by_name, join, leave, replica_resources, told
from server.settings import Settings


def cluster(settings: Settings) -> dict[str, Any]:
    """What the cluster has, and what the fewest engines and one adaptation want that it lacks."""
    try:
        join(settings)
    except AbmllError as error:
        return {"error": error.message}
    import ray

    # Without Ray's own, one for each machine and for the memory of objects.
    has = {name: amount for name, amount in ray.cluster_resources().items() if ":" not in name and "memory" not in name}
    nodes = sum(node["Alive"] for node in ray.nodes())
    leave(settings)
    engine = by_name(replica_resources(settings, has.get("GPU", 0.0)))
    wanted = Counter({name: amount * (settings.replicas or 1) for name, amount in engine.items()})
    wanted.update(by_name(adaptation_resources(settings)))
    lacks = {name: amount for name, amount in wanted.items() if amount > has.get(name, 0.0)}
    return {"version": ray.__version__, "nodes": nodes, "has": told(has), "lacks": told(lacks)}


if __name__ == "__main__":
    print(json.dumps(cluster(Settings.model_validate_json(sys.argv[1]))), flush=True)
