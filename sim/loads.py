"""Adapter loads on their way over PCIe: one queue per GPU, first in, first out. Behind a bounded host store, from disk through it."""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import inf

from engine.host_cache import HostCache
from engine.step import Load

# Assumptions, not measured: one NVMe drive, and packing by four threads that share the CPU with the engine.
DISK_BYTES_PER_S = 2.5e9
PACK_BYTES_PER_S = 1e9


def disk_s(num_bytes: int) -> float:
    """Return the seconds in which an adapter of so many bytes is read from disk and packed."""
    return num_bytes / DISK_BYTES_PER_S + num_bytes / PACK_BYTES_PER_S


@dataclass(slots=True, eq=False)
class _Copy:
    """A load that is in host memory at `ready_s`; its copy over PCIe ends at `end_s`."""

    ready_s: float
    order: int
    adapter: str
    copy_s: float
    end_s: float = inf

    def __lt__(self, other: _Copy) -> bool:
        return (self.ready_s, self.order) < (other.ready_s, other.order)


class LoadQueue:
    """Loads one after the other, in the order in which they are in host memory.

    host: which adapters are there; None: all of them. The others are read first, one after the other, while
    those before them are copied, each when host memory has room for it beside what is read and copied then.

    next_end_s: the instant when the next load ends; infinity where none is under way.

    Under tensor parallelism every rank loads its shard over its own link at the same time, so one queue
    stands for all; the disk is one for all `ranks`.
    """

    def __init__(
        self,
        load_s: Callable[[int], float],
        host: HostCache[str] | None = None,
        *,
        disk_s: Callable[[int], float] = disk_s,
        ranks: int = 1,
    ) -> None:
        self._load_s = load_s
        self._host = host
        self._disk_s = disk_s
        self._ranks = ranks
        self._waiting: deque[Load] = deque()  # for room in host memory
        self._copies: list[_Copy] = []  # in order
        self._ended: list[_Copy] = []  # not yet handed over
        self._order = 0
        self._link_free_at_s = 0.0
        self._disk_free_at_s = 0.0
        self.next_end_s = inf
        self.busy_s = 0.0
        self.disk_busy_s = 0.0
        self.disk_reads = 0

    def add(self, loads: Iterable[Load], now_s: float) -> None:
        """Queue loads that the scheduler decided just now."""
        self._end(now_s)
        self._waiting.extend(loads)
        self._claim(now_s)
        self._look()

    def ended(self, now_s: float) -> list[str]:
        """Hand over the adapters whose loads have ended by now, in order."""
        self._end(now_s)
        names = [copy.adapter for copy in self._ended]
        self._ended.clear()
        self._look()
        return names

    def _look(self) -> None:
        first = self._ended or self._copies
        self.next_end_s = first[0].end_s if first else inf

    def _end(self, now_s: float) -> None:
        """End copies up to now; each makes room in host memory for loads that wait for it."""
        while self._copies and self._copies[0].end_s <= now_s:
            copy = self._copies.pop(0)
            self._link_free_at_s = copy.end_s
            self._ended.append(copy)
            if self._host is not None:
                self._host.unpin(copy.adapter)
                self._claim(copy.end_s)

    def _claim(self, now_s: float) -> None:
        """Let waiting loads begin, in their order, as far as there is room."""
        began = False
        while self._waiting:
            ready_s = self._ready_s(self._waiting[0], now_s)
            if ready_s is None:
                break
            load = self._waiting.popleft()
            copy_s = self._load_s(load.num_bytes)
            self.busy_s += copy_s
            insort(self._copies, _Copy(ready_s, self._order, load.adapter, copy_s))
            self._order += 1
            began = True
        if began:
            self._time_copies()

    def _ready_s(self, load: Load, now_s: float) -> float | None:
        """Pin a load's adapter and return when it is in host memory; None where there is no room for it now."""
        if self._host is None:
            return now_s
        if self._host.where(load.adapter) == "disk":
            if self._host.admit(load.adapter, load.num_bytes) is None:
                return None
            duration_s = self._disk_s(load.num_bytes * self._ranks)
            self.disk_busy_s += duration_s
            self.disk_reads += 1
            self._disk_free_at_s = max(self._disk_free_at_s, now_s) + duration_s
            ready_s = self._disk_free_at_s
        else:
            ready_s = now_s
        self._host.pin(load.adapter)
        return ready_s

    def _time_copies(self) -> None:
        """Compute when copies end; those that have begun keep their place, as what is new is ready later."""
        free_at_s = self._link_free_at_s
        for copy in self._copies:
            copy.end_s = free_at_s = max(free_at_s, copy.ready_s) + copy.copy_s
