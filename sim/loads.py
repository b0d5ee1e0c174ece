"""Adapter loads on their way over PCIe: one queue per GPU, first in, first out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from math import inf

from engine.step import Load


class LoadQueue:
    """Loads one after the other.

    Under tensor parallelism every rank loads its shard over its own link at the same time, so one queue
    stands for all.
    """

    def __init__(self, load_s: Callable[[int], float]) -> None:
        self._load_s = load_s
        self._ends: deque[tuple[float, str]] = deque()
        self._free_at_s = 0.0
        self.busy_s = 0.0

    def add(self, loads: Iterable[Load], now_s: float) -> None:
        """Queue loads that the scheduler decided just now."""
        for load in loads:
            duration_s = self._load_s(load.num_bytes)
            self._free_at_s = max(self._free_at_s, now_s) + duration_s
            self.busy_s += duration_s
            self._ends.append((self._free_at_s, load.adapter))

    def ended(self, now_s: float) -> list[str]:
        """Hand over the adapters whose loads have ended by now, in order."""
        names = []
        while self._ends and self._ends[0][0] <= now_s:
            names.append(self._ends.popleft()[1])
        return names

    @property
    def next_end_s(self) -> float:
        """The instant when the next load ends; infinity where none is under way."""
        return self._ends[0][0] if self._ends else inf
