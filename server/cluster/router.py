"""Which replica answers a question: the one that answers its task, so that adapters and prefix caches stay warm."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

# A busy task's questions go elsewhere once its replica has so many more under way than the idlest.
SLACK = 4


def home(key: str, replicas: Sequence[str]) -> str:
    """The replica that a posterior belongs to; few posteriors move when a replica comes or goes.

    Rendezvous hashing (Thaler and Ravishankar 1998).
    """
    return max(replicas, key=lambda replica: hashlib.sha256(f"{key} {replica}".encode()).digest())


class TaskRouter(RequestRouter):
    """Routes by the posterior's key, which comes as Serve's ``multiplexed_model_id``."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks the replicas: the posterior's own, unless it is busy; then the idlest."""
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        if not by_name:
            return []
        load = {name: self._load(replica) for name, replica in by_name.items()}
        idlest = min(load, key=lambda name: load[name])
        key = "" if pending_request is None else pending_request.metadata.multiplexed_model_id
        chosen = home(key, sorted(by_name)) if key else idlest
        if load[chosen] >= load[idlest] + SLACK:
            chosen = idlest
        others = sorted((name for name in by_name if name != chosen), key=lambda name: load[name])
        return [[by_name[name]] for name in (chosen, *others)]

    def _load(self, replica: Any) -> int:
        return self.replica_queue_len_cache.get(replica.replica_id) or 0
