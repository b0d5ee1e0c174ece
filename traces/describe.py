"""What a trace looks like in a few numbers: load, burstiness, lengths, and how adapters are used."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from traces.columns import BASE_MODEL, Floats, Ints, TraceColumns, distinct_blocks
from traces.trace import Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthSummary:
    """Mean and quantiles of a length in tokens; a quantile is a length that occurs (inverted CDF)."""

    mean: float
    min: int
    p10: int
    p50: int
    p90: int
    p95: int
    p99: int
    max: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSummary:
    """How adapters are used.

    Shares are of the requests that use an adapter, except `base_share`, which is of all. `zipf_s` is the
    maximum-likelihood exponent over the adapters seen, ordered by use (None below two adapters). Both maps
    go from rank to a count, of adapters and of requests; the rank of an adapter that the trace does not
    tell is `unknown`.
    """

    count: int
    base_share: float
    top1_share: float | None
    top10_share: float | None
    zipf_s: float | None
    adapters_by_rank: dict[str, int]
    requests_by_rank: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A trace in numbers.

    `arrival_cv` is the standard deviation of the gaps between arrivals over their mean, `idc` the variance
    over the mean of the arrivals in each second (1: Poisson); None where the trace is too short for them.
    """

    name: str
    requests: int
    duration_s: float
    rate_rps: float
    arrival_cv: float | None
    idc: float | None
    requests_per_minute_min: int
    requests_per_minute_max: int
    prompt_tokens: LengthSummary
    output_tokens: LengthSummary
    sessions: int
    prefix_blocks: int
    adapters: AdapterSummary

    def to_dict(self) -> dict[str, Any]:
        """Return the summary as plain values for JSON."""
        return asdict(self)


def describe(trace: Trace) -> Summary:
    """Summarise a trace."""
    columns = trace.columns
    per_minute = _counts_by(columns.arrival_s, 60.0)
    return Summary(
        name=trace.name,
        requests=len(trace),
        duration_s=trace.duration_s,
        rate_rps=trace.rate_rps,
        arrival_cv=_arrival_cv(columns.arrival_s),
        idc=_idc(columns.arrival_s),
        requests_per_minute_min=int(per_minute.min()),
        requests_per_minute_max=int(per_minute.max()),
        prompt_tokens=_lengths(columns.prompt_tokens),
        output_tokens=_lengths(columns.output_tokens),
        sessions=len(set(columns.sessions or ()) - {None}),
        prefix_blocks=distinct_blocks(columns.prefix_blocks or ()),
        adapters=_adapters(columns),
    )


def zipf_exponent(uses: Ints) -> float | None:
    """Return the s for which weights (i + 1)^-s make these counts, largest first, most likely; in 0..10.

    At the maximum the mean of log(i + 1) over the uses equals its expectation, which falls as s grows.
    """
    uses = np.sort(uses[uses > 0])[::-1]
    if len(uses) < 2:
        return None
    logs = np.log(np.arange(1, len(uses) + 1))
    seen = float((uses * logs).sum() / uses.sum())
    low, high = 0.0, 10.0
    for _ in range(60):
        middle = (low + high) / 2
        weights = np.exp(-middle * logs)
        low, high = (middle, high) if float((weights * logs).sum() / weights.sum()) > seen else (low, middle)
    return (low + high) / 2


def table(summary: Summary) -> Iterator[str]:
    """Yield the summary as lines of text for a terminal."""
    adapters = summary.adapters
    yield f"{summary.name}: {summary.requests:,} requests in {summary.duration_s:,.1f} s"
    yield ""
    burstiness = f"CV {_shown(summary.arrival_cv)}, IDC {_shown(summary.idc)}"
    yield f"arrivals         {summary.rate_rps:.3g} requests/s, {burstiness}"
    yield f"per minute       {summary.requests_per_minute_min} to {summary.requests_per_minute_max}"
    if summary.sessions:
        yield f"sessions         {summary.sessions:,}"
    if summary.prefix_blocks:
        yield f"prefix blocks    {summary.prefix_blocks:,} distinct"
    yield ""
    yield "tokens      " + "".join(f"{name:>9}" for name in LengthSummary.__slots__)
    for label, lengths in (("prompt", summary.prompt_tokens), ("output", summary.output_tokens)):
        yield f"{label:<12}" + "".join(f"{getattr(lengths, name):>9.0f}" for name in LengthSummary.__slots__)
    yield ""
    if adapters.count == 0:
        yield "adapters         none: every request uses the base model"
        return
    yield f"adapters         {adapters.count:,}; base model alone: {adapters.base_share:.1%} of requests"
    yield (
        f"popularity       top 1 {adapters.top1_share:.1%}, top 10 {adapters.top10_share:.1%}, "
        f"Zipf s {_shown(adapters.zipf_s)}"
    )
    yield ""
    yield "rank           adapters  requests"
    for rank, count in adapters.adapters_by_rank.items():
        yield f"{rank:<12}{count:>11,}{adapters.requests_by_rank[rank]:>10,}"


def _arrival_cv(arrival_s: Floats) -> float | None:
    gaps_s = np.diff(arrival_s)
    return float(gaps_s.std() / gaps_s.mean()) if len(gaps_s) > 1 and gaps_s.mean() > 0 else None


def _idc(arrival_s: Floats) -> float | None:
    counts = _counts_by(arrival_s, 1.0)
    return float(counts.var() / counts.mean()) if len(counts) > 1 else None


def _counts_by(arrival_s: Floats, width_s: float) -> Ints:
    """Count arrivals by windows of a width, from the first arrival's to the last one's."""
    windows, counts = np.unique((arrival_s - arrival_s[0]) // width_s, return_counts=True)
    empty = int(windows[-1]) + 1 - len(windows)
    return np.concatenate((counts, np.zeros(min(empty, 10**7), dtype=counts.dtype)))


def _lengths(tokens: Ints) -> LengthSummary:
    at = np.quantile(tokens, (0, 0.1, 0.5, 0.9, 0.95, 0.99, 1), method="inverted_cdf").tolist()
    p0, p10, p50, p90, p95, p99, p100 = (int(value) for value in at)
    return LengthSummary(
        mean=float(tokens.mean()), min=p0, p10=p10, p50=p50, p90=p90, p95=p95, p99=p99, max=p100
    )


def _adapters(columns: TraceColumns) -> AdapterSummary:
    index = columns.adapter_index
    uses = np.bincount(index[index != BASE_MODEL], minlength=len(columns.adapter_names))
    descending, total = np.sort(uses)[::-1], int(uses.sum())
    by_rank: dict[str, int] = {}
    requests_by_rank: dict[str, int] = {}
    ranked = zip(columns.adapter_ranks, uses.tolist(), strict=True)
    for rank, used in sorted(ranked, key=lambda item: item[0] or math.inf):
        shown = "unknown" if rank is None else str(rank)
        by_rank[shown] = by_rank.get(shown, 0) + 1
        requests_by_rank[shown] = requests_by_rank.get(shown, 0) + used
    return AdapterSummary(
        count=len(uses),
        base_share=1 - total / len(index),
        top1_share=float(descending[0] / total) if total else None,
        top10_share=float(descending[:10].sum() / total) if total else None,
        zipf_s=zipf_exponent(uses),
        adapters_by_rank=by_rank,
        requests_by_rank=requests_by_rank,
    )


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
