"""Hold predictions against recorded runs: the same requests, the same configuration, the same metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from engine.adapter import AdapterSpec
from engine.config import ServingConfig
from engine.errors import UserError
from sim.replica import StepTimes
from sim.result import plain
from sim.simulate import simulate
from traces import Trace, TraceRequest
from traces.columns import TraceColumns
from traces.metrics import metrics
from traces.run_record import RunRecord, find_runs, read_run

RUNS = Path(__file__).parent / "runs"

METRICS = (
    "throughput_rps",
    "output_tokens_per_s",
    *(f"{name}_{at}_s" for name in ("ttft", "tpot", "e2e") for at in ("p50", "p95", "p99")),
)
LEVELS = ((0.5, "under50"), (0.8, "50to80"), (0.95, "80to95"), (np.inf, "saturated"))

CostsFor = Callable[[ServingConfig], StepTimes]


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
        return 100 * (self.predicted / self.measured - 1) if self.measured else float("nan")

    def to_json(self) -> dict[str, Any]:
        numbers = {"measured": self.measured, "predicted": self.predicted, "error_pct": self.error_pct}
        return {"run": self.run, "metric": self.metric, "load_level": self.load_level, **plain(numbers)}


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedRun:
    """A run record as the simulator takes it."""

    name: str
    config: ServingConfig
    adapters: Mapping[str, AdapterSpec]
    trace: Trace
    measured: Mapping[str, float]
    load: float | None


def validate(folder: Path, costs_for: CostsFor) -> dict[str, Any]:
    """Simulate every run recorded at or below a folder; return the JSON object of `sim validate`."""
    paths = find_runs(folder)
    if not paths:
        raise UserError(f"{folder}: holds no run record")
    rows = [row for path in paths for row in compare(recorded_run(path, folder), costs_for)]
    return {"runs": len(paths), "rows": [row.to_json() for row in rows], "summary": summary(rows)}


def recorded_run(path: Path, root: Path | None = None) -> RecordedRun:
    """Read a run record: the configuration, the adapters, and the trace that its requests were."""
    record = read_run(path)
    place = str(path / "run.json")
    name = path.name if root is None or path == root else str(path.relative_to(root))
    load = record.run.get("load")
    if load is not None and (
        isinstance(load, bool) or not isinstance(load, (int, float)) or not 0 < load < np.inf
    ):
        raise UserError(f"{place}: load={load!r} must be a number above 0")
    return RecordedRun(
        name=name,
        config=ServingConfig.from_json(record.run.get("config"), source=f"{place}: config"),
        adapters=_adapters(record.run.get("adapters"), place),
        trace=_trace(record, name),
        measured=metrics(record.requests),
        load=load,
    )


def compare(run: RecordedRun, costs_for: CostsFor) -> list[Comparison]:
    """Simulate a recorded run and compare its metrics."""
    costs = costs_for(run.config)
    adapters = run.adapters or None
    predicted = simulate(run.trace, run.config, costs, adapters=adapters).metrics
    load = run.load
    if load is None:
        load = run.trace.rate_rps / saturated_rps(run.trace, run.config, costs, adapters)
    level = load_level(load)
    return [
        Comparison(
            run=run.name,
            metric=name,
            load_level=level,
            measured=run.measured[name],
            predicted=predicted[name],
        )
        for name in METRICS
    ]


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


def _adapters(given: Any, place: str) -> dict[str, AdapterSpec]:
    if given is None:
        return {}
    if not isinstance(given, list) or not all(isinstance(item, dict) for item in given):
        raise UserError(f"{place}: adapters must be a list of objects")
    known = {item.name for item in fields(AdapterSpec)} - {"path"}
    specs = {}
    for item in given:
        values = {key: _tuples(value) for key, value in item.items() if key in known and value is not None}
        if "name" not in values:
            raise UserError(f"{place}: adapters: name is missing")
        spec = AdapterSpec(**values)
        specs[spec.name] = spec
    return specs


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _trace(record: RunRecord, name: str) -> Trace:
    requests = record.requests.sort_values("arrival_s", kind="stable")
    rows = zip(
        *(
            requests[column].tolist()
            for column in ("id", "arrival_s", "prompt_tokens", "output_tokens", "adapter", "rank")
        ),
        requests["prefix_blocks"].tolist() if "prefix_blocks" in requests else [None] * len(requests),
        strict=True,
    )
    return Trace(
        (
            TraceRequest(
                id=id_,
                arrival_s=float(arrival_s),
                prompt_tokens=int(prompt_tokens),
                output_tokens=int(output_tokens),
                adapter=adapter if isinstance(adapter, str) else None,
                rank=int(rank)
                if isinstance(adapter, str) and rank is not None and not pd.isna(rank)
                else None,
                prefix_blocks=tuple(blocks) if isinstance(blocks, list) else None,
            )
            for id_, arrival_s, prompt_tokens, output_tokens, adapter, rank, blocks in rows
        ),
        name,
    )
