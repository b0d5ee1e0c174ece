"""Simulated time:

SimPy's environment, with callbacks at absolute instants and an explicit order of what happens at one instant.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

import simpy

# At one instant arrivals come first, so that whatever is planned then sees them; what fails or comes back then, before them.
FAILURE = -1
ARRIVAL = 0
TURN = 1


Callback = Callable[[int], None]


class Clock(simpy.Environment):
    """SimPy's environment. Equal instants resolve by order (ARRIVAL before TURN), then by who asked first.

    Calls stand in SimPy's own queue, beside its events, as (instant, order, number, callback, argument): an event for each, with its list of
    callbacks, takes three times as long. SimPy's delays would add up to another float than an absolute instant.
    """

    def call_at(self, at_s: float, order: int, callback: Callback, argument: int = 0) -> None:
        """Call `callback(argument)` at that instant, which is `now` then."""
        if at_s < self._now:
            raise ValueError(f"at_s={at_s} is before now, {self._now}")
        queue: list[Any] = self._queue
        heappush(queue, (at_s, order, next(self._eid), callback, argument))

    def advance_to(self, at_s: float) -> bool:
        """Let time pass to an instant if nothing else happens until then, that instant included; whoever waits for it can go on at once."""
        queue = self._queue
        if queue and queue[0][0] <= at_s:
            return False
        self._now = at_s
        return True

    def step(self) -> None:
        """Take what comes next: a call of ours, or an event of SimPy's."""
        queue: list[Any] = self._queue
        if queue and len(queue[0]) == 5:
            self._now, _, _, callback, argument = heappop(queue)
            callback(argument)
        else:
            super().step()

    def run(self, until: Any = None) -> Any:
        """Run until nothing is left to happen, or as SimPy's `run` says. The first case has a loop of its own."""
        if until is None:
            queue: list[Any] = self._queue
            while queue:
                if len(queue[0]) == 5:  # as in `step`, without a call for it
                    self._now, _, _, callback, argument = heappop(queue)
                    callback(argument)
                else:
                    super().step()
            return None
        return super().run(until)
