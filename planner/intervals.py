"""How far a prediction may be off: the one place where that is decided.

The held-out error of the cost model is told by whole steps: ε is the 90th percentile of |predicted / measured − 1|
over steps that the fit did not see, at least 2 %; without whole steps it is 15 %.

* The price of a step within what was measured is taken to be off by ε; that of an extrapolated one (TP > 1: composed
  from operators and two-GPU collectives; a size beyond the measured grid) by the larger of 3 ε and 15 %; of a
  simulation, by the mean over its steps.
* A metric amplifies it. Steps slower by ε are, in a queue, the same as traffic denser by ε: at a load ρ (rate over
  highest sustainable rate) latencies move by ε / (1 − ρ) (the derivative of a queue's wait), ρ taken as at
  most 0.9. The share of requests that miss the SLO, and that wait for an adapter, moves likewise. Throughput below
  saturation is what is offered: it moves by ε · ρ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np

from sim.costs import Provenance
from sim.fit import FitReport

LEAST_ERROR = 0.02
UNKNOWN_ERROR = 0.15
EXTRAPOLATED_FACTOR = 3.0
EXTRAPOLATED_LEAST = 0.15
MOST_LOAD = 0.9


@dataclass(frozen=True, slots=True)
class Prediction:
    """A number, the interval it should lie in, and what it rests on; NaN where it cannot be told."""

    value: float
    low: float
    high: float
    provenance: Provenance

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form: what is not finite is null."""
        numbers = {"value": self.value, "low": self.low, "high": self.high}
        return {name: value if isfinite(value) else None for name, value in numbers.items()} | {
            "provenance": self.provenance
        }


def step_error(report: FitReport) -> float:
    """Return ε of a fit."""
    errors = np.abs(report.step_errors[np.isfinite(report.step_errors)])
    return max(LEAST_ERROR, float(np.quantile(errors, 0.9))) if len(errors) else UNKNOWN_ERROR


def error_of(error: float, extrapolated_share: float) -> float:
    """Return how far the prices of a simulation's steps may be off, so many of them extrapolated."""
    extrapolated = max(EXTRAPOLATED_FACTOR * error, EXTRAPOLATED_LEAST)
    return error + (extrapolated - error) * extrapolated_share


def rate(value_rps: float, provenance: Provenance, width: float) -> Prediction:
    """Return a sustainable rate with its interval: the inverse of a time that may be off by `width`."""
    return Prediction(value_rps, value_rps / (1 + width), value_rps * (1 + width), provenance)


def predictions(
    metrics: Mapping[str, float], provenance: Provenance, width: float, load: float
) -> dict[str, Prediction]:
    """Return every metric with its interval. width: how far prices may be off. load: the rate over the highest
    sustainable one.
    """
    wide = width / (1 - min(MOST_LOAD, load))
    narrow = width * min(1.0, load)
    return {name: _prediction(name, value, provenance, narrow, wide) for name, value in metrics.items()}


def _prediction(name: str, value: float, provenance: Provenance, narrow: float, wide: float) -> Prediction:
    if name == "requests":
        return Prediction(value, value, value, provenance)
    if name in ("slo_attainment", "adapter_hit_rate", "prefix_hit_rate"):
        missed = 1 - value
        return Prediction(
            value, max(0.0, 1 - missed * (1 + wide)), 1 - missed * max(0.0, 1 - wide), provenance
        )
    if name in ("throughput_rps", "output_tokens_per_s"):
        return Prediction(value, value * (1 - narrow), value * (1 + narrow), provenance)
    return Prediction(value, value * max(0.0, 1 - wide), value * (1 + wide), provenance)
