"""Which replica serves a request. Torch-free: the engine's processes and the simulated cluster run the same router."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b

from engine.config import RouterPolicy, ServingConfig
from engine.router_costs import ReplicaLedger, RouterCosts

# Adapter affinity gives way when the favoured replica has this many times the mean load.
AFFINITY_LOAD_FACTOR = 1.25


class Router:
    """Routes requests over `replicas`; load is the prompt and output tokens routed and not yet finished.

    places: by adapter, the replicas that serve it while one of them lives; any may serve one that is not named, and base requests.

    round_robin: one after the other. least_loaded: the smallest load, ties to the lowest index. adapter_affinity: consistent choice by adapter
    (rendezvous hashing), passing over replicas whose load exceeds 1.25 × the mean. cost_aware: where the request costs itself and the others
    least, by `costs` (engine/router_costs.py); `slots` are the requests that a replica runs at a time.
    """

    def __init__(
        self,
        policy: RouterPolicy,
        replicas: int,
        places: Mapping[str, Sequence[int]] | None = None,
        *,
        costs: RouterCosts | None = None,
        slots: int = 256,
    ) -> None:
        if replicas < 1:
            raise ValueError(f"replicas={replicas} must be at least 1")
        if policy == "cost_aware" and costs is None:
            raise ValueError("costs=None: the policy cost_aware needs them")
        self.policy = policy
        self.loads = [0] * replicas
        self._ledgers = None if costs is None else [ReplicaLedger(costs, slots) for _ in range(replicas)]
        self._alive = list(range(replicas))
        self._places = dict(places or {})
        self._next = 0

    @classmethod
    def of(cls, config: ServingConfig, places: Mapping[str, Sequence[int]] | None = None) -> Router:
        """Return the router of a configuration."""
        costs = RouterCosts.from_json(config.router_costs) if config.router == "cost_aware" else None
        return cls(config.router, config.replicas, places, costs=costs, slots=config.max_num_seqs)

    def route(
        self, adapter: str | None, prompt_tokens: int, output_tokens: int = 0, now_s: float = 0.0
    ) -> int:
        """Choose the replica of a request, and count it there. now_s: on any clock that goes forward."""
        tokens = prompt_tokens + output_tokens
        replica = self._choose(adapter, prompt_tokens, output_tokens, now_s)
        self.loads[replica] += tokens
        if self._ledgers is not None:
            self._ledgers[replica].sent(adapter, prompt_tokens, now_s)
        return replica

    def finished(self, replica: int, tokens: int, adapter: str | None = None) -> None:
        """Note the end of a request of so many prompt and output tokens that was routed to `replica`."""
        self.loads[replica] -= tokens
        if self._ledgers is not None:
            self._ledgers[replica].ended(adapter)

    def remove(self, replica: int) -> None:
        """Route around a replica from now on. Raises ValueError for the last one."""
        if self._alive == [replica]:
            raise ValueError(f"replica {replica} is the last one")
        self._alive.remove(replica)

    def restore(self, replica: int) -> None:
        """Route to a replica again that was removed: it begins anew, with nothing on its GPU."""
        if replica in self._alive:
            raise ValueError(f"replica {replica} was not removed")
        self._alive = sorted([*self._alive, replica])
        if self._ledgers is not None:
            self._ledgers[replica].forget()

    def _able(self, adapter: str | None) -> list[int]:
        """Return the replicas that may serve an adapter."""
        if adapter is None or adapter not in self._places:
            return self._alive
        return [replica for replica in self._alive if replica in self._places[adapter]] or self._alive

    def _cheapest(
        self, able: list[int], adapter: str | None, prompt_tokens: int, output_tokens: int, now_s: float
    ) -> int:
        ledgers = self._ledgers
        assert ledgers is not None
        return min(able, key=lambda index: ledgers[index].price(adapter, prompt_tokens, output_tokens, now_s))

    def _choose(self, adapter: str | None, prompt_tokens: int, output_tokens: int, now_s: float) -> int:
        alive, loads, tokens = self._able(adapter), self.loads, prompt_tokens + output_tokens
        if self.policy == "cost_aware":
            return self._cheapest(alive, adapter, prompt_tokens, output_tokens, now_s)
        if self.policy == "round_robin":
            self._next += 1
            return alive[(self._next - 1) % len(alive)]
        if len(alive) == 1:
            return alive[0]
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
