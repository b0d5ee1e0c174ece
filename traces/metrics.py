"""The metrics of a run, simulated or recorded: the same keys everywhere. Formulas: docs/metrics.md."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from traces.errors import TraceError

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.float64]

STATISTICS = ("mean", "p50", "p95", "p99")


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """What is promised:

    bounds in seconds on the time to the first token, per further token, and (None: none) end to end.

    attainment: the share of requests that must meet all bounds. percentile: where distributions are compared
    with the bounds.
    """

    ttft_s: float = 0.5
    tpot_s: float = 0.05
    e2e_s: float | None = None
    percentile: float = 95.0
    attainment: float = 0.95

    def __post_init__(self) -> None:
        for name in ("ttft_s", "tpot_s", "e2e_s"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise TraceError(f"{name}={value} must be a finite number above 0")
        if not 0 < self.percentile <= 100:
            raise TraceError(f"percentile={self.percentile} must be in (0, 100]")
        if not 0 < self.attainment <= 1:
            raise TraceError(f"attainment={self.attainment} must be in (0, 1]")


def metrics(
    requests: Mapping[str, Any] | pd.DataFrame, slo: Slo | None = None, *, adapter_loads: int = 0
) -> dict[str, float]:
    """Compute the metrics of requests given by column (`traces.run_record.REQUEST_COLUMNS`), in seconds.

    slo: what attainment is measured against; None is `Slo()`. adapter_loads: a total that no request's row
    holds. What cannot be told (no request finished, say) is NaN.
    """
    column = _columns(requests)
    latency = _Latencies.of(column)
    done = ~np.isnan(column["finish_s"])
    span_s = _span_s(column["arrival_s"], column["finish_s"][done])
    finished = int(done.sum())
    values: dict[str, float] = {
        "requests": len(done),
        "throughput_rps": finished / span_s if span_s > 0 else math.nan,
        "output_tokens_per_s": float(column["output_tokens"][done].sum()) / span_s
        if span_s > 0
        else math.nan,
    }
    for name, sample in (("ttft", latency.ttft_s), ("tpot", latency.tpot_s), ("e2e", latency.e2e_s)):
        values |= _statistics(name, sample)
    values["slo_attainment"] = _attainment(latency, slo or Slo())
    values["adapter_loads"] = adapter_loads
    values["adapter_hit_rate"] = _hit_rate(requests, column)
    values["preemptions"] = int(np.nansum(column["preemptions"]))
    values["prefix_hit_rate"] = _prefix_hit_rate(column)
    return values


@dataclass(frozen=True, slots=True)
class _Latencies:
    """By request, NaN where it did not come to that."""

    ttft_s: Floats
    tpot_s: Floats
    e2e_s: Floats

    @classmethod
    def of(cls, column: Mapping[str, Floats]) -> _Latencies:
        ttft_s = column["first_token_s"] - column["arrival_s"]
        e2e_s = column["finish_s"] - column["arrival_s"]
        further = column["output_tokens"] - 1
        tpot_s = np.full(len(e2e_s), np.nan)
        np.divide(e2e_s - ttft_s, further, out=tpot_s, where=further > 0)
        return cls(ttft_s, tpot_s, e2e_s)


def _columns(requests: Mapping[str, Any] | pd.DataFrame) -> dict[str, Floats]:
    names = (
        "arrival_s",
        "scheduled_s",
        "first_token_s",
        "finish_s",
        "prompt_tokens",
        "output_tokens",
        "load_wait_s",
        "preemptions",
        "cached_tokens",
    )
    return {name: np.asarray(requests[name], dtype=np.float64) for name in names}


def _span_s(arrival_s: Floats, finish_s: Floats) -> float:
    return float(finish_s.max() - arrival_s.min()) if len(finish_s) else 0.0


def _statistics(name: str, sample: Floats) -> dict[str, float]:
    known = sample[~np.isnan(sample)]
    if not len(known):
        return {f"{name}_{statistic}_s": math.nan for statistic in STATISTICS}
    p50, p95, p99 = np.percentile(known, (50, 95, 99)).tolist()
    return dict(
        zip(
            (f"{name}_{statistic}_s" for statistic in STATISTICS),
            (float(known.mean()), p50, p95, p99),
            strict=True,
        )
    )


def _attainment(latency: _Latencies, slo: Slo) -> float:
    """Return the share of all requests that finished within the bounds; a request of one token has no TPOT to
    miss.
    """
    if not len(latency.e2e_s):
        return math.nan
    met = ~np.isnan(latency.e2e_s) & (latency.ttft_s <= slo.ttft_s) & ~(latency.tpot_s > slo.tpot_s)
    if slo.e2e_s is not None:
        met &= latency.e2e_s <= slo.e2e_s
    return float(met.mean())


def _hit_rate(requests: Mapping[str, Any] | pd.DataFrame, column: Mapping[str, Floats]) -> float:
    names = np.asarray(requests["adapter"], dtype=object)
    asked = np.array([isinstance(name, str) for name in names.tolist()], dtype=bool)
    waits_s = column["load_wait_s"][asked & ~np.isnan(column["scheduled_s"])]
    return float((waits_s == 0.0).mean()) if len(waits_s) else math.nan


def _prefix_hit_rate(column: Mapping[str, Floats]) -> float:
    """Return the share of the scheduled requests' prompt tokens that the prefix cache had."""
    scheduled = ~np.isnan(column["scheduled_s"])
    prompt_tokens = column["prompt_tokens"][scheduled].sum()
    return float(column["cached_tokens"][scheduled].sum() / prompt_tokens) if prompt_tokens else math.nan
