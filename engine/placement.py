"""Which replicas serve which adapters. Torch-free: the engine's router and the simulated cluster's take the same placement.

    everywhere      any replica serves any adapter
    partitioned     each adapter has one replica: each GPU holds fewer, and loads each once
    hot_replicated  adapters with more traffic than HOT of a replica's fair share are served everywhere, the others partitioned

Every replica knows all adapters, so that when one dies the others serve its: a placement says where requests go, not what is registered.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from engine.config import Placement, ServingConfig

HOT = 0.25  # of what one replica would have of all traffic
Places = dict[str, tuple[int, ...]]


def place(
    policy: Placement, adapters: Iterable[str], replicas: int, popularity: Mapping[str, float] | None = None
) -> Places:
    """Return the replicas of each adapter. popularity: its traffic, in any unit; an adapter that is not named has the mean, or 1.

    Partitioning is greedy, the most popular first to the replica with the least: within 4/3 of the best balance (Graham, 1969).
    """
    names = list(adapters)
    everywhere = tuple(range(replicas))
    if policy == "everywhere" or replicas == 1:
        return dict.fromkeys(names, everywhere)
    known = {name: float(popularity[name]) for name in names if popularity and name in popularity}
    usual = sum(known.values()) / len(known) if known else 1.0
    traffic = {name: known.get(name, usual) for name in names}
    hot_from = HOT * sum(traffic.values()) / replicas
    loads = [0.0] * replicas
    places: Places = {}
    for name in sorted(names, key=lambda name: (-traffic[name], name)):
        if policy == "hot_replicated" and traffic[name] > hot_from:
            places[name] = everywhere
            continue
        replica = min(everywhere, key=lambda index: (loads[index], index))
        loads[replica] += traffic[name]
        places[name] = (replica,)
    return places


def places_of(config: ServingConfig, adapters: Iterable[str]) -> Places | None:
    """Return the placement of a configuration's adapters; None where it restricts nothing."""
    if config.placement == "everywhere" or config.replicas == 1:
        return None
    return place(config.placement, adapters, config.replicas, config.adapter_popularity)
