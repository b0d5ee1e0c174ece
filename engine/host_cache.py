"""Which adapters are in host memory: a bounded cache in front of the disk, least recently loaded first out. No memory is touched here.

The engine's host store and the simulator's load queue drive the same object, so both see the same hits.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Generic, Literal, TypeVar

Key = TypeVar("Key", bound=Hashable)
Place = Literal["host", "disk"]


class HostCache(Generic[Key]):
    """Adapters by key, each with its bytes; at most `capacity_bytes` in all, None is no bound.

    What is pinned stays: it is being read into host memory or copied from it.
    """

    def __init__(self, capacity_bytes: int | None = None) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self.evictions = 0
        self._bytes: OrderedDict[Key, int] = OrderedDict()  # least recently loaded first
        self._pins: dict[Key, int] = {}
        self._pinned_bytes = 0

    def where(self, key: Key) -> Place:
        """Say whether an adapter is in host memory; one that was never heard of is on disk."""
        return "host" if key in self._bytes else "disk"

    def __iter__(self) -> Iterator[Key]:
        """Yield the adapters in host memory, the least recently loaded first."""
        return iter(self._bytes)

    def is_pinned(self, key: Key) -> bool:
        """Whether somebody reads or copies the adapter's memory."""
        return key in self._pins

    def fill(self, key: Key, num_bytes: int) -> bool:
        """Take an adapter in if nothing has to leave for it: how a store is filled at the start, in order."""
        if self.capacity_bytes is not None and self.used_bytes + num_bytes > self.capacity_bytes:
            return False
        return self.admit(key, num_bytes) is not None

    def admit(self, key: Key, num_bytes: int) -> list[Key] | None:
        """Take an adapter in as the most recent, and return whom it replaces; None where the pinned ones leave no room for now.

        Raises ValueError for one that is there already or is larger than all the room.
        """
        if key in self._bytes:
            raise ValueError(f"adapter {key} is in host memory already")
        evicted: list[Key] = []
        if self.capacity_bytes is not None:
            if num_bytes > self.capacity_bytes:
                raise ValueError(f"adapter {key} has {num_bytes} bytes, host memory {self.capacity_bytes}")
            if self._pinned_bytes + num_bytes > self.capacity_bytes:
                return None
            evicted = self._evict(self.capacity_bytes - num_bytes)
        self._bytes[key] = num_bytes
        self.used_bytes += num_bytes
        return evicted

    def _evict(self, most_bytes: int) -> list[Key]:
        """Evict unpinned adapters, the least recent first, until at most so many bytes are used."""
        evicted: list[Key] = []
        left_bytes = self.used_bytes
        for key, num_bytes in self._bytes.items():
            if left_bytes <= most_bytes:
                break
            if key not in self._pins:
                evicted.append(key)
                left_bytes -= num_bytes
        for key in evicted:
            self.remove(key)
        self.evictions += len(evicted)
        return evicted

    def remove(self, key: Key) -> None:
        """Take an adapter out; nobody may have pinned it."""
        if key in self._pins:
            raise ValueError(f"adapter {key} is pinned")
        self.used_bytes -= self._bytes.pop(key)

    def pin(self, key: Key) -> None:
        """Keep an adapter in host memory until `unpin`, and make it the most recent. Pins count."""
        self._bytes.move_to_end(key)
        if key not in self._pins:
            self._pins[key] = 0
            self._pinned_bytes += self._bytes[key]
        self._pins[key] += 1

    def unpin(self, key: Key) -> None:
        """Take one pin back."""
        count = self._pins.get(key, 0)
        if not count:
            raise ValueError(f"adapter {key} is not pinned")
        if count > 1:
            self._pins[key] = count - 1
            return
        del self._pins[key]
        self._pinned_bytes -= self._bytes[key]

    def check_integrity(self) -> None:
        """Raise AssertionError unless the bytes add up, keep the bound, and only what is there is pinned."""
        assert self.used_bytes == sum(self._bytes.values()), "used bytes do not add up"
        assert self.capacity_bytes is None or self.used_bytes <= self.capacity_bytes, "the bound is exceeded"
        assert self._pins.keys() <= self._bytes.keys(), "an adapter is pinned that is not there"
        assert self._pinned_bytes == sum(self._bytes[key] for key in self._pins), "pinned bytes do not add up"
        assert all(self._pins.values()), "an adapter has no pins but is listed"
