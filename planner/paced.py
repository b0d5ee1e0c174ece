"""How far a prediction may be off: the same requests simulated with steps that take longer and shorter (`sim.intervals`).

Whole simulations of the trace at several paces would take as long as the search. A configuration's metrics at the paces are those of the busiest
WINDOW_REQUESTS, which a change of pace moves the most; what the trace itself gives is put in the middle.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.config import ServingConfig
from engine.step import StepShape
from planner.probe import Probe, Prober, metrics_of
from sim.costs import Provenance
from sim.fit import FitReport
from sim.intervals import (
    COVERAGE,
    Floats,
    Interval,
    PacedSteps,
    capped,
    draw_paces,
    interval_of,
    rate_interval,
)
from sim.replica import StepTimes
from sim.result import SimResult

PACES = (0.8, 1.0, 1.25)  # of steps, at which the window is simulated
SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Paced:
    """A configuration's metrics on the window at PACES, and the share of its GPU time in steps of decodes alone."""

    metrics: Mapping[str, tuple[float, ...]]
    decode_share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PacedJob:
    """Simulate a configuration on the window at PACES, at so many times the rate that is asked for."""

    config: ServingConfig
    scale: float = 1.0

    def run(self, prober: Prober) -> Paced:
        """Return what the simulator says."""
        costs = prober.price(self.config)
        trace = prober.workload.window.scaled(self.scale)
        values: list[Mapping[str, float]] = []
        share = 1.0
        for pace in PACES:
            clock = _PromptClock(costs, pace)
            result = prober.simulate(
                trace, self.config, clock, adapters=prober.adapters, slo=prober.slo, seed=prober.seed
            )
            values.append(metrics_of(result, prober.slo))
            share = _decode_share(clock, result, self.config) if pace == 1.0 else share
        return Paced(
            metrics={name: tuple(float(one[name]) for one in values) for name in values[0]},
            decode_share=share,
        )


class _PromptClock(PacedSteps):
    """Paced steps that add up the time of those with prompts."""

    def __init__(self, costs: StepTimes, factor: float) -> None:
        super().__init__(costs, factor)
        self.prompts_s = 0.0

    def step_s(self, shape: StepShape) -> float:
        """GPU time of a step."""
        step_s = super().step_s(shape)
        self.prompts_s += step_s if shape.prefill_chunks else 0.0
        return step_s


def _decode_share(clock: _PromptClock, result: SimResult, config: ServingConfig) -> float:
    gpu_s = result.utilisation.gpu_share * result.duration_s * config.replicas
    return min(1.0, max(0.0, 1 - clock.prompts_s / gpu_s)) if gpu_s > 0 else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepErrors:
    """How far the steps of a configuration are off. report: of the fit; None: `sd`, relative, is all that is known."""

    report: FitReport | None
    sd: float = 0.0

    def paces(self, decode_share: float, outside: float) -> Floats:
        """Draw paces of a run with such steps, a share of them beyond what was measured."""
        shares = {False: 1 - decode_share, True: decode_share}
        rng = np.random.default_rng(SEED)
        if self.sd:
            return draw_paces(self.report, shares, outside, rng, unknown_sd=self.sd)
        return draw_paces(self.report, shares, outside, rng)

    def typical(self, outside: float) -> float:
        """Return how far steps are off nine times of ten, relative."""
        drawn = self.paces(0.5, outside)
        return float(np.quantile(np.abs(1 / drawn - 1), COVERAGE))


def predicted(probe: Probe, paced: Paced, errors: StepErrors, sustainable_rps: float) -> dict[str, Interval]:
    """Return a probe's metrics, and the highest sustainable rate, with their intervals."""
    outside = 1.0 if probe.extrapolated_share is None else probe.extrapolated_share
    provenance: Provenance = probe.provenance or "extrapolated"
    drawn = errors.paces(paced.decode_share, outside)
    found = {
        name: _around(name, value, paced.metrics.get(name), drawn, provenance)
        for name, value in probe.metrics.items()
    }
    return found | {"sustainable_rps": rate_interval(sustainable_rps, drawn, provenance)}


def _around(
    name: str, value: float, at_paces: tuple[float, ...] | None, drawn: Floats, provenance: Provenance
) -> Interval:
    if at_paces is None or name == "requests":
        return Interval(value, value, value, provenance)
    return capped(name, interval_of(PACES, at_paces, drawn, provenance).moved_to(name, value))


def to_json(paced: Paced) -> dict[str, Any]:
    """Return the JSON form."""
    metrics = {name: list(values) for name, values in paced.metrics.items()}
    return {"metrics": metrics, "decode_share": paced.decode_share}


def from_json(data: Mapping[str, Any]) -> Paced:
    """Return it from its JSON form."""
    metrics = {name: tuple(values) for name, values in data["metrics"].items()}
    return Paced(metrics=metrics, decode_share=data["decode_share"])
