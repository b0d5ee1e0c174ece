"""Where a trace lies among numbers of adapters and ranks."""

from __future__ import annotations

import numpy as np

from engine.adapter import DEFAULT_RANK
from traces import BASE_MODEL, Trace

RANKS = (8, 16, 32, 64, 128)


def adapter_point(trace: Trace) -> tuple[int, int] | None:
    """Return the trace's number of adapters, and the rank of RANKS nearest to the mean of its requests; None without adapters."""
    columns = trace.columns
    used = columns.adapter_index[columns.adapter_index != BASE_MODEL]
    if not len(used):
        return None
    ranks = np.array([DEFAULT_RANK if rank is None else rank for rank in columns.adapter_ranks])
    mean = float(ranks[used].mean())
    return len(columns.adapter_names), min(RANKS, key=lambda rank: (abs(rank - mean), rank))
