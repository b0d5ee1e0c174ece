"""Which adapters are on the GPU: a cache over the page pool, not a table of slots.

An adapter is absent, loading or resident. Idle residents stay until their pages are wanted, then the least recently used goes first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

from engine.pool import PagePool


class AdapterState(Enum):
    ABSENT = "absent"
    LOADING = "loading"
    RESIDENT = "resident"


@dataclass(frozen=True, slots=True)
class AdapterFootprint:
    """What an adapter takes on one GPU: whole pages, the bytes of its weights in them, and those that a load copies (the pages')."""

    pages: int
    weight_bytes: int
    copy_bytes: int


@dataclass(slots=True, eq=False)
class ResidentAdapter:
    """An adapter that holds pages. `slot` indexes the engine's per-adapter tables."""

    name: str
    slot: int
    pages: list[int]
    footprint: AdapterFootprint
    state: AdapterState = AdapterState.LOADING
    users: int = 0
    load_started_s: float = 0.0
    load_finished_s: float = 0.0


class Residency:
    """Owns the pages of adapters. Users are running requests; an adapter without users is idle and can be evicted."""

    def __init__(self, pool: PagePool, footprints: Mapping[str, AdapterFootprint]) -> None:
        self._pool = pool
        self.footprints = footprints
        self._held: dict[str, ResidentAdapter] = {}
        self._idle: OrderedDict[str, ResidentAdapter] = OrderedDict()  # least recently used first
        self._idle_pages = 0
        self.pages_held = 0
        self._free_slots: list[int] = []
        self._next_slot = 0
        self.num_loading = 0
        self.loads = 0
        self.evictions = 0

    def state(self, name: str) -> AdapterState:
        adapter = self._held.get(name)
        return AdapterState.ABSENT if adapter is None else adapter.state

    def get(self, name: str) -> ResidentAdapter:
        return self._held[name]

    @property
    def evictable_pages(self) -> int:
        return self._idle_pages

    def evictable_pages_without(self, name: str | None) -> int:
        """Return the pages of idle adapters other than `name`."""
        adapter = self._idle.get(name) if name is not None else None
        return self._idle_pages - (len(adapter.pages) if adapter is not None else 0)

    def evictable_pages_but(self, names: Container[str | None]) -> int:
        """Return the pages of idle adapters that are not in `names`."""
        return sum(len(adapter.pages) for name, adapter in self._idle.items() if name not in names)

    def idle_names(self) -> Iterator[str]:
        """Yield idle adapters, least recently used first."""
        return iter(self._idle)

    def start_load(self, name: str, now_s: float) -> ResidentAdapter:
        """Take pages for an absent adapter; the pages must be free. Its load ends with `finish_load`."""
        if name in self._held:
            raise ValueError(f"adapter {name} is {self._held[name].state.value} already")
        footprint = self.footprints[name]
        slot = self._free_slots.pop() if self._free_slots else self._next_slot
        if slot == self._next_slot:
            self._next_slot += 1
        adapter = ResidentAdapter(
            name, slot, self._pool.allocate(footprint.pages), footprint, load_started_s=now_s
        )
        self._held[name] = adapter
        self.pages_held += len(adapter.pages)
        self.num_loading += 1
        self.loads += 1
        return adapter

    def finish_load(self, name: str, now_s: float) -> None:
        """Note that the adapter's bytes are on the GPU."""
        adapter = self._held[name]
        if adapter.state is not AdapterState.LOADING:
            raise ValueError(f"adapter {name} is {adapter.state.value}, not loading")
        adapter.state = AdapterState.RESIDENT
        adapter.load_finished_s = now_s
        self.num_loading -= 1
        if adapter.users == 0:
            self._make_idle(adapter)

    def acquire(self, name: str) -> ResidentAdapter:
        """Add a user to a resident adapter."""
        adapter = self._held[name]
        if adapter.state is not AdapterState.RESIDENT:
            raise ValueError(f"adapter {name} is {adapter.state.value}, not resident")
        if adapter.users == 0:
            del self._idle[name]
            self._idle_pages -= len(adapter.pages)
        adapter.users += 1
        return adapter

    def release(self, name: str) -> None:
        """Drop a user; without users the adapter is idle, as the most recently used."""
        adapter = self._held[name]
        if adapter.users < 1:
            raise ValueError(f"adapter {name} has no users")
        adapter.users -= 1
        if adapter.users == 0:
            self._make_idle(adapter)

    def touch(self, name: str) -> None:
        """Make an idle adapter the most recently used one."""
        if name in self._idle:
            self._idle.move_to_end(name)

    def evict(self, pages_wanted: int, *, keep: Callable[[str], bool] | None = None) -> list[str]:
        """Evict idle adapters, least recently used first, until the pool has `pages_wanted` free pages or none is left.

        keep: names for which it is true stay. Returns the names evicted.
        """
        evicted: list[str] = []
        if self._pool.num_free >= pages_wanted:
            return evicted
        for name in list(self._idle):
            if keep is not None and keep(name):
                continue
            self._drop(self._idle.pop(name))
            evicted.append(name)
            if self._pool.num_free >= pages_wanted:
                break
        return evicted

    def _make_idle(self, adapter: ResidentAdapter) -> None:
        self._idle[adapter.name] = adapter
        self._idle_pages += len(adapter.pages)

    def _drop(self, adapter: ResidentAdapter) -> None:
        self._idle_pages -= len(adapter.pages)
        self.pages_held -= len(adapter.pages)
        self._pool.release(adapter.pages)
        self._free_slots.append(adapter.slot)
        del self._held[adapter.name]
        self.evictions += 1

    def holders(self) -> Iterator[list[int]]:
        """Yield the pages of each adapter that holds any."""
        return (adapter.pages for adapter in self._held.values())

    def check_integrity(self) -> None:
        """Raise AssertionError unless states, users, idle list, slots and page counts agree."""
        slots = [adapter.slot for adapter in self._held.values()]
        assert len(set(slots)) == len(slots), "two adapters share a slot"
        assert not set(slots) & set(self._free_slots), "a slot is free and held"
        assert self.num_loading == sum(a.state is AdapterState.LOADING for a in self._held.values())
        for name, adapter in self._held.items():
            assert len(adapter.pages) == adapter.footprint.pages, (
                f"adapter {name} holds a wrong number of pages"
            )
            idle = adapter.users == 0 and adapter.state is AdapterState.RESIDENT
            assert idle == (name in self._idle), (
                f"adapter {name}: {adapter.users} users, idle: {name in self._idle}"
            )
        assert self.pages_held == sum(len(a.pages) for a in self._held.values())
        assert self._idle_pages == sum(len(a.pages) for a in self._idle.values())
