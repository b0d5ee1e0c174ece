"""Intervals of simulated metrics: a bootstrap over the cost model's held-out errors, pushed through the queue.

Steps of one kind (decodes alone; prompts among them) that a run consists of are neighbours, so their errors are not independent: a draw takes
one held-out whole-step error for each kind and applies it to all steps of the kind, weighted by the kinds' shares of the time. Where
steps leave what was measured, errors are three times as large and ±15 % (90 %) are added, in proportion to the share of such steps.

What a common error does to a metric, the simulation itself says: it is run with all steps a few per cent faster and slower, and the metric is
interpolated between. `stretch` widens an interval by a factor in the logarithm, as `sim validate` finds it from recorded runs
(`stretch_of`): between machines and through details of a queue errors arise that no whole-step measurement shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, exp, isfinite, log
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.adapter import AdapterSpec
from engine.config import ServingConfig
from engine.step import StepShape
from sim.agreement import kind_of
from sim.costs import Provenance, StepCosts
from sim.fit import FitReport
from sim.observe import StepRow
from sim.replica import StepTimes
from sim.result import plain
from sim.scenario import Scenario
from sim.segment import DecodeRun
from sim.simulate import simulate
from traces import Trace

Floats = NDArray[np.float64]

COVERAGE = 0.9
PACES = (0.8, 0.9, 1.0, 1.1, 1.25)  # of steps, at which a run is simulated
DRAWS = 4000
LOOKED_AT = 300  # steps of a simulation whose provenance is asked
EXTRAPOLATED_FACTOR, EXTRAPOLATED_SD = 3.0, 0.15 / 1.645
UNKNOWN_SD = 0.15 / 1.645  # of a profile without whole steps
LEAST = 0.002  # half-width: a record's own resolution
FAMILIES = ("throughput", "ttft", "tpot", "e2e")
SHARES = ("slo_attainment", "adapter_hit_rate", "prefix_hit_rate")  # at most 1


@dataclass(frozen=True, slots=True)
class Interval:
    """Where a metric should lie, nine times of ten, and what its prediction rests on."""

    value: float
    low: float
    high: float
    provenance: Provenance

    def stretched(self, factor: float) -> Interval:
        """Return this with its distance to both ends, in the logarithm, times a factor, and at least LEAST."""
        if not (isfinite(self.value) and self.value > 0):
            return self
        below = max(LEAST, factor * log(self.value / self.low))
        above = max(LEAST, factor * log(self.high / self.value))
        return Interval(self.value, self.value * exp(-below), self.value * exp(above), self.provenance)

    def moved_to(self, name: str, value: float) -> Interval:
        """Return the interval of a metric around another value: a share's as far in what is missing of 1, others' by the same factors."""
        if name in SHARES:
            low, high = value + self.low - self.value, min(1.0, value + self.high - self.value)
            return Interval(value, max(0.0, min(low, value)), max(high, value), self.provenance)
        factor = value / self.value if self.value else 1.0
        return Interval(value, self.low * factor, self.high * factor, self.provenance)

    def holds(self, measured: float) -> bool:
        """Return whether a measurement lies in it."""
        return self.low <= measured <= self.high

    def score(self, measured: float) -> float:
        """Return the factor that this would have to be stretched by to reach a measurement."""
        below, above = log(self.value / self.low), log(self.high / self.value)
        off = log(measured / self.value)
        return abs(off) / max(LEAST, above if off > 0 else below)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form: what is not finite is null."""
        numbers = plain({"value": self.value, "low": self.low, "high": self.high})
        return numbers | {"provenance": self.provenance}


class PacedSteps:
    """A cost model whose steps all take `factor` times as long; the host and loads do not."""

    def __init__(self, costs: StepTimes, factor: float) -> None:
        self._costs = costs
        self._factor = factor
        self.host_s = costs.host_s
        self.load_s = costs.load_s
        self.heating = costs.heating

    def step_s(self, shape: StepShape) -> float:
        """GPU time of a step."""
        return self._factor * self._costs.step_s(shape)

    def decode_run(self, shape: StepShape, steps: int) -> DecodeRun:
        """GPU time of the next decode steps."""
        run = self._costs.decode_run(shape, steps)
        return DecodeRun(self._factor * run.first_s, self._factor * run.slope_s, run.steps)

    def parts_s(self, shape: StepShape) -> Mapping[str, float]:
        """GPU time of a step by what it is spent on."""
        return {part: self._factor * part_s for part, part_s in self._costs.parts_s(shape).items()}


def intervals(
    trace: Trace,
    config: ServingConfig,
    costs: StepCosts,
    names: Sequence[str],
    *,
    adapters: Mapping[str, AdapterSpec] | None = None,
    stretch: Mapping[str, float] | None = None,
    seed: int = 0,
    scenario: Scenario | None = None,
) -> dict[str, Interval]:
    """Return the 90 % interval of each of these metrics. stretch: by family of metrics, 1 unless told; scenario: as in `simulate`."""
    values: dict[float, Mapping[str, float]] = {}
    steps: tuple[StepRow, ...] = ()
    for pace in PACES:
        result = simulate(
            trace,
            config,
            PacedSteps(costs, pace),
            adapters=adapters,
            record_steps=pace == 1.0,  # which is the prediction: its steps say what the run consists of
            scenario=scenario,
        )
        values[pace] = result.metrics
        steps = steps or result.steps or ()
    looked_at = steps[:: max(1, len(steps) // LOOKED_AT)]
    kinds = [costs.provenance(row.shape) for row in looked_at]
    outside = kinds.count("extrapolated") / max(1, len(kinds))
    drawn = draw_paces(costs.report, _time_shares(steps), outside, np.random.default_rng(seed))
    provenance: Provenance = (
        "extrapolated" if outside > 0.1 else "measured" if set(kinds) == {"measured"} else "interpolated"
    )
    known = stretch or {}
    return {
        name: capped(
            name,
            interval_of(PACES, [values[pace][name] for pace in PACES], drawn, provenance).stretched(
                known.get(family_of(name), 1.0)
            ),
        )
        for name in names
    }


def capped(name: str, interval: Interval) -> Interval:
    """Return the interval of a metric, a share's at most 1."""
    return replace(interval, high=min(1.0, interval.high)) if name in SHARES else interval


def family_of(metric: str) -> str:
    """Return which family a metric is of; a family has one stretch."""
    name = metric.split("_")[0]
    return name if name in FAMILIES else "throughput"


def _time_shares(steps: Sequence[StepRow]) -> dict[bool, float]:
    """Return the share of the time in steps with prompts (False) and of decodes alone (True)."""
    time_s = {False: 0.0, True: 0.0}
    for row in steps:
        time_s[not row.shape.prefill_chunks] += row.duration_s
    total_s = sum(time_s.values()) or 1.0
    return {decode: seconds / total_s for decode, seconds in time_s.items()}


def draw_paces(
    report: FitReport | None,
    time_shares: Mapping[bool, float],
    outside: float,
    rng: np.random.Generator,
    *,
    unknown_sd: float = UNKNOWN_SD,
) -> Floats:
    """Draw how much longer the steps of a run may take than they are predicted to.

    report: of the fit, with its held-out errors; None: none are known. time_shares: of steps with prompts (False) and decodes alone (True).
    outside: share of the steps beyond what was measured. unknown_sd: relative, of errors where none are known.
    """
    errors = np.zeros(DRAWS)
    residuals = {False: [], True: []}  # type: dict[bool, list[float]]
    if report is not None:
        for shape, error in zip(report.step_shapes, report.step_errors.tolist(), strict=True):
            if isfinite(error):
                residuals[kind_of(shape.decode_rows, shape.prefill_chunks) == "decode"].append(error)
    everything = residuals[False] + residuals[True]
    for decode in (False, True):
        known = residuals[decode] or everything
        drawn = rng.choice(known, DRAWS) if known else rng.normal(0, unknown_sd, DRAWS)
        errors += time_shares[decode] * drawn
    errors *= 1 + (EXTRAPOLATED_FACTOR - 1) * outside
    errors += outside * rng.normal(0, EXTRAPOLATED_SD, DRAWS)
    # An error says predicted / measured − 1, so what is measured takes 1 / (1 + error) times the prediction.
    return 1 / np.maximum(0.2, 1 + errors)


def rate_interval(value_rps: float, drawn: Floats, provenance: Provenance) -> Interval:
    """Return a sustainable rate with its interval: it is the inverse of what steps take."""
    low, high = np.quantile(1 / drawn, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2]).tolist()
    return Interval(value_rps, value_rps * min(low, 1.0), value_rps * max(high, 1.0), provenance)


def interval_of(
    simulated: Sequence[float], at_paces: Sequence[float], drawn: Floats, provenance: Provenance
) -> Interval:
    """Return a metric's interval from its values at the paces that were simulated, 1 among them, and the paces drawn."""
    value = at_paces[list(simulated).index(1.0)]
    known = [one for one in at_paces if isfinite(one) and one > 0]
    if len(known) < len(simulated):
        return Interval(value, value, value, provenance)
    x, y = np.log(simulated), np.log(at_paces)
    logs = np.interp(np.log(drawn), x, y)
    # Beyond the ends the last line goes on.
    for beyond, (a, b) in ((np.log(drawn) < x[0], (0, 1)), (np.log(drawn) > x[-1], (-2, -1))):
        slope = (y[b] - y[a]) / (x[b] - x[a])
        logs[beyond] = y[a] + slope * (np.log(drawn[beyond]) - x[a])
    low, high = np.exp(np.quantile(logs, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])).tolist()
    return Interval(value, min(low, value), max(high, value), provenance)


def stretch_of(scores: Iterable[float]) -> float | None:
    """Return the stretch with which intervals hold a further measurement nine times of ten: a conformal quantile of the scores.

    None where there are too few of them (Vovk, Gammerman and Shafer, Algorithmic learning in a random world, 2005).
    """
    ordered = sorted(score for score in scores if isfinite(score))
    place = ceil((len(ordered) + 1) * COVERAGE)
    return ordered[place - 1] if place <= len(ordered) else None
