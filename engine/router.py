"""Which replica serves a request. Torch-free: the engine's processes and the simulated cluster run the same router."""

from __future__ import annotations

from hashlib import blake2b

from engine.config import RouterPolicy

# Adapter affinity gives way when the favoured replica has this many times the mean load.
AFFINITY_LOAD_FACTOR = 1.25


class Router:
    """Routes requests over `replicas`; load is the prompt and output tokens routed and not yet finished.

    round_robin: one after the other. least_loaded: the smallest load, ties to the lowest index. adapter_affinity: consistent choice by adapter
    (rendezvous hashing), passing over replicas whose load exceeds 1.25 × the mean.
    """

    def __init__(self, policy: RouterPolicy, replicas: int) -> None:
        if replicas < 1:
            raise ValueError(f"replicas={replicas} must be at least 1")
        self.policy = policy
        self.loads = [0] * replicas
        self._next = 0

    def route(self, adapter: str | None, tokens: int) -> int:
        """Choose the replica of a request of `tokens` prompt and output tokens, and count it there."""
        replica = self._choose(adapter, tokens)
        self.loads[replica] += tokens
        return replica

    def finished(self, replica: int, tokens: int) -> None:
        """Note the end of a request that was routed to `replica`."""
        self.loads[replica] -= tokens

    def _choose(self, adapter: str | None, tokens: int) -> int:
        if self.policy == "round_robin":
            self._next = (self._next + 1) % len(self.loads)
            return self._next - 1 if self._next else len(self.loads) - 1
        if self.policy == "adapter_affinity" and adapter is not None:
            bound = AFFINITY_LOAD_FACTOR * (sum(self.loads) + tokens) / len(self.loads)
            for replica in _preference(adapter, len(self.loads)):
                if self.loads[replica] + tokens <= bound or not any(self.loads):
                    return replica
        return self.loads.index(min(self.loads))


def _preference(adapter: str, replicas: int) -> list[int]:
    """Return the replicas in the order in which this adapter prefers them."""
    weights = [
        blake2b(f"{adapter}:{replica}".encode(), digest_size=8).digest() for replica in range(replicas)
    ]
    return sorted(range(replicas), key=lambda replica: weights[replica], reverse=True)
