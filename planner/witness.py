"""Looks over a simulation's shoulder: where do the prices of its steps come from?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from engine.step import StepShape
from sim.costs import Provenance
from sim.observe import decode_ahead
from sim.replica import StepTimes
from sim.segment import DecodeRun

WORST_LAST: tuple[Provenance, ...] = ("measured", "interpolated", "extrapolated")


class Priced(StepTimes, Protocol):
    """Costs that know how they know."""

    def provenance(self, shape: StepShape) -> Provenance:
        """Say where the price of a step comes from."""


class Witness:
    """Costs that pass every question on and count what was extrapolated.

    A run of decode steps is judged by its last, which has the most KV tokens.
    """

    def __init__(self, costs: Priced) -> None:
        self._costs = costs
        self.steps = 0
        self.extrapolated = 0
        self._all_measured = True
        self.host_s = costs.host_s
        self.load_s = costs.load_s
        self.heating = costs.heating

    def step_s(self, shape: StepShape) -> float:
        """GPU time of a step."""
        self._note(shape, 1)
        return self._costs.step_s(shape)

    def decode_run(self, shape: StepShape, steps: int) -> DecodeRun:
        """GPU time of up to `steps` decode steps."""
        run = self._costs.decode_run(shape, steps)
        self._note(decode_ahead(shape, run.steps - 1), run.steps)
        return run

    def parts_s(self, shape: StepShape) -> Mapping[str, float]:
        """GPU time of a step by what it is spent on."""
        return self._costs.parts_s(shape)

    @property
    def worst(self) -> Provenance:
        """The weakest provenance of any step; without steps nothing is known."""
        if not self.steps or self.extrapolated:
            return "extrapolated"
        return "measured" if self._all_measured else "interpolated"

    def _note(self, shape: StepShape, steps: int) -> None:
        self.steps += steps
        provenance = self._costs.provenance(shape)
        if provenance == "extrapolated":
            self.extrapolated += steps
        if provenance != "measured":
            self._all_measured = False
