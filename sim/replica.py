"""One replica in simulated time:

the engine's scheduler, driven as the engine drives it, with the cost model as its GPU.

The engine plans step n+2 when step n has completed, which is when step n+1 starts. So there is one rule: **at
the start of each step the next one is planned**; what arrived or was loaded by then is seen. A replica with
nothing to run plans when something comes, and its step starts when the host has prepared it.

Fast-forward: while the scheduler says that it would plan the same step again, a run of equal steps (a
segment) is one event. The plan that ends it is made at the start of its last step; an arrival inside the
segment moves that forward to the next step's start.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.requests import Request
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from engine.step import Step, StepShape
from sim.clock import TURN, Clock
from sim.loads import LoadQueue
from sim.observe import Observer

Floats = NDArray[np.float64]


class StepTimes(Protocol):
    """What steps and loads cost, in seconds."""

    def step_s(self, shape: StepShape) -> float:
        """GPU time of a step."""

    def decode_run_s(self, shape: StepShape, steps: int) -> Floats:
        """GPU time of each of `steps` decode steps: `shape`, then one more KV token a row each.

        They never fall.
        """

    def host_s(self, shape: StepShape) -> float:
        """CPU time of one turn of the engine's loop."""

    def load_s(self, num_bytes: int) -> float:
        """Time to copy an adapter of so many bytes to the GPU."""

    def parts_s(self, shape: StepShape) -> Mapping[str, float]:
        """GPU time of a step by what it is spent on."""


class Replica:
    """Scheduler, cost model and load queue on a clock. `on_end` is called with each sequence that ends or is turned away."""

    def __init__(
        self,
        clock: Clock,
        scheduler: Scheduler,
        costs: StepTimes,
        observer: Observer,
        on_end: Callable[[Sequence], None],
        *,
        loads: LoadQueue | None = None,
        fast_forward: bool = True,
    ) -> None:
        self.scheduler = scheduler
        self.loads = LoadQueue(costs.load_s) if loads is None else loads
        self.observer = observer
        self._clock = clock
        self._costs = costs
        self._on_end = on_end
        self._fast_forward = fast_forward
        self._idle = True  # nothing runs, nothing is planned, no wake-up is due
        self._wake_version = 0
        self._running: Step | None = None
        self._planned: Step | None = None
        self._gpu_s = np.empty(0)
        self._starts: Floats | None = (
            None  # starts of the steps of the running segment, and the end of its last
        )
        self._last = 0  # which step of the segment is its last: the next plan is made at its start
        self._segment_version = 0

    def submit(self, request: Request, now_s: float) -> None:
        """Queue a request. Raises RefusedError where it can never run."""
        self.scheduler.add(request)
        if self._idle:
            self._wake_at(now_s)
        elif self._starts is not None:
            self._cut(now_s)

    # ---- nothing runs ----

    def _wake_at(self, at_s: float) -> None:
        self._wake_version += 1
        version = self._wake_version
        self._clock.call_at(at_s, TURN, lambda now_s: self._wake(version, now_s))

    def _wake(self, version: int, now_s: float) -> None:
        if version == self._wake_version and self._idle:
            self._start_from_idle(now_s)

    def _start_from_idle(self, now_s: float) -> None:
        step = self._plan(now_s)
        self._idle = step is None
        if step is not None:
            ready = step
            self._clock.call_at(
                now_s + self._costs.host_s(step.shape), TURN, lambda at_s: self._begin(ready, at_s)
            )
        elif self.loads.next_end_s < np.inf:
            self._wake_at(self.loads.next_end_s)

    # ---- steps ----

    def _plan(self, now_s: float) -> Step | None:
        for adapter in self.loads.ended(now_s):
            self.scheduler.load_finished(adapter, now_s)
        step = self.scheduler.schedule(now_s)
        for sequence, reason in self.scheduler.take_refused():
            self.observer.refused(sequence, reason)
            self._on_end(sequence)
        loads = self.scheduler.take_loads()
        if loads:
            self.loads.add(loads, now_s)
        self.observer.planned(self.scheduler, now_s)
        return step

    def _begin(self, step: Step, now_s: float) -> None:
        """Start a planned step; its predecessor is complete."""
        self._running, self._planned = step, None
        further = self.scheduler.extendable() if self._fast_forward else 0
        if further > 0 and self.loads.next_end_s > now_s:
            self._begin_segment(step, further, now_s)
            return
        gpu_s = self._costs.step_s(step.shape)
        duration_s = max(gpu_s, self._costs.host_s(step.shape))
        self.observer.ran(step.shape, now_s, duration_s, gpu_s)
        self._clock.call_at(now_s + duration_s, TURN, lambda at_s: self._end(step, at_s))
        self._planned = self._plan(now_s)

    def _end(self, step: Step, now_s: float) -> None:
        """Complete a step, or the segment that it began; start the next one."""
        self._running = None
        self.observer.completed(step, now_s)
        self.scheduler.complete(step)
        for sequence in step.finishing:
            self._on_end(sequence)
        if self._planned is not None:
            self._begin(self._planned, now_s)
        else:
            self._start_from_idle(now_s)

    # ---- many equal steps ----

    def _begin_segment(self, step: Step, further: int, now_s: float) -> None:
        self._gpu_s = self._costs.decode_run_s(step.shape, further + 1)
        starts = np.empty(further + 2)
        starts[0] = now_s
        starts[1:] = self._gpu_s
        host_s = self._costs.host_s(step.shape)
        if starts[1] < host_s:  # later steps only take longer
            np.maximum(starts[1:], host_s, out=starts[1:])
        self._starts = starts.cumsum()
        self._last = further
        self._cut(min(self.loads.next_end_s, float(self._starts[further])))
        if self._last == further:
            self._schedule_segment_plan()

    def _cut(self, at_s: float) -> None:
        """Make the first step that starts at or after `at_s` the segment's last, unless it ends earlier
        anyway.
        """
        assert self._starts is not None
        last = int(self._starts.searchsorted(at_s, side="left"))
        if last < self._last:
            self._last = last
            self._schedule_segment_plan()

    def _schedule_segment_plan(self) -> None:
        assert self._starts is not None
        self._segment_version += 1
        version = self._segment_version
        self._clock.call_at(
            float(self._starts[self._last]), TURN, lambda now_s: self._plan_after_segment(version, now_s)
        )

    def _plan_after_segment(self, version: int, now_s: float) -> None:
        """At the start of the segment's last step: catch up with the steps planned alike, and plan the one
        after.
        """
        if version != self._segment_version or self._starts is None:
            return
        step, starts, last = self._running, self._starts, self._last
        assert step is not None
        self._starts = None
        self.scheduler.extend(last)
        self.observer.ran_segment(step.shape, starts[: last + 2], float(self._gpu_s[: last + 1].sum()))
        self._clock.call_at(float(starts[last + 1]), TURN, lambda at_s: self._end(step, at_s))
        self._planned = self._plan(now_s)
