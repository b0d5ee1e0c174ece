"""The noise floor: how far two records of the same trace under the same configuration are apart. No prediction can be nearer to both."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from math import isfinite
from typing import Any

import numpy as np

from sim.records import RecordedRun


def twins(runs: Iterable[RecordedRun]) -> list[tuple[RecordedRun, RecordedRun]]:
    """Return the pairs of records of one trace."""
    by_key: dict[Any, list[RecordedRun]] = {}
    for run in runs:
        by_key.setdefault(run.key, []).append(run)
    return [pair for group in by_key.values() for pair in combinations(group, 2)]


def noise_of(pairs: Sequence[tuple[RecordedRun, RecordedRun]], metrics: Sequence[str]) -> dict[str, Any]:
    """Return each pair's differences in percent of their mean, and by metric their median and worst absolute value; NaN is left out."""
    rows: list[dict[str, Any]] = []
    for first, second in pairs:
        for metric in metrics:
            a, b = first.measured[metric], second.measured[metric]
            if isfinite(a) and isfinite(b) and a + b > 0:
                difference = 100 * (b - a) / ((a + b) / 2)
                rows.append(
                    {"run": first.name, "again": second.name, "metric": metric, "difference_pct": difference}
                )
    summary = {}
    for metric in metrics:
        found = np.array([abs(row["difference_pct"]) for row in rows if row["metric"] == metric])
        if len(found):
            summary[metric] = {"median_pct": float(np.median(found)), "worst_pct": float(found.max())}
    return {"pairs": len(pairs), "rows": rows, "summary": summary}
