"""Who waits in vLLM: first come, first served, except that a request whose adapter finds no slot is passed over.

vLLM 0.8.5 walks its queue from the front in every step and puts aside what it passes over (`Scheduler.schedule`, `skipped_waiting_requests`).
With ten thousands waiting that walk is long; here a step looks at heads of per-adapter lines only, and says how long vLLM's walk would have been.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Container, Iterator
from heapq import heappop, heappush

from engine.sequence import Sequence

Line = deque[tuple[int, Sequence]]
NO_ADAPTER = ""  # requests of the base model stand in a line of their own, which is never passed over


def line_of(sequence: Sequence) -> str:
    """Return the name of the line that a request stands in."""
    return sequence.request.adapter or NO_ADAPTER


class SkippingQueue:
    """Waiting requests by adapter, in one order over all. A preempted one goes before all others."""

    def __init__(self) -> None:
        self._lines: dict[str, Line] = {}
        self._places: list[int] = []  # of all that wait, ascending
        self._heads: list[tuple[int, str]] = []  # heap of lines by their first place, cleaned lazily
        self._open: list[tuple[int, str]] = []  # the same of lines whose adapter runs
        self._next = 0
        self._front = -1

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Sequence]:
        return (sequence for line in self._lines.values() for _, sequence in line)

    def push(self, sequence: Sequence, *, running: bool) -> None:
        """Take in a new request; `running`: whether a running request uses its adapter."""
        place, self._next = self._next, self._next + 1
        self._places.append(place)
        line = self._lines.setdefault(line_of(sequence), deque())
        line.append((place, sequence))
        if len(line) == 1:
            self._note_head(line_of(sequence), place, running)

    def push_front(self, sequence: Sequence, *, running: bool) -> None:
        """Take back a preempted one."""
        place, self._front = self._front, self._front - 1
        self._places.insert(0, place)
        self._lines.setdefault(line_of(sequence), deque()).appendleft((place, sequence))
        self._note_head(line_of(sequence), place, running)

    def opened(self, adapter: str | None) -> None:
        """Note that an adapter runs from now on, so that its line is not passed over."""
        line = self._lines.get(adapter or NO_ADAPTER)
        if line:
            heappush(self._open, (line[0][0], adapter or NO_ADAPTER))

    def first(self, running: Container[str] | None) -> tuple[int, Sequence] | None:
        """Return the place and the request that would be admitted next; None where all are passed over.

        running: the adapters that run, where no other one finds a slot; None: any adapter does.
        """
        heap = self._heads if running is None else self._open
        while heap:
            place, name = heap[0]
            line = self._lines.get(name)
            stale = not line or line[0][0] != place
            if not stale and (running is None or name == NO_ADAPTER or name in running):
                assert line
                return line[0]
            heappop(heap)
        return None

    def take(self, sequence: Sequence, *, running: bool) -> None:
        """Let the first of a line go; `running`: whether its adapter runs from now on."""
        name = line_of(sequence)
        line = self._lines[name]
        place, head = line.popleft()
        assert head is sequence
        del self._places[bisect_left(self._places, place)]
        if line:
            self._note_head(name, line[0][0], running)
        else:
            del self._lines[name]

    def before(self, place: int) -> int:
        """Return how many wait before a place."""
        return bisect_left(self._places, place)

    def _note_head(self, name: str, place: int, running: bool) -> None:
        heappush(self._heads, (place, name))
        if running or name == NO_ADAPTER:
            heappush(self._open, (place, name))

    def check_integrity(self) -> None:
        """Raise AssertionError unless lines and places agree."""
        places = sorted(place for line in self._lines.values() for place, _ in line)
        assert places == self._places
        assert all(self._lines.values())
        heads = {(line[0][0], name) for name, line in self._lines.items()}
        assert heads <= set(self._heads), "a line has no head"
