"""Closes the loop: what was predicted of a configuration against what a run of the engine measured."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from rich.console import Console

from engine.adapter import adapters_of_trace
from engine.config import ServingConfig
from planner.paced import PacedJob, StepErrors, predicted
from planner.pricing import Pricing
from planner.probe import Prober
from planner.workload import WINDOW_REQUESTS, Workload, busiest
from sim.intervals import Interval
from sim.profile import find_profile, load_profile
from sim.records import RecordedRun, recorded_run
from sim.simulate import simulate
from sim.validate import saturated_rps
from traces.metrics import Slo

METRICS = (
    "throughput_rps",
    "output_tokens_per_s",
    *(f"{name}_{at}_s" for name in ("ttft", "tpot", "e2e") for at in ("p50", "p95", "p99")),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifiedMetric:
    """A metric, measured and predicted."""

    name: str
    measured: float
    predicted: Interval

    @property
    def within(self) -> bool:
        """Whether what was measured lies in the interval."""
        return self.predicted.low <= self.measured <= self.predicted.high

    @property
    def error(self) -> float:
        """Predicted over measured − 1; NaN where either is not known."""
        return self.predicted.value / self.measured - 1 if self.measured else float("nan")

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "metric": self.name,
            "measured": self.measured if isfinite(self.measured) else None,
            "predicted": self.predicted.to_json(),
            "error_pct": 100 * self.error if isfinite(self.error) else None,
            "within": self.within,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """A run against its prediction. same_config: whether the run was of the configuration that is predicted."""

    run: str
    config: ServingConfig
    same_config: bool
    load: float
    rows: tuple[VerifiedMetric, ...]

    @property
    def within(self) -> bool:
        """Whether every metric lies in its interval."""
        return all(row.within for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "run": self.run,
            "config": self.config.to_json(),
            "same_config": self.same_config,
            "load": self.load if isfinite(self.load) else None,
            "within": self.within,
            "rows": [row.to_json() for row in self.rows],
        }


def verify(path: Path, config_path: Path | None, profile_path: Path | None) -> Verification:
    """Predict a configuration (None: the run's own) on the requests of a run record and compare. Raises UserError, TraceError."""
    run = recorded_run(path)
    config = run.config if config_path is None else ServingConfig.load(config_path)
    profile = load_profile(profile_path or find_profile(config))
    return compare(run, config, Pricing(profile))


def compare(run: RecordedRun, config: ServingConfig, price: Pricing) -> Verification:
    """Predict a run's requests under a configuration and compare."""
    adapters = adapters_of_trace(run.trace.adapters, run.adapters or None)
    trace = run.trace
    # Not Workload.of: requests that all come at one instant can be verified, though not planned for.
    workload = Workload(screen=trace, window=busiest(trace, WINDOW_REQUESTS), stretch=trace, trace=trace)
    prober = Prober(workload=workload, slo=Slo(), adapters=adapters, price=price, simulate=simulate)
    probe = prober(config, "trace", 1.0, watch=True)
    costs = price(config)
    load = run.load
    if load is None:
        load = (
            trace.rate_rps / saturated_rps(trace, config, costs, adapters) if trace.rate_rps else float("inf")
        )
    told = predicted(probe, PacedJob(config=config).run(prober), StepErrors(report=costs.report), 0.0)
    rows = [
        VerifiedMetric(name=name, measured=float(run.measured[name]), predicted=told[name])
        for name in METRICS
        if name in run.measured and isfinite(run.measured[name])
    ]
    return Verification(
        run=run.name,
        config=config,
        same_config=_alike(config, run.config),
        load=float(load),
        rows=tuple(rows),
    )


def print_verification(found: Verification) -> None:
    """Print a verification on standard output."""
    console = Console(file=sys.stdout, highlight=False, no_color=not sys.stdout.isatty(), width=120)
    console.print(f"run {found.run}, load {found.load:.2f}", markup=False)
    if not found.same_config:
        console.print("warning: the run was of another configuration than the one that is predicted")
    console.print(f"{'metric':<22}{'measured':>12}{'predicted':>12}{'low':>12}{'high':>12}{'error':>9}")
    for row in found.rows:
        predicted = row.predicted
        console.print(
            f"{row.name:<22}{row.measured:>12.4g}{predicted.value:>12.4g}{predicted.low:>12.4g}{predicted.high:>12.4g}"
            f"{row.error:>+9.1%}  {'within' if row.within else 'OUTSIDE'}"
        )
    inside = sum(row.within for row in found.rows)
    console.print(f"{inside} of {len(found.rows)} metrics are within the predicted interval")


def _alike(one: ServingConfig, other: ServingConfig) -> bool:
    """Whether two configurations serve alike: what only says where it runs is left out."""
    skip = {"model", "gpu", "adapter_popularity", "num_pages", "backend"}
    ours, theirs = one.to_json(), other.to_json()
    return all(ours[name] == theirs[name] for name in ours if name not in skip)
