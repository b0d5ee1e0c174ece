"""One vLLM engine in simulated time: its scheduler, driven as vLLM's engine core drives it.

Schedule, run, take in the result, schedule again: nothing overlaps, so what comes while a step runs is seen when it has ended. A step lasts as
long as the cost model says, and longer by the adapters that it has to load and by the walk past waiting requests that find no slot (within a
run of equal steps, by those that waited when it began).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from engine.requests import Request
from engine.sequence import Sequence
from engine.step import Step
from engine.vllm_scheduler import VllmScheduler
from sim.clock import Clock
from sim.loads import LoadQueue
from sim.observe import Observer
from sim.replica import Next, Replica, StepTimes
from sim.segment import DecodeRun, Segment


class VllmReplica(Replica):
    """A replica whose next step is planned when the last one has ended. scan_s: the walk past one waiting request."""

    def __init__(
        self,
        clock: Clock,
        scheduler: VllmScheduler,
        costs: StepTimes,
        observer: Observer,
        on_end: Callable[[Sequence], None],
        *,
        loads: LoadQueue,
        fast_forward: bool = True,
        scan_s: float = 0.0,
    ) -> None:
        super().__init__(
            clock, cast(Any, scheduler), costs, observer, on_end, loads=loads, fast_forward=fast_forward
        )
        self._vllm = scheduler
        self._scan_s = scan_s

    def submit(self, request: Request, now_s: float) -> None:
        """Queue a request. Raises RefusedError where it can never run, or the client holds too many."""
        matters = self._vllm.matters(request.adapter)
        self._vllm.add(request)
        if self._idle:
            self._wait_for(now_s, self._start_from_idle)
        elif matters and self._segment is not None:
            self._cut(self._segment, now_s)

    def _plan(self, now_s: float) -> Step | None:
        step = self._vllm.schedule(now_s)
        self.observer.planned(self.scheduler, now_s)
        return step

    def _begin(self, now_s: float) -> Next:
        step = self._running = self._planned
        assert step is not None
        load_s = self._vllm.loads_now * self._costs.load_s(0)
        self.loads.busy_s += load_s
        extra_s = load_s + self._vllm.skipped * self._scan_s
        further = self._vllm.extendable() if self._fast_forward and not load_s else 0
        if further > 0:
            return self._begin_steps(step, further, extra_s, now_s)
        return self._run_one(step, extra_s, now_s)

    def _run_one(self, step: Step, extra_s: float, now_s: float) -> Next:
        gpu_s = self._costs.step_s(step.shape)
        self.observer.ran(step.shape, now_s, gpu_s + extra_s, gpu_s)
        self._planned = None
        return now_s + gpu_s + extra_s, self._end

    def _begin_steps(self, step: Step, further: int, extra_s: float, now_s: float) -> Next:
        run = self._costs.decode_run(step.shape, further + 1)
        whole = DecodeRun(run.first_s + extra_s, run.slope_s, run.steps)
        self._segment = segment = Segment(whole, 0.0, now_s)
        self._planned = None
        return segment.start_of(segment.last + 1), self._end_steps

    def _cut(self, segment: Segment, at_s: float) -> None:
        """Let the segment end with the step that runs now."""
        last = max(0, segment.first_from(at_s) - 1)
        if last < segment.last:
            segment.last = last
            self._wait_for(segment.start_of(last + 1), self._end_steps)

    def _end_steps(self, now_s: float) -> Next:
        step, segment = self._running, self._segment
        assert step is not None and segment is not None
        self._segment = None
        self._vllm.extend(segment.last)
        self.observer.ran_segment(step.shape, segment)
        return self._end(now_s)
