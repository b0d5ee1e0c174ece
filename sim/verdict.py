"""What the project asks of the simulator, and whether the recorded runs show it: issue 7's targets, beside twice the noise floor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np

RUNS_WANTED, TWINS_WANTED = 24, 5
COVERAGE_WANTED = (85.0, 95.0)


@dataclass(frozen=True, slots=True)
class Target:
    """Most that a statistic of a metric's absolute error may be, in percent. saturated: whether runs at saturation count, or no others."""

    metric: str
    statistic: str
    most_pct: float
    saturated: str = "too"

    def counts(self, level: str) -> bool:
        """Return whether runs of a load level count."""
        return self.saturated == "too" or (level == "saturated") == (self.saturated == "only")

    @property
    def where(self) -> str:
        """Which runs count, in words."""
        return {"too": "all runs", "not": "below saturation", "only": "saturated runs"}[self.saturated]


TARGETS = (
    Target("throughput_rps", "median", 2.0),
    Target("throughput_rps", "worst", 5.0),
    Target("tpot_p50_s", "median", 3.0),
    Target("ttft_p50_s", "median", 6.0, "not"),
    Target("e2e_p95_s", "median", 5.0),
    Target("ttft_p99_s", "median", 15.0, "not"),
    # A saturated run finishes as many requests a second as can be sustained.
    Target("throughput_rps", "worst", 3.0, "only"),
)
STATISTICS: dict[str, Callable[[Sequence[float]], float]] = {
    "median": lambda errors: float(np.median(errors)),
    "worst": lambda errors: float(np.max(errors)),
}


def verdicts(rows: Sequence[Mapping[str, Any]], noise: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Judge each target. rows: those of `sim validate`; noise: of `sim.noise`.

    allowed_pct: the target, or twice the same statistic of the twins where that is more. met: None where no run tells.
    """
    found = []
    for target in TARGETS:
        errors = [
            abs(row["error_pct"])
            for row in rows
            if row["metric"] == target.metric
            and target.counts(row["load_level"])
            and row["error_pct"] is not None
            and isfinite(row["error_pct"])
        ]
        floor = noise["summary"].get(target.metric, {}).get(f"{target.statistic}_pct")
        allowed = max(target.most_pct, 2 * floor) if floor is not None else target.most_pct
        value = STATISTICS[target.statistic](errors) if errors else None
        found.append(
            {
                "metric": target.metric,
                "statistic": target.statistic,
                "where": target.where,
                "runs": len(errors),
                "value_pct": value,
                "target_pct": target.most_pct,
                "noise_pct": floor,
                "allowed_pct": allowed,
                "met": None if value is None else value <= allowed,
            }
        )
    return found


def shortfalls(runs: int, pairs: int, covered_pct: float | None) -> list[str]:
    """Say what the collection of runs lacks to be judged by."""
    found = []
    if runs < RUNS_WANTED:
        found.append(f"{runs} recorded runs of the {RUNS_WANTED} that are asked for")
    if pairs < TWINS_WANTED:
        found.append(f"{pairs} of {TWINS_WANTED} runs recorded twice, so the noise floor is little known")
    low, high = COVERAGE_WANTED
    if covered_pct is None:
        found.append("too few runs to stretch intervals by other runs")
    elif not low <= covered_pct <= high:
        found.append(f"intervals hold {covered_pct:.0f} % of the measurements, not {low:.0f} to {high:.0f}")
    return found
