"""In what order idle adapters are evicted."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Protocol

from engine.config import AdapterEviction

# A reload costs its pages and a fixed part, worth about so many pages: 0.1 ms of launch and waiting at 50 GB/s and 2 MiB pages (H200, 2026-11-22).
FIXED_RELOAD_PAGES = 2.5


class IdleOrder(Protocol):
    """The idle adapters. `names` may be walked while names that it has yielded are removed."""

    def __contains__(self, name: object) -> bool: ...

    def add(self, name: str, pages: int) -> None:
        """Take in an adapter that has just become idle."""

    def remove(self, name: str) -> None:
        """Take an adapter out: it is used."""

    def evicted(self, name: str) -> None:
        """Take an adapter out: it leaves the GPU."""

    def touch(self, name: str, /) -> None:
        """Note that an adapter will be used soon."""

    def names(self) -> Iterator[str]:
        """Yield the adapters, the next to go first."""


class LruOrder:
    """The least recently used goes first."""

    def __init__(self) -> None:
        self._idle: OrderedDict[str, None] = OrderedDict()
        self.touch: Callable[[str], None] = (
            self._idle.move_to_end
        )  # in every plan that leaves somebody waiting, for each of them

    def __contains__(self, name: object) -> bool:
        return name in self._idle

    def add(self, name: str, pages: int) -> None:
        del pages
        self._idle[name] = None

    def remove(self, name: str) -> None:
        del self._idle[name]

    def evicted(self, name: str) -> None:
        del self._idle[name]

    def names(self) -> Iterator[str]:
        if not self._idle:
            return
        first = next(iter(self._idle))
        yield first  # most callers want no more, and a copy of all names takes a while
        for name in [name for name in self._idle if name != first]:
            if name in self._idle:
                yield name


class GdsfOrder:
    """The lowest `age + uses · (fixed reload cost + pages) / pages` goes first: rarely used ones, large ones before small ones.

    `age` is the value of the last one that went, so that past popularity fades. Uses are counted while an adapter is registered.
    Source: greedy-dual-size with frequency, Cherkasova, HPL-98-69.
    """

    def __init__(self) -> None:
        self._value: dict[str, float] = {}  # of idle adapters
        self._entry: dict[str, int] = {}  # of idle adapters: the number of the heap entry that counts
        self._uses: dict[str, int] = {}
        self._heap: list[
            tuple[float, int, str]
        ] = []  # (value, number, name); an entry whose number is not its name's is void
        self._age = 0.0
        self._count = 0

    def __contains__(self, name: object) -> bool:
        return name in self._value

    def add(self, name: str, pages: int) -> None:
        self._uses[name] = self._uses.get(name, 0) + 1
        self._set(name, self._age + self._uses[name] * (FIXED_RELOAD_PAGES + pages) / pages)

    def remove(self, name: str) -> None:
        del self._value[name], self._entry[name]

    def evicted(self, name: str) -> None:
        self._age = max(self._age, self._value[name])
        self.remove(name)

    def touch(self, name: str, /) -> None:
        self._set(name, self._value[name] + 1.0)

    def _set(self, name: str, value: float) -> None:
        self._value[name] = value
        self._count += 1
        self._entry[name] = self._count
        heapq.heappush(self._heap, (value, self._count, name))
        if len(self._heap) > 2 * len(self._value) + 64:
            self._heap = [entry for entry in self._heap if self._counts(entry)]
            heapq.heapify(self._heap)

    def _counts(self, entry: tuple[float, int, str]) -> bool:
        return self._entry.get(entry[2]) == entry[1]

    def names(self) -> Iterator[str]:
        heap = self._heap
        while heap and not self._counts(heap[0]):
            heapq.heappop(heap)
        if not heap:
            return
        first = heap[0]
        yield first[2]  # most callers want no more, and sorting takes a while
        for entry in sorted(heap):
            if entry != first and self._counts(entry):
                yield entry[2]


def new_idle_order(eviction: AdapterEviction) -> IdleOrder:
    """Return the order of a policy."""
    return LruOrder() if eviction == "lru" else GdsfOrder()
