"""Which replica serves a request. Torch-free: the engine's processes and the simulated cluster run the same router."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b

from engine.config import RouterPolicy

# Adapter affinity gives way when the favoured replica has this many times the mean load.
AFFINITY_LOAD_FACTOR = 1.25


class Router:
    """Routes requests over `replicas`; load is the prompt and output tokens routed and not yet finished.

    places: by adapter, the replicas that serve it while one of them lives; any may serve one that is not named, and base requests.

    round_robin: one after the other. least_loaded: the smallest load, ties to the lowest index. adapter_affinity: consistent choice by adapter
    (rendezvous hashing), passing over replicas whose load exceeds 1.25 × the mean.
    """

    def __init__(
        self, policy: RouterPolicy, replicas: int, places: Mapping[str, Sequence[int]] | None = None
    ) -> None:
        if replicas < 1:
            raise ValueError(f"replicas={replicas} must be at least 1")
        self.policy = policy
        self.loads = [0] * replicas
        self._alive = list(range(replicas))
        self._places = dict(places or {})
        self._next = 0

    def route(self, adapter: str | None, tokens: int) -> int:
        """Choose the replica of a request of `tokens` prompt and output tokens, and count it there."""
        replica = self._choose(adapter, tokens)
        self.loads[replica] += tokens
        return replica

    def finished(self, replica: int, tokens: int) -> None:
        """Note the end of a request that was routed to `replica`."""
        self.loads[replica] -= tokens

    def remove(self, replica: int) -> None:
        """Route around a replica from now on. Raises ValueError for the last one."""
        if self._alive == [replica]:
            raise ValueError(f"replica {replica} is the last one")
        self._alive.remove(replica)

    def _able(self, adapter: str | None) -> list[int]:
        """Return the replicas that may serve an adapter."""
        if adapter is None or adapter not in self._places:
            return self._alive
        return [replica for replica in self._alive if replica in self._places[adapter]] or self._alive

    def _choose(self, adapter: str | None, tokens: int) -> int:
        alive, loads = self._able(adapter), self.loads
        if self.policy == "round_robin":
            self._next += 1
            return alive[(self._next - 1) % len(alive)]
        if self.policy == "adapter_affinity" and adapter is not None:
            total = sum(loads[replica] for replica in alive)
            bound = AFFINITY_LOAD_FACTOR * (total + tokens) / len(alive)
            for replica in _preference(adapter, alive):
                if loads[replica] + tokens <= bound or not total:
                    return replica
        return min(alive, key=loads.__getitem__)


def _preference(adapter: str, replicas: list[int]) -> list[int]:
    """Return the replicas in the order in which this adapter prefers them."""
    return sorted(
        replicas,
        key=lambda replica: blake2b(f"{adapter}:{replica}".encode(), digest_size=8).digest(),
        reverse=True,
    )
