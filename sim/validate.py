"""Hold predictions against recorded runs: the same requests, the same configuration, the same metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from engine.adapter import AdapterSpec
from engine.config import ServingConfig
from engine.errors import UserError
from sim.agreement import GroupRow, by_group, by_request, by_step, error_pct, group_summary
from sim.costs import StepCosts
from sim.costs import costs_for as fitted_costs
from sim.intervals import COVERAGE, FAMILIES, Interval, family_of, intervals, stretch_of
from sim.noise import noise_of, twins
from sim.profile import find_profile, load_profile
from sim.records import RecordedRun as RecordedRun
from sim.records import recorded_run as recorded_run
from sim.replica import StepTimes
from sim.result import plain
from sim.simulate import simulate
from sim.verdict import shortfalls, verdicts
from traces import Trace
from traces.columns import TraceColumns
from traces.run_record import find_runs

RUNS = Path(__file__).parent / "runs"

METRICS = (
    "throughput_rps",
    "output_tokens_per_s",
    *(f"{name}_{at}_s" for name in ("ttft", "tpot", "e2e") for at in ("p50", "p95", "p99")),
)
LEVELS = ((0.5, "under50"), (0.8, "50to80"), (0.95, "80to95"), (np.inf, "saturated"))

CostsFor = Callable[[RecordedRun], StepTimes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One metric of one run.

    error_pct: predicted over measured − 1, in percent; NaN where either is not known.
    """

    run: str
    metric: str
    load_level: str
    measured: float
    predicted: float

    @property
    def error_pct(self) -> float:
        return error_pct(self.predicted, self.measured)

    def to_json(self) -> dict[str, Any]:
        numbers = {"measured": self.measured, "predicted": self.predicted, "error_pct": self.error_pct}
        return {"run": self.run, "metric": self.metric, "load_level": self.load_level, **plain(numbers)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A recorded run beside its simulation. intervals: by metric, not stretched; empty where the costs tell no errors."""

    run: RecordedRun
    load_level: str
    comparisons: tuple[Comparison, ...]
    groups: tuple[GroupRow, ...]
    requests: tuple[dict[str, Any], ...]
    steps: tuple[dict[str, Any], ...]
    intervals: Mapping[str, Interval]


def costs_of_records(profile: Path | None = None) -> CostsFor:
    """Return what prices records: from the profile given, else from those that ship."""
    load = cache(load_profile)  # read, and so fitted, once for many records

    def price(run: RecordedRun) -> StepTimes:
        return fitted_costs(load(profile or find_profile(run.config)), run.config)

    return price


def validate(folder: Path, costs_for: CostsFor, *, with_intervals: bool = True) -> dict[str, Any]:
    """Simulate every run recorded at or below a folder; return the JSON object of `sim validate`.

    with_intervals: five more simulations a run. Raises UserError where the folder holds no record.
    """
    paths = find_runs(folder)
    if not paths:
        raise UserError(f"{folder}: holds no run record")
    judged = [judge(recorded_run(path, folder), costs_for, with_intervals=with_intervals) for path in paths]
    return outcome_of(judged)


def outcome_of(judged: Sequence[Judged]) -> dict[str, Any]:
    """Return the JSON object of `sim validate`."""
    comparisons = [row for one in judged for row in one.comparisons]
    groups = [row for one in judged for row in one.groups]
    stretches = [_stretches(one, judged) for one in judged]
    rows = [
        row.to_json() | _interval_json(one.intervals.get(row.metric), stretches[number], row)
        for number, one in enumerate(judged)
        for row in one.comparisons
    ]
    noise = noise_of(twins([one.run for one in judged]), METRICS)
    coverage = coverage_of(rows)
    stretch = {family: stretch_of(_scores(judged, family)) for family in FAMILIES}
    return {
        "runs": len(judged),
        "rows": rows,
        "summary": summary(comparisons),
        "run_facts": [_facts(one) for one in judged],
        "groups": {"rows": [row.to_json() for row in groups], "summary": group_summary(groups)},
        "requests": [row for one in judged for row in one.requests],
        "steps": [row for one in judged for row in one.steps],
        "noise": noise,
        "coverage": coverage | {"stretch": stretch},
        "verdicts": verdicts(rows, noise),
        "shortfalls": shortfalls(len(judged), noise["pairs"], coverage["stretched_pct"]),
    }


def judge(run: RecordedRun, costs_for: CostsFor, *, with_intervals: bool = True) -> Judged:
    """Simulate a recorded run and compare: metrics, groups of adapters, requests, and its steps by their shapes."""
    costs = costs_for(run)
    adapters = run.adapters or None
    result = simulate(run.trace, run.config, costs, adapters=adapters)
    load = run.load
    if load is None:
        load = run.trace.rate_rps / saturated_rps(run.trace, run.config, costs, adapters)
    level = load_level(load)
    found: Mapping[str, Interval] = {}
    if with_intervals and isinstance(costs, StepCosts):
        found = intervals(run.trace, run.config, costs, METRICS, adapters=adapters)
    return Judged(
        run=run,
        load_level=level,
        comparisons=tuple(
            Comparison(
                run=run.name,
                metric=name,
                load_level=level,
                measured=run.measured[name],
                predicted=result.metrics[name],
            )
            for name in METRICS
        ),
        groups=tuple(by_group(run, result, level)),
        requests=tuple(by_request(run, result, level)),
        steps=tuple(by_step(run, costs)),
        intervals=found,
    )


def compare(run: RecordedRun, costs_for: CostsFor) -> list[Comparison]:
    """Simulate a recorded run and compare its metrics."""
    return list(judge(run, costs_for, with_intervals=False).comparisons)


def _stretches(one: Judged, judged: Sequence[Judged]) -> dict[str, float | None]:
    """Return the stretch of each family as the records of other traces tell it."""
    others = [other for other in judged if other.run.key != one.run.key]
    return {family: stretch_of(_scores(others, family)) for family in FAMILIES}


def _scores(judged: Iterable[Judged], family: str) -> Iterator[float]:
    for one in judged:
        for row in one.comparisons:
            if family_of(row.metric) == family and _is_known(row) and row.metric in one.intervals:
                yield one.intervals[row.metric].score(row.measured)


def _is_known(row: Comparison) -> bool:
    return all(np.isfinite(value) and value > 0 for value in (row.measured, row.predicted))


def _interval_json(
    interval: Interval | None, stretch: Mapping[str, float | None], row: Comparison
) -> dict[str, Any]:
    """Return an interval, as it is and stretched as other runs tell, and whether each holds what was measured."""
    if interval is None or not _is_known(row):
        return {}
    plain_one = interval.stretched(1.0)
    found = plain_one.to_json() | {"within": plain_one.holds(row.measured)}
    del found["value"]
    factor = stretch[family_of(row.metric)]
    if factor is not None:
        wide = interval.stretched(factor)
        found |= {"stretched_low": wide.low, "stretched_high": wide.high}
        found["stretched_within"] = wide.holds(row.measured)
    return found


def coverage_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the share of measurements that their intervals hold, in percent: as drawn, and stretched; in all, and by metric."""

    def share(key: str, metric: str | None = None) -> float | None:
        held = [row[key] for row in rows if key in row and metric in (None, row["metric"])]
        return 100 * sum(held) / len(held) if held else None

    return {
        "wanted_pct": 100 * COVERAGE,
        "bootstrap_pct": share("within"),
        "stretched_pct": share("stretched_within"),
        "by_metric": {
            metric: {
                "bootstrap_pct": share("within", metric),
                "stretched_pct": share("stretched_within", metric),
            }
            for metric in METRICS
        },
    }


def _facts(one: Judged) -> dict[str, Any]:
    run, config = one.run, one.run.config
    ranks = sorted({spec.rank for spec in run.adapters.values()})
    return {
        "run": run.name,
        "load_level": one.load_level,
        "load": run.load,
        "requests": len(run.trace),
        "duration_s": run.trace.duration_s,
        "adapters": len(run.trace.columns.adapter_names),
        "ranks": ranks,
        "tp": config.tp,
        "replicas": config.replicas,
        "lora_sharding": config.lora_sharding,
        "merge": config.merge,
        "machine": run.machine,
    }


def saturated_rps(
    trace: Trace, config: ServingConfig, costs: StepTimes, adapters: Mapping[str, AdapterSpec] | None = None
) -> float:
    """Return the simulated throughput when all requests of a trace come at once."""
    return simulate(at_once(trace), config, costs, adapters=adapters).metrics["throughput_rps"]


def at_once(trace: Trace) -> Trace:
    """Return the same requests, all arriving at time zero."""
    source = trace.columns
    columns = {item.name: getattr(source, item.name) for item in fields(source)}
    columns |= {"arrival_s": np.zeros(len(trace)), "raw_arrival_s": None}
    return Trace.from_columns(TraceColumns(**columns), trace.name)


def load_level(load: float) -> str:
    """Name a load, as a share of capacity."""
    return next((name for bound, name in LEVELS if load < bound), LEVELS[-1][1])


def summary(rows: Iterable[Comparison]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Return median, worst and signed mean error in percent, by load level (and all) and metric."""
    frame = pd.DataFrame(
        [
            {"level": level, "metric": row.metric, "error": row.error_pct}
            for row in rows
            for level in (row.load_level, "all")
        ]
    )
    result: dict[str, dict[str, dict[str, float | None]]] = {}
    for (level, metric), errors in frame.dropna().groupby(["level", "metric"], sort=False)["error"]:
        result.setdefault(str(level), {})[str(metric)] = plain(
            {
                "median_abs_error_pct": float(errors.abs().median()),
                "worst_abs_error_pct": float(errors.abs().max()),
                "bias_pct": float(errors.mean()),
            }
        )
    return result
