"""What is written down while a simulation runs:

each request's instants, and how busy GPU, memory and link were.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import isnan, nan
from struct import pack
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.sequence import Sequence
from engine.step import Step, StepShape
from sim.segment import Segment

Floats = NDArray[np.float64]

PARTS_EVERY = 4 * 16  # of so many steps or segments, four numbers each, one is broken down into its parts
FOLD_AT = 1 << 14  # numbers; a multiple of PARTS_EVERY


@dataclass(slots=True, unsafe_hash=True)
class StepRow:
    """A step that ran: which replica, when, how long, and its shape. A value: nobody changes it."""

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
                row = row_of(sequence)
                if not sequence.preemptions or isnan(self.first_token_s[row]):
                    self.first_token_s[row] = now_s
        for sequence in step.finishing:
            row = row_of(sequence)
            self.finish_s[row] = now_s
            self.scheduled_s[row] = nan if sequence.admitted_s is None else sequence.admitted_s
            self.load_wait_s[row] = sequence.load_wait_s
            if sequence.preemptions:
                self.preemptions[row] = sequence.preemptions
            if sequence.found_tokens:
                self.cached_tokens[row] = sequence.found_tokens
            self.finished += 1


def row_of(sequence: Sequence) -> int:
    """Return a request's row in the trace, which is its id here."""
    row = sequence.request.request_id
    assert isinstance(row, int)
    return row


@dataclass(slots=True)
class Usage:
    """Sums over a replica's time; page and sequence sums are weighted by seconds."""

    busy_s: float = 0.0
    gpu_s: float = 0.0
    steps: int = 0
    decode_rows: int = 0
    kv_page_s: float = 0.0
    adapter_page_s: float = 0.0
    sequence_s: float = 0.0
    observed_s: float = 0.0
    kv_pages_max: int = 0
    adapter_pages_max: int = 0
    sequences_max: int = 0
    parts_s: dict[str, float] = field(default_factory=dict)


class Pages(Protocol):
    """Pages that requests hold."""

    @property
    def kv_pages(self) -> int: ...


class AdapterPages(Protocol):
    """Pages that adapters hold."""

    @property
    def pages_held(self) -> int: ...


class Watched(Protocol):
    """What is seen of a scheduler: the engine's, or another that is driven as it is."""

    @property
    def memory(self) -> Pages: ...

    @property
    def residency(self) -> AdapterPages: ...

    @property
    def num_running(self) -> int: ...


class Observer:
    """Watches one replica. Its sums of pages and sequences are sampled when steps are planned.

    What is seen is written down as numbers, a few at a time, and summed in numpy when FOLD_AT of them are there: a third of the time that
    sums in Python take, and memory stays small.
    """

    def __init__(
        self,
        replica: int,
        log: RequestLog,
        parts_s: Callable[[StepShape], Mapping[str, float]],
        steps: list[StepRow] | None = None,
    ) -> None:
        self._usage = Usage()
        self._replica = replica
        self._log = log
        self._parts_s = parts_s
        self._steps = steps
        self._looks: list[float] = []  # now, KV pages, adapters' pages, sequences; over and over
        self._runs: list[
            float
        ] = []  # steps, their duration, their GPU time, decode rows in each; over and over

    @property
    def usage(self) -> Usage:
        """What was used so far."""
        self._fold_looks()
        self._fold_runs()
        return self._usage

    def planned(self, scheduler: Watched, now_s: float) -> None:
        """Look at the memory after a plan."""
        looks = self._looks
        looks.extend(
            (now_s, scheduler.memory.kv_pages, scheduler.residency.pages_held, scheduler.num_running)
        )
        if len(looks) >= FOLD_AT:
            self._fold_looks()

    def ran(self, shape: StepShape, start_s: float, duration_s: float, gpu_s: float) -> None:
        """Note a step."""
        self._add(shape, 1, duration_s, gpu_s)
        if self._steps is not None:
            self._steps.append(StepRow(self._replica, start_s, duration_s, shape))

    def ran_segment(self, shape: StepShape, segment: Segment) -> None:
        """Note a run of decode steps that has come to its last; the first is of `shape`."""
        steps = segment.last + 1
        self._add(shape, steps, segment.start_of(steps) - segment.start_s, segment.gpu_s(steps))
        if self._steps is None:
            return
        for ahead in range(steps):
            start_s = segment.start_of(ahead)
            duration_s = segment.start_of(ahead + 1) - start_s
            self._steps.append(StepRow(self._replica, start_s, duration_s, decode_ahead(shape, ahead)))

    def completed(self, step: Step, now_s: float) -> None:
        """Note what a step made."""
        self._log.completed(step, now_s)

    def refused(self, sequence: Sequence, reason: str) -> None:
        """Note a request that the scheduler turned away while it waited."""
        self._log.refused[row_of(sequence)] = reason

    def _add(self, shape: StepShape, steps: int, duration_s: float, gpu_s: float) -> None:
        runs = self._runs
        if not len(runs) % PARTS_EVERY:
            parts_s = self._usage.parts_s
            for part, part_s in self._parts_s(shape).items():
                parts_s[part] = parts_s.get(part, 0.0) + part_s * steps
            if len(runs) >= FOLD_AT:
                self._fold_runs()
        runs.extend((steps, duration_s, gpu_s, shape.decode_rows))

    def _fold_looks(self) -> None:
        """Sum up what was seen, each look weighted by the time until the next; the last one stays as the first of what comes."""
        if not self._looks:
            return
        looks = _in_fours(self._looks)
        elapsed_s, usage = np.diff(looks[:, 0]), self._usage
        kv_page_s, adapter_page_s, sequence_s = (elapsed_s[:, None] * looks[:-1, 1:]).sum(axis=0).tolist()
        usage.kv_page_s += kv_page_s
        usage.adapter_page_s += adapter_page_s
        usage.sequence_s += sequence_s
        usage.observed_s += float(elapsed_s.sum())
        kv_pages, adapter_pages, sequences = looks[:, 1:].max(axis=0).astype(int).tolist()
        usage.kv_pages_max = max(usage.kv_pages_max, kv_pages)
        usage.adapter_pages_max = max(usage.adapter_pages_max, adapter_pages)
        usage.sequences_max = max(usage.sequences_max, sequences)
        del self._looks[:-4]

    def _fold_runs(self) -> None:
        steps, duration_s, gpu_s, decode_rows = _in_fours(self._runs).T
        usage = self._usage
        usage.steps += int(steps.sum())
        usage.busy_s += float(duration_s.sum())
        usage.gpu_s += float(gpu_s.sum())
        usage.decode_rows += int((steps * decode_rows).sum())
        del self._runs[:]


def _in_fours(numbers: list[float]) -> Floats:
    """Return the numbers in rows of four; numpy itself takes twice as long for a list."""
    return np.frombuffer(pack(f"{len(numbers)}d", *numbers)).reshape(-1, 4)


def decode_ahead(shape: StepShape, steps: int) -> StepShape:
    """Return the shape of a decode step `steps` steps later: one more KV token a row each."""
    return replace(
        shape,
        decode_kv_tokens=shape.decode_kv_tokens + steps * shape.decode_rows,
        decode_kv_max=shape.decode_kv_max + steps,
    )
