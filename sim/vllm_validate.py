"""Predicted against measured for the vLLM runs of ../shared/measured_vllm: every run simulated, errors by how the run went."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import isfinite
from pathlib import Path
from statistics import fmean, median
from typing import Any

from engine.config import ServingConfig
from engine.errors import UserError
from sim.vllm_data import Row, number, part, read_lines
from sim.vllm_predict import predict, server_config
from sim.vllm_profile import VllmProfile
from sim.vllm_setup import VllmSetup
from sim.vllm_workload import LengthTable, length_tables, stream

RUNS_FILE, LENGTHS_FILE = "runs.jsonl", "lengths.json"
DURATION_S = 3600.0

# Metric -> where a run has it, and what makes seconds of it.
MEASURED: dict[str, tuple[str, str, float]] = {
    "throughput_rps": ("measured", "req_per_s", 1.0),
    "total_tokens_per_s": ("measured", "total_tok_s", 1.0),
    "output_tokens_per_s": ("measured", "output_tok_s", 1.0),
    "tpot_mean_s": ("measured", "tpot_mean_ms", 1e-3),
    "tpot_p50_s": ("measured", "tpot_median_ms", 1e-3),
    "tpot_p99_s": ("measured", "tpot_p99_ms", 1e-3),
    "itl_mean_s": ("measured", "itl_mean_ms", 1e-3),
    "ttft_mean_s": ("measured", "ttft_mean_ms", 1e-3),
    "ttft_p50_s": ("measured", "ttft_median_ms", 1e-3),
    "ttft_p99_s": ("measured", "ttft_p99_ms", 1e-3),
    "ttft_mean_incl_unfinished_s": ("measured", "ttft_mean_incl_unfinished_ms", 1e-3),
    "running_mean": ("server", "mean_running", 1.0),
}
# The levels that a run counts for beside `all`.
LEVELS: dict[str, tuple[str, ...]] = {
    "unstarved": ("unsaturated", "unstarved"),
    "starved": ("unsaturated", "starved"),
    "client_saturated": ("client_saturated",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmComparison:
    """A metric of a run."""

    run: str
    metric: str
    load_level: str
    measured: float
    predicted: float

    @property
    def error_pct(self) -> float:
        return 100 * (self.predicted / self.measured - 1) if self.measured else float("nan")

    def to_json(self) -> dict[str, Any]:
        """Return the row of `sim validate --format json`."""
        numbers = {"measured": self.measured, "predicted": self.predicted, "error_pct": self.error_pct}
        finite = {name: value if isfinite(value) else None for name, value in numbers.items()}
        return {"run": self.run, "metric": self.metric, "load_level": self.load_level, **finite}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOutcome:
    """A run as it went and as it was predicted."""

    name: str
    started: bool
    predicted_start: bool
    starved: bool | None
    predicted_starved: bool | None
    comparisons: tuple[VllmComparison, ...]


def is_vllm_folder(folder: Path) -> bool:
    """Whether a folder holds measured vLLM runs, and no run records of ours."""
    return (folder / RUNS_FILE).is_file()


def validate_vllm(
    folder: Path,
    profile: VllmProfile,
    *,
    keep: Callable[[Row], bool] = lambda _: True,
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> dict[str, Any]:
    """Predict every run of a folder; return the JSON object of `sim validate`. keep: which runs."""
    tables = length_tables(folder / LENGTHS_FILE)
    runs = [(place, row) for place, row in read_lines(folder / RUNS_FILE) if keep(row)]
    if not runs:
        raise UserError(f"{folder / RUNS_FILE}: holds no run")
    outcomes = []
    for outcome in map_runs(partial(compare_run, profile=profile, tables=tables), runs, workers):
        outcomes.append(outcome)
        progress(len(outcomes), len(runs))
    return outcome_json(outcomes)


def outcome_json(outcomes: Sequence[RunOutcome]) -> dict[str, Any]:
    """Return the JSON object of `sim validate`."""
    rows = [row for outcome in outcomes for row in outcome.comparisons]
    return {
        "runs": len(outcomes),
        "rows": [row.to_json() for row in rows],
        "summary": summary(rows),
        "start": _right(
            [(o.started, o.predicted_start) for o in outcomes], [o.name for o in outcomes], "feasible"
        ),
        "starved": _right(
            [
                (o.starved, o.predicted_starved)
                for o in outcomes
                if o.starved is not None and o.predicted_start
            ],
            [o.name for o in outcomes if o.starved is not None and o.predicted_start],
            "starved",
        ),
    }


def compare_run(item: tuple[str, Row], *, profile: VllmProfile, tables: dict[str, LengthTable]) -> RunOutcome:
    """Predict one run and compare."""
    place, row = item
    started = row.get("status") == "ok"
    slots, rank = int(number(row, "max_loras", place)), int(number(row, "max_lora_rank", place))
    config = server_config(profile, slots, rank)
    if not started:
        reason = _starts(profile, config)
        return RunOutcome(
            name=str(row.get("run")),
            started=False,
            predicted_start=reason is None,
            starved=None,
            predicted_starved=None,
            comparisons=(),
        )
    found = predict(profile, config, stream(row, tables, place, DURATION_S), DURATION_S)
    return RunOutcome(
        name=str(row.get("run")),
        started=True,
        predicted_start=found.infeasible is None,
        starved=bool(row.get("starved")),
        predicted_starved=found.starved if found.infeasible is None else None,
        comparisons=tuple(_comparisons(row, place, found.metrics)),
    )


def _starts(profile: VllmProfile, config: ServingConfig) -> tuple[str, str] | None:
    return VllmSetup(config=config, profile=profile, adapters={}).why_not()


def level_of(row: Row) -> str:
    """Return how a run went: the client was saturated, or requests starved, or neither."""
    if row.get("client_saturated"):
        return "client_saturated"
    return "starved" if row.get("starved") else "unstarved"


def _comparisons(row: Row, place: str, metrics: Mapping[str, float]) -> Iterator[VllmComparison]:
    for metric, (group, name, scale) in MEASURED.items():
        measured = part(row, group, place).get(name)
        if measured is None or metric not in metrics:
            continue
        yield VllmComparison(
            run=str(row.get("run")),
            metric=metric,
            load_level=level_of(row),
            measured=float(measured) * scale,
            predicted=metrics[metric],
        )


def summary(rows: Iterable[VllmComparison]) -> dict[str, dict[str, dict[str, float]]]:
    """Return mean and median absolute error, worst and bias in percent, by level (and all) and metric."""
    groups: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if isfinite(row.error_pct):
            for level in (*LEVELS[row.load_level], "all"):
                groups.setdefault((level, row.metric), []).append(row.error_pct)
    result: dict[str, dict[str, dict[str, float]]] = {}
    for (level, metric), errors in groups.items():
        sizes = [abs(error) for error in errors]
        result.setdefault(level, {})[metric] = {
            "runs": len(errors),
            "mape_pct": fmean(sizes),
            "median_abs_error_pct": median(sizes),
            "worst_abs_error_pct": max(sizes),
            "bias_pct": fmean(errors),
        }
    return result


def twin_rows(runs: Iterable[Row]) -> list[VllmComparison]:
    """Return the same comparisons for the authors' digital twin, which the runs' lines hold (score.py's TWIN)."""
    twin = {
        "throughput_rps": ("req_s", 1.0),
        "total_tokens_per_s": ("total_tok_s", 1.0),
        "itl_mean_s": ("itl_mean_ms", 1e-3),
        "tpot_mean_s": ("itl_mean_ms", 1e-3),
        "ttft_mean_s": ("ttft_mean_finished_ms", 1e-3),
        "ttft_mean_incl_unfinished_s": ("ttft_mean_incl_unfinished_ms", 1e-3),
    }
    rows: list[VllmComparison] = []
    for run in runs:
        said = run.get("dt") or {}
        metrics = {n: said[key] * scale for n, (key, scale) in twin.items() if said.get(key) is not None}
        if run.get("status") == "ok":
            rows += _comparisons(run, str(run.get("run")), metrics)
    return rows


def _right(pairs: list[tuple[Any, Any]], names: list[str], what: str) -> dict[str, Any]:
    """Return how often a yes or no was predicted right, and where it was not."""
    wrong = [name for name, (truth, said) in zip(names, pairs, strict=True) if truth != said]
    return {
        "runs": len(pairs),
        "right": len(pairs) - len(wrong),
        "right_pct": 100 * (1 - len(wrong) / len(pairs)) if pairs else None,
        "what": what,
        "wrong": wrong,
    }


def map_runs(
    work: Callable[[tuple[str, Row]], RunOutcome], items: list[tuple[str, Row]], workers: int | None
) -> Iterator[RunOutcome]:
    """Return the outcome of each run, in their order, worked out by so many processes (None: all cores)."""
    count = workers or min(len(items), len(os.sched_getaffinity(0)))
    if count <= 1:
        yield from map(work, items)
        return
    with ProcessPoolExecutor(count) as pool:
        yield from pool.map(work, items, chunksize=1)


SHOWN = ("throughput_rps", "total_tokens_per_s", "tpot_mean_s", "itl_mean_s", "ttft_mean_s", "running_mean")


def vllm_lines(outcome: Mapping[str, Any]) -> Iterator[str]:
    """Yield a validation as text: errors by level and metric, and what was right of the yes-or-no questions."""
    yield f"{outcome['runs']} runs"
    yield f"{'level':17s} {'metric':20s} {'runs':>5s} {'MAPE %':>8s} {'median %':>9s} {'bias %':>8s}"
    for level in ("unsaturated", "unstarved", "starved", "client_saturated", "all"):
        for metric in SHOWN:
            found = outcome["summary"].get(level, {}).get(metric)
            if found is not None:
                numbers = (found["mape_pct"], found["median_abs_error_pct"], found["bias_pct"])
                yield f"{level:17s} {metric:20s} {found['runs']:5d} {numbers[0]:8.1f} {numbers[1]:9.1f} {numbers[2]:+8.1f}"
    for question in ("start", "starved"):
        told = outcome[question]
        yield f"{told['what']} or not: right in {told['right']} of {told['runs']}"


def tell_progress(done: int, total: int) -> None:
    """Tell on standard error how far a validation is."""
    if done % 10 == 0 or done == total:
        print(f"{done} of {total} runs", file=sys.stderr, flush=True)
