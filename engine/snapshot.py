"""The state of an engine between two turns, as figures for whoever watches it."""

from __future__ import annotations

from dataclasses import dataclass

from engine.engine import Engine


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The engine's state between two turns. Counters are since the engine last started anew.

    Pages are free, of requests (kv), kept for later ones that start alike (cached), or of adapters.
    """

    running: int
    waiting: int
    num_pages: int
    free_pages: int
    kv_pages: int
    cached_pages: int
    adapter_pages: int
    resident_adapters: int
    registered_adapters: int
    adapter_loads: int
    adapter_evictions: int
    preemptions: int
    prefix_queried_tokens: int
    prefix_hit_tokens: int


def take_snapshot(engine: Engine) -> Snapshot:
    """Read the engine's state: on its thread."""
    scheduler = engine.scheduler
    residency, pages = scheduler.residency, engine.blueprint.memory.num_pages
    kv, cached, held = scheduler.kv_pages, scheduler.pool.num_kept, residency.pages_held
    return Snapshot(
        running=scheduler.num_running,
        waiting=scheduler.num_waiting,
        num_pages=pages,
        free_pages=pages - kv - cached - held,
        kv_pages=kv,
        cached_pages=cached,
        adapter_pages=held,
        resident_adapters=sum(1 for _ in residency.holders()),
        registered_adapters=len(residency.footprints),
        adapter_loads=residency.loads,
        adapter_evictions=residency.evictions,
        preemptions=scheduler.preemptions,
        prefix_queried_tokens=scheduler.prefix_queried_tokens,
        prefix_hit_tokens=scheduler.prefix_hit_tokens,
    )
