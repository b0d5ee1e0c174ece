"""What is written down while a simulation runs:

each request's instants, and how busy GPU, memory and link were.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import inf, nan

import numpy as np
from numpy.typing import NDArray

from engine.scheduler import Scheduler
from engine.sequence import Sequence
from engine.step import Step, StepShape

Floats = NDArray[np.float64]

PARTS_EVERY = 16  # of so many steps or segments one is broken down into its parts


@dataclass(frozen=True, slots=True)
class StepRow:
    """A step that ran: which replica, when, how long, and its shape."""

    replica: int
    start_s: float
    duration_s: float
    shape: StepShape


class RequestLog:
    """The instants of each request, by its row in the trace; NaN until it comes to that."""

    def __init__(self, count: int) -> None:
        self.scheduled_s = array("d", [nan]) * count
        self.first_token_s = array("d", [nan]) * count
        self.finish_s = array("d", [nan]) * count
        self.load_wait_s = array("d", [nan]) * count
        self.preemptions = array("q", [0]) * count
        self.cached_tokens = array("q", [0]) * count
        self.refused: dict[int, str] = {}
        self.finished = 0

    def completed(self, step: Step, now_s: float) -> None:
        """Note the first and last tokens that a step made."""
        for chunk in step.prefills:
            if chunk.last:
                sequence = chunk.sequence
                row = sequence.request.request_id
                assert isinstance(row, int)
                if sequence.preemptions == 0 or self.first_token_s[row] != self.first_token_s[row]:
                    self.first_token_s[row] = now_s
        for sequence in step.finishing:
            row = sequence.request.request_id
            assert isinstance(row, int)
            self.finish_s[row] = now_s
            self.scheduled_s[row] = nan if sequence.admitted_s is None else sequence.admitted_s
            self.load_wait_s[row] = sequence.load_wait_s
            self.preemptions[row] = sequence.preemptions
            self.cached_tokens[row] = sequence.found_tokens
        self.finished += len(step.finishing)


@dataclass(slots=True)
class Usage:
    """Sums over a replica's time; page and sequence sums are weighted by seconds."""

    busy_s: float = 0.0
    gpu_s: float = 0.0
    steps: int = 0
    decode_rows: int = 0
    tokens: int = 0
    kv_page_s: float = 0.0
    adapter_page_s: float = 0.0
    sequence_s: float = 0.0
    observed_s: float = 0.0
    kv_pages_max: int = 0
    adapter_pages_max: int = 0
    sequences_max: int = 0
    parts_s: dict[str, float] = field(default_factory=dict)


class Observer:
    """Watches one replica. Its sums of pages and sequences are sampled when steps are planned."""

    def __init__(
        self,
        replica: int,
        log: RequestLog,
        parts_s: Callable[[StepShape], Mapping[str, float]],
        steps: list[StepRow] | None = None,
    ) -> None:
        self.usage = Usage()
        self._replica = replica
        self._log = log
        self._parts_s = parts_s
        self._steps = steps
        self._until_parts = 0
        self._seen_at_s = inf  # before the first look there is nothing to sum
        self._kv_pages = self._adapter_pages = self._sequences = 0  # at the last look
        self._adapter_changes = 0

    def planned(self, scheduler: Scheduler, now_s: float) -> None:
        """Look at the memory after a plan."""
        usage = self.usage
        elapsed_s = now_s - self._seen_at_s
        if elapsed_s > 0:
            usage.kv_page_s += self._kv_pages * elapsed_s
            usage.adapter_page_s += self._adapter_pages * elapsed_s
            usage.sequence_s += self._sequences * elapsed_s
            usage.observed_s += elapsed_s
        self._seen_at_s = now_s
        residency = scheduler.residency
        changes = residency.loads + residency.evictions
        if changes != self._adapter_changes:
            self._adapter_changes, self._adapter_pages = changes, residency.pages_held
            usage.adapter_pages_max = max(usage.adapter_pages_max, self._adapter_pages)
        self._kv_pages = kv_pages = scheduler.kv_pages
        self._sequences = sequences = scheduler.num_running
        if kv_pages > usage.kv_pages_max:
            usage.kv_pages_max = kv_pages
        if sequences > usage.sequences_max:
            usage.sequences_max = sequences

    def ran(self, shape: StepShape, start_s: float, duration_s: float, gpu_s: float) -> None:
        """Note a step."""
        self._add(shape, 1, duration_s, gpu_s)
        if self._steps is not None:
            self._steps.append(StepRow(self._replica, start_s, duration_s, shape))

    def ran_segment(self, shape: StepShape, starts_s: Floats, gpu_s: float) -> None:
        """Note a run of decode steps, the first of `shape`; `starts_s` holds their starts and the end of the
        last.
        """
        self._add(shape, len(starts_s) - 1, float(starts_s[-1] - starts_s[0]), gpu_s)
        if self._steps is None:
            return
        for ahead, (start_s, duration_s) in enumerate(
            zip(starts_s[:-1].tolist(), np.diff(starts_s).tolist(), strict=True)
        ):
            self._steps.append(StepRow(self._replica, start_s, duration_s, decode_ahead(shape, ahead)))

    def completed(self, step: Step, now_s: float) -> None:
        """Note what a step made."""
        if step.prefills or step.finishing:
            self._log.completed(step, now_s)

    def refused(self, sequence: Sequence, reason: str) -> None:
        """Note a request that the scheduler turned away while it waited."""
        row = sequence.request.request_id
        assert isinstance(row, int)
        self._log.refused[row] = reason

    def _add(self, shape: StepShape, steps: int, duration_s: float, gpu_s: float) -> None:
        usage = self.usage
        usage.busy_s += duration_s
        usage.gpu_s += gpu_s
        usage.steps += steps
        usage.decode_rows += shape.decode_rows * steps
        usage.tokens += shape.tokens * steps
        self._until_parts -= 1
        if self._until_parts < 0:
            self._until_parts = PARTS_EVERY - 1
            for part, part_s in self._parts_s(shape).items():
                usage.parts_s[part] = usage.parts_s.get(part, 0.0) + part_s * steps


def decode_ahead(shape: StepShape, steps: int) -> StepShape:
    """Return the shape of a decode step `steps` steps later: one more KV token a row each."""
    return replace(
        shape,
        decode_kv_tokens=shape.decode_kv_tokens + steps * shape.decode_rows,
        decode_kv_max=shape.decode_kv_max + steps,
    )
