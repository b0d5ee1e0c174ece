"""What a trace looks like, as rows to draw: arrivals over time, lengths, and how traffic is spread over adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from traces import BASE_MODEL, Trace

BINS = 80
LENGTH_BINS = 30
MOST_ADAPTERS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class TracePreview:
    """Rows by chart.

    arrivals: {"at_s", "end_s", "rps"}; lengths: {"kind", "low", "high", "requests"}, bins of equal ratio; adapters: {"place", "adapter",
    "rank", "requests", "share"}, the most asked for first, at most MOST_ADAPTERS.
    """

    arrivals: tuple[dict[str, Any], ...]
    lengths: tuple[dict[str, Any], ...]
    adapters: tuple[dict[str, Any], ...]


def preview(trace: Trace) -> TracePreview:
    """Count a trace's requests by time, length and adapter."""
    return TracePreview(arrivals=_arrivals(trace), lengths=_lengths(trace), adapters=_adapters(trace))


def _arrivals(trace: Trace) -> tuple[dict[str, Any], ...]:
    arrival_s = trace.columns.arrival_s
    counts, edges_s = np.histogram(arrival_s, bins=min(BINS, max(1, len(trace) // 5)))
    width_s = float(edges_s[1] - edges_s[0])
    return tuple(
        {"at_s": start, "end_s": start + width_s, "rps": count / width_s}
        for start, count in zip(edges_s[:-1].tolist(), counts.tolist(), strict=True)
    )


def _lengths(trace: Trace) -> tuple[dict[str, Any], ...]:
    columns = trace.columns
    rows: list[dict[str, Any]] = []
    for kind, tokens in (("prompt", columns.prompt_tokens), ("output", columns.output_tokens)):
        low, high = float(tokens.min()), float(tokens.max())
        edges = np.geomspace(low, high + 1, LENGTH_BINS + 1)
        counts, _ = np.histogram(tokens, bins=edges)
        rows += [
            {"kind": kind, "low": start, "high": end, "requests": count}
            for start, end, count in zip(
                edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True
            )
        ]
    return tuple(rows)


def _adapters(trace: Trace) -> tuple[dict[str, Any], ...]:
    columns = trace.columns
    used = columns.adapter_index[columns.adapter_index != BASE_MODEL]
    if not len(used):
        return ()
    counts = np.bincount(used, minlength=len(columns.adapter_names))
    return tuple(
        {
            "place": place,
            "adapter": columns.adapter_names[index],
            "rank": columns.adapter_ranks[index],
            "requests": int(counts[index]),
            "share": float(counts[index] / len(trace)),
        }
        for place, index in enumerate(np.argsort(-counts, kind="stable").tolist()[:MOST_ADAPTERS], start=1)
    )
