"""Which adapters are on the GPU: a cache over the page pool, not a table of slots.

An adapter is absent, loading or resident. Idle residents stay until their pages are wanted; which goes first, `engine/idle_order.py` says.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

from engine.config import AdapterEviction
from engine.idle_order import IdleOrder, new_idle_order
from engine.pool import PagePool


class AdapterState(Enum):
    ABSENT = "absent"
    LOADING = "loading"
    RESIDENT = "resident"


_RESIDENT = AdapterState.RESIDENT  # Python looks a member of an enumeration up in 0.15 µs, a global in none


@dataclass(slots=True, unsafe_hash=True)
class AdapterFootprint:
    """What an adapter takes on one GPU: whole pages, the bytes of its weights in them, and those that a load copies (the pages'). A value:
    nobody changes it (not `frozen`, which no compiled class may be that is sent to another process).

    experts: how many a dynamic adapter has and gives a token; its weights lie outside the pool, and weight_bytes are those that one token reads.
    """

    pages: int
    weight_bytes: int
    copy_bytes: int
    experts: tuple[int, int] | None = None

    def bytes_of(self, rows: int) -> float:
        """Return the weight bytes that so many rows read together; of a dynamic adapter, those of the experts that they are expected to choose."""
        if self.experts is None or not rows:
            return self.weight_bytes if rows else 0
        experts, top_k = self.experts
        return self.weight_bytes / top_k * experts * (1 - (1 - top_k / experts) ** rows)


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
    idle_at: int = 0


class Residency:
    """Owns the pages of adapters. Users are running requests; an adapter without users is idle and can be evicted.

    held: those that hold pages, for others to read. max_adapters: most that hold pages at a time. on_evict: called with the name of each
    adapter that leaves.
    """

    def __init__(
        self,
        pool: PagePool,
        footprints: Mapping[str, AdapterFootprint],
        *,
        max_adapters: int | None = None,
        eviction: AdapterEviction = "lru",
        on_evict: Callable[[str], None] = lambda _name: None,
    ) -> None:
        self._pool = pool
        self.footprints = dict(footprints)
        self._max_adapters = max_adapters
        self._on_evict = on_evict
        self.held: dict[str, ResidentAdapter] = {}
        self.pinned: set[str] = set()  # used by nobody's request and yet for good
        self._idle: IdleOrder = new_idle_order(eviction)
        self._idle_pages = 0
        self._ticks = 0
        self.pages_held = 0
        self._free_slots: list[int] = []
        self._next_slot = 0
        self.num_loading = 0
        self.loads = 0
        self.evictions = 0

    def state(self, name: str) -> AdapterState:
        adapter = self.held.get(name)
        return AdapterState.ABSENT if adapter is None else adapter.state

    def is_resident(self, name: str) -> bool:
        """Whether an adapter's weights are on the GPU."""
        adapter = self.held.get(name)
        return adapter is not None and adapter.state is _RESIDENT

    def get(self, name: str) -> ResidentAdapter:
        return self.held[name]

    def tick(self) -> int:
        """Return the next instant of the clock by which idle adapters and idle KV pages are compared."""
        self._ticks += 1
        return self._ticks

    @property
    def evictable_pages(self) -> int:
        return self._idle_pages

    def evictable_pages_without(self, name: str | None) -> int:
        """Return the pages of idle adapters other than `name`."""
        if name is None or name not in self._idle:
            return self._idle_pages
        return self._idle_pages - len(self.held[name].pages)

    def evictable_pages_but(self, names: Container[str | None]) -> int:
        """Return the pages of idle adapters that are not in `names`."""
        return sum(len(self.held[name].pages) for name in self._idle.names() if name not in names)

    def idle_names(self) -> Iterator[str]:
        """Yield idle adapters in the order in which they would be evicted."""
        return self._idle.names()

    def next_victim(self, keep: Container[str | None] = ()) -> ResidentAdapter | None:
        """Return the idle adapter not in `keep` that would be evicted next."""
        return next((self.held[name] for name in self._idle.names() if name not in keep), None)

    @property
    def full(self) -> bool:
        """Whether as many adapters hold pages as may."""
        return self._max_adapters is not None and len(self.held) >= self._max_adapters

    def start_load(self, name: str, now_s: float) -> ResidentAdapter:
        """Take pages for an absent adapter; the pages must be free. Its load ends with `finish_load`."""
        if name in self.held:
            raise ValueError(f"adapter {name} is {self.held[name].state.value} already")
        footprint = self.footprints[name]
        slot = self._free_slots.pop() if self._free_slots else self._next_slot
        if slot == self._next_slot:
            self._next_slot += 1
        adapter = ResidentAdapter(
            name, slot, self._pool.allocate(footprint.pages), footprint, load_started_s=now_s
        )
        self.held[name] = adapter
        self.pages_held += len(adapter.pages)
        self.num_loading += 1
        self.loads += 1
        return adapter

    def finish_load(self, name: str, now_s: float) -> None:
        """Note that the adapter's bytes are on the GPU."""
        adapter = self.held[name]
        if adapter.state is not AdapterState.LOADING:
            raise ValueError(f"adapter {name} is {adapter.state.value}, not loading")
        adapter.state = AdapterState.RESIDENT
        adapter.load_finished_s = now_s
        self.num_loading -= 1
        if adapter.users == 0:
            self._make_idle(adapter)

    def acquire(self, name: str) -> ResidentAdapter:
        """Add a user to a resident adapter."""
        adapter = self.held[name]
        if adapter.state is not _RESIDENT:
            raise ValueError(f"adapter {name} is {adapter.state.value}, not resident")
        if adapter.users == 0:
            self._idle.remove(name)
            self._idle_pages -= len(adapter.pages)
        adapter.users += 1
        return adapter

    def release(self, name: str) -> None:
        """Drop a user; without users the adapter is idle, as the most recently used."""
        adapter = self.held[name]
        if adapter.users < 1:
            raise ValueError(f"adapter {name} has no users")
        adapter.users -= 1
        if adapter.users == 0:
            self._make_idle(adapter)

    def pin(self, name: str) -> None:
        """Keep a resident adapter for good."""
        self.acquire(name)
        self.pinned.add(name)

    def touch(self, name: str) -> None:
        """Note that an idle adapter will be used soon."""
        if name in self._idle:
            self.touch_idle(self.held[name])

    def touch_idle(self, adapter: ResidentAdapter) -> None:
        """Note that an adapter, which is idle, will be used soon."""
        self._ticks = adapter.idle_at = self._ticks + 1
        self._idle.touch(adapter.name)

    def load_failed(self, name: str) -> None:
        """Give back what a load that cannot end had taken."""
        if self.held[name].state is not AdapterState.LOADING:
            raise ValueError(f"adapter {name} is {self.held[name].state.value}, not loading")
        self.num_loading -= 1
        self._let_go(self.held.pop(name))

    def drop(self, name: str) -> None:
        """Evict one idle adapter."""
        adapter = self.held.pop(name)
        self._idle.evicted(name)
        self._idle_pages -= len(adapter.pages)
        self._let_go(adapter)
        self.evictions += 1
        self._on_evict(name)

    def is_idle(self, name: str) -> bool:
        """Whether an adapter is on the GPU and nobody uses it."""
        return name in self._idle

    def _make_idle(self, adapter: ResidentAdapter) -> None:
        adapter.idle_at = self.tick()
        self._idle.add(adapter.name, len(adapter.pages))
        self._idle_pages += len(adapter.pages)

    def _let_go(self, adapter: ResidentAdapter) -> None:
        self.pages_held -= len(adapter.pages)
        self._pool.release(adapter.pages)
        self._free_slots.append(adapter.slot)

    def holders(self) -> Iterator[list[int]]:
        """Yield the pages of each adapter that holds any."""
        return (adapter.pages for adapter in self.held.values())

    def check_integrity(self) -> None:
        """Raise AssertionError unless states, users, idle list, slots and page counts agree."""
        slots = [adapter.slot for adapter in self.held.values()]
        assert len(set(slots)) == len(slots), "two adapters share a slot"
        assert not set(slots) & set(self._free_slots), "a slot is free and held"
        assert self.num_loading == sum(a.state is AdapterState.LOADING for a in self.held.values())
        for name, adapter in self.held.items():
            assert len(adapter.pages) == adapter.footprint.pages, (
                f"adapter {name} holds a wrong number of pages"
            )
            idle = adapter.users == 0 and adapter.state is _RESIDENT
            assert idle == (name in self._idle), (
                f"adapter {name}: {adapter.users} users, idle: {name in self._idle}"
            )
        assert self.pages_held == sum(len(a.pages) for a in self.held.values())
        assert self._idle_pages == sum(len(self.held[name].pages) for name in self._idle.names())
        assert self._max_adapters is None or len(self.held) <= self._max_adapters
