"""One replica in simulated time:

the engine's scheduler, driven as the engine drives it, with the cost model as its GPU.

The engine plans step n+2 when step n has completed, which is when step n+1 starts. So there is one rule: **at
the start of each step the next one is planned**; what arrived or was loaded by then is seen. A replica with
nothing to run plans when something comes, and its step starts when the host has prepared it.

Fast-forward: while the scheduler says that it would plan the same step again, a run of equal steps (a
segment) is one event. The plan that ends it is made at the start of its last step; an arrival inside the
segment moves that forward to the next step's start.

What a replica does at an instant is a *turn*; each turn says which comes next, and when. Where nobody else has
anything to do until then, it follows at once, without passing through the clock's queue.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf
from typing import Any, Protocol

from engine.requests import Request
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from engine.step import Step, StepShape
from sim.clock import TURN, Clock
from sim.heating import Heat, Heating
from sim.loads import LoadQueue
from sim.merge_costs import MergeSwitches
from sim.observe import Observer
from sim.segment import DecodeRun, Segment

# The next turn and its instant; None: an arrival has to come first. (Its turn returns such a pair, too.)
Turn = Callable[[float], Any]
Next = tuple[float, Turn] | None


class StepTimes(Protocol):
    """What steps and loads cost, in seconds."""

    @property
    def heating(self) -> Heating | None:
        """How a GPU slows down under prompts; None: it does not."""

    def step_s(self, shape: StepShape) -> float:
        """GPU time of a step, on a cool GPU."""

    def decode_run(self, shape: StepShape, steps: int) -> DecodeRun:
        """GPU time of the next 1 … `steps` decode steps: `shape`, then one more KV token a row each.

        As many as lie on a straight line; they never fall.
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
        switches: MergeSwitches | None = None,
    ) -> None:
        scheduler.count_pages()
        self.scheduler = scheduler
        self.loads = LoadQueue(costs.load_s) if loads is None else loads
        self.observer = observer
        self._clock = clock
        self._costs = costs
        self._heat = None if costs.heating is None else Heat(costs.heating)
        self._on_end = on_end
        self._fast_forward = fast_forward
        self._switches = switches
        self._merged: str | None = None  # what the weights hold, under merge='dynamic'
        self._idle = True  # nothing runs, nothing is planned
        self._running: Step | None = None
        self._planned: Step | None = None
        self._segment: Segment | None = None  # the running one, until the plan at the start of its last step
        self._turn: Turn = self._start_from_idle  # the one that waits in the clock's queue …
        self._version = 0  # … under this number; an event with another one is void

    def submit(self, request: Request, now_s: float) -> None:
        """Queue a request. Raises RefusedError where it can never run."""
        self.scheduler.add(request)
        if self._idle:
            self._wait_for(now_s, self._start_from_idle)
        elif self._segment is not None:
            self._cut(self._segment, now_s)

    def stop(self) -> None:
        """Do nothing any more, as a process that died: the turn that was to come is void."""
        self._version += 1

    # ---- turns ----

    def _wait_for(self, at_s: float, turn: Turn) -> None:
        """Let a turn come at an instant, instead of what was to come."""
        self._turn = turn
        self._version += 1
        self._clock.call_at(at_s, TURN, self._resume, self._version)

    def _resume(self, version: int) -> None:
        if version != self._version:
            return
        clock = self._clock
        following: Next = self._turn(clock.now)
        while following is not None:
            at_s, turn = following
            if not clock.advance_to(at_s):
                self._wait_for(at_s, turn)
                return
            following = turn(at_s)

    # ---- nothing runs ----

    def _start_from_idle(self, now_s: float) -> Next:
        step = self._planned = self._plan(now_s)
        self._idle = step is None
        if step is not None:
            return now_s + self._costs.host_s(step.shape), self._begin
        next_end_s = self.loads.next_end_s
        return (next_end_s, self._start_from_idle) if next_end_s < inf else None

    # ---- steps ----

    def _plan(self, now_s: float) -> Step | None:
        scheduler = self.scheduler
        if self.loads.next_end_s <= now_s:
            for adapter in self.loads.ended(now_s):
                scheduler.load_finished(adapter, now_s)
        step = scheduler.schedule(now_s)
        if scheduler.queue.time_dependent:
            for sequence, reason in scheduler.take_refused():
                self.observer.refused(sequence, reason)
                self._on_end(sequence)
        if scheduler.loads:
            self.loads.add(scheduler.take_loads(), now_s)
        self.observer.planned(scheduler, now_s)
        return step

    def _begin(self, now_s: float) -> Next:
        """Start the planned step; its predecessor is complete."""
        step = self._running = self._planned
        assert step is not None
        if step.merged != self._merged:
            return self._run_alone(step, self._costs.step_s(step.shape), now_s, self._switch_s(step))
        if self._fast_forward and self.scheduler.steady and self.loads.next_end_s > now_s:
            further = self.scheduler.extendable()
            if further > 0:
                return self._begin_segment(step, further, now_s)
        return self._run_alone(step, self._costs.step_s(step.shape), now_s)

    def _switch_s(self, step: Step) -> float:
        """Change what the weights hold to what a step needs; return the GPU time of it."""
        before, self._merged = self._merged, step.merged
        assert self._switches is not None
        return self._switches.between(before, step.merged)

    def _run_alone(self, step: Step, gpu_s: float, now_s: float, switch_s: float = 0.0) -> Next:
        shape = step.shape
        if self._heat is not None and shape.prefill_chunks:
            gpu_s = self._heat.run(gpu_s, shape.tokens, now_s)
        gpu_s += switch_s
        host_s = self._costs.host_s(shape)
        duration_s = gpu_s if gpu_s > host_s else host_s
        self.observer.ran(shape, now_s, duration_s, gpu_s)
        self._planned = self._plan(now_s)
        return now_s + duration_s, self._end

    def _end(self, now_s: float) -> Next:
        """Complete a step, or the segment that it began; start the next one."""
        step = self._running
        assert step is not None
        self._running = None
        finishing = step.finishing
        if finishing or step.prefills:
            self.observer.completed(step, now_s)
        self.scheduler.complete(step)
        for sequence in finishing:
            self._on_end(sequence)
        return self._start_from_idle(now_s) if self._planned is None else self._begin(now_s)

    # ---- many equal steps ----

    def _begin_segment(self, step: Step, further: int, now_s: float) -> Next:
        run = self._costs.decode_run(step.shape, further + 1)
        segment = Segment(run, self._costs.host_s(step.shape), now_s)
        if segment.last == 0:
            return self._run_alone(step, run.first_s, now_s)
        next_end_s = self.loads.next_end_s
        if next_end_s < segment.start_of(segment.last):
            segment.last = segment.first_from(next_end_s)
        self._segment = segment
        return segment.start_of(segment.last), self._plan_in_segment

    def _cut(self, segment: Segment, at_s: float) -> None:
        """Make the first step that starts at or after `at_s` the segment's last, unless it ends earlier
        anyway.
        """
        last = segment.first_from(at_s)
        if last < segment.last:
            segment.last = last
            self._wait_for(segment.start_of(last), self._plan_in_segment)

    def _plan_in_segment(self, now_s: float) -> Next:
        """At the start of the segment's last step: catch up with the steps planned alike, and plan the one
        after.
        """
        step, segment = self._running, self._segment
        assert step is not None and segment is not None
        self._segment = None
        self.scheduler.extend(segment.last)
        self.observer.ran_segment(step.shape, segment)
        self._planned = self._plan(now_s)
        return segment.start_of(segment.last + 1), self._end
