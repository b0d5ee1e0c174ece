"""A run of equal decode steps in closed form: when each of them starts, without walking through them.

Each row has one more KV token in each step, so as long as the price of a step is a straight line of its KV tokens, step number j takes
`first + j · slope` and starts at `start + j · first + j (j − 1) / 2 · slope`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, sqrt


@dataclass(slots=True, init=False)
class DecodeRun:
    """GPU time of `steps` decode steps one after the other: number j (from 0) takes `first_s + j · slope_s`, and slope_s ≥ 0."""

    first_s: float
    slope_s: float
    steps: int

    def __init__(self, first_s: float, slope_s: float, steps: int) -> None:
        self.first_s = first_s
        self.slope_s = slope_s
        self.steps = steps


class Segment:
    """Steps that are planned alike and run back to back from `start_s` on; each takes at least the host's turn.

    steps: how many they are at most: those of the run, as far as either the GPU or the host decides all of them. last: which of them is the
    last one that will run, as things are now.
    """

    __slots__ = ("_first_s", "_run", "_slope_s", "last", "start_s", "steps")

    def __init__(self, run: DecodeRun, host_s: float, start_s: float) -> None:
        self._run = run
        self.start_s = start_s
        if run.first_s >= host_s:
            self._first_s, self._slope_s, self.steps = run.first_s, run.slope_s, run.steps
        else:
            self._first_s, self._slope_s, self.steps = host_s, 0.0, _hidden_steps(run, host_s)
        self.last = self.steps - 1

    def start_of(self, step: int) -> float:
        """Return when a step starts; of `last` + 1: when the segment ends."""
        return self.start_s + (step * self._first_s + (step * (step - 1) // 2) * self._slope_s)

    def first_from(self, at_s: float) -> int:
        """Return the first step that starts at `at_s` or later; it may lie beyond the segment's end."""
        ahead_s = at_s - self.start_s
        if ahead_s <= 0:
            return 0
        first_s, slope_s = self._first_s, self._slope_s
        if slope_s > 0:
            half = first_s - slope_s / 2
            step = ceil((sqrt(half * half + 2 * slope_s * ahead_s) - half) / slope_s)
        elif first_s > 0:
            step = ceil(ahead_s / first_s)
        else:
            return self.steps
        while self.start_of(step) < at_s:  # the formula's rounding; at most once
            step += 1
        while step > 0 and self.start_of(step - 1) >= at_s:
            step -= 1
        return step

    def gpu_s(self, steps: int) -> float:
        """Return the GPU time of the first `steps` steps."""
        return steps * self._run.first_s + (steps * (steps - 1) // 2) * self._run.slope_s


def _hidden_steps(run: DecodeRun, host_s: float) -> int:
    """Return how many steps of a run, the first of which is shorter than the host's turn, are so."""
    if run.first_s + (run.steps - 1) * run.slope_s <= host_s:
        return run.steps
    return max(1, min(run.steps, ceil((host_s - run.first_s) / run.slope_s)))
