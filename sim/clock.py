"""Simulated time:

SimPy's environment, with callbacks at absolute instants and an explicit order of what happens at one instant.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappush
from typing import Any

import simpy

# At one instant arrivals come first, so that whatever is planned then sees them.
ARRIVAL = 0
TURN = 1


class Call(simpy.Event):
    """An event that calls one function at an instant."""

    def __init__(self, clock: Clock, at_s: float, order: int, callback: Callable[[float], None]) -> None:
        self.env = clock
        self.callbacks: list[Callable[[Any], None]] = [lambda _: callback(at_s)]
        self._value = None
        self._ok = True
        clock.schedule_at(self, at_s, order)


class Clock(simpy.Environment):
    """SimPy's environment. Equal instants resolve by order (ARRIVAL before TURN), then by who asked first."""

    def schedule_at(self, event: simpy.Event, at_s: float, order: int) -> None:
        """Schedule an event at an absolute instant: SimPy's own delays would add up to another float."""
        if at_s < self._now:
            raise ValueError(f"at_s={at_s} is before now, {self._now}")
        queue: list[Any] = self._queue
        heappush(queue, (at_s, order, next(self._eid), event))

    def call_at(self, at_s: float, order: int, callback: Callable[[float], None]) -> None:
        """Call `callback(at_s)` at that instant."""
        Call(self, at_s, order, callback)
