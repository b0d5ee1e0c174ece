"""A trace: who asked for how much, when, and of which adapter.

Columns are kept in numpy, so that a million requests are cheap to scale, cut and summarise; `Trace.requests`
shows the same rows one by one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from traces.builder import TraceBuilder
from traces.columns import TraceColumns, TraceRequest
from traces.errors import TraceError

if TYPE_CHECKING:
    import pandas as pd


class Trace:
    """An immutable sequence of requests in arrival order, and a name to show."""

    __slots__ = ("_requests", "columns", "name")

    columns: TraceColumns
    name: str
    _requests: tuple[TraceRequest, ...] | None

    def __init__(self, requests: Iterable[TraceRequest], name: str = "trace") -> None:
        """Build from requests, checked as a file's lines are.

        Raises TraceError naming the request (counted from 0) and the field.
        """
        builder = TraceBuilder(name)
        for position, request in enumerate(requests):
            row = {field: getattr(request, field) for field in TraceRequest.__slots__}
            builder.add(f"{name}: request {position}", row)
        self._set(builder.columns(), name)

    @classmethod
    def from_columns(cls, columns: TraceColumns, name: str = "trace") -> Trace:
        """Wrap columns that are already known to be valid."""
        trace = cls.__new__(cls)
        trace._set(columns, name)
        return trace

    def _set(self, columns: TraceColumns, name: str) -> None:
        object.__setattr__(self, "columns", columns)
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "_requests", None)

    def __setattr__(self, attribute: str, value: Any) -> None:
        raise AttributeError(f"a Trace is immutable: {attribute} cannot be set")

    def __reduce__(self) -> tuple[Any, ...]:
        return Trace.from_columns, (self.columns, self.name)

    def __len__(self) -> int:
        return len(self.columns.ids)

    def __repr__(self) -> str:
        adapters = len(self.columns.adapter_names)
        return f"Trace({self.name!r}, {len(self)} requests, {self.duration_s:g} s, {adapters} adapters)"

    @property
    def requests(self) -> tuple[TraceRequest, ...]:
        """The requests one by one, made at the first use and kept."""
        if self._requests is None:
            object.__setattr__(self, "_requests", self.columns.requests())
        assert self._requests is not None
        return self._requests

    @property
    def duration_s(self) -> float:
        """Seconds from time zero to the last arrival."""
        return float(self.columns.arrival_s[-1])

    @property
    def rate_rps(self) -> float:
        """Requests per second between the first and the last arrival; 0 where that span is empty."""
        span_s = float(self.columns.arrival_s[-1] - self.columns.arrival_s[0])
        return (len(self) - 1) / span_s if span_s > 0 else 0.0

    @property
    def adapters(self) -> dict[str, int | None]:
        """Rank by adapter name (None: the trace does not tell it)."""
        return dict(zip(self.columns.adapter_names, self.columns.adapter_ranks, strict=True))

    def digest(self) -> str:
        """Return a SHA-256 of what is asked for: equal requests give equal digests, whatever the file was called."""
        columns, found = self.columns, hashlib.sha256()
        for values in (
            columns.arrival_s,
            columns.prompt_tokens,
            columns.output_tokens,
            columns.adapter_index,
        ):
            found.update(np.ascontiguousarray(values).data)
        found.update(repr((columns.adapter_names, columns.adapter_ranks)).encode())
        for blocks in columns.prefix_blocks or ():
            found.update(repr(blocks).encode())
        return found.hexdigest()

    def scaled(self, rate_scale: float) -> Trace:
        """Return the trace at `rate_scale` times its rate; time is divided by it, so the CV is kept."""
        if not (np.isfinite(rate_scale) and rate_scale > 0):
            raise TraceError(f"rate_scale must be a finite number above 0, not {rate_scale}")
        raw = self.columns.raw_arrival_s
        columns = replace(
            self.columns,
            arrival_s=self.columns.arrival_s / rate_scale,
            raw_arrival_s=None if raw is None else raw / rate_scale,
        )
        return Trace.from_columns(columns, self.name)

    def window(self, start_s: float, end_s: float) -> Trace:
        """Return the requests with start_s <= arrival < end_s, their time counted from start_s; ids are kept.

        Raises TraceError if no request falls into the window.
        """
        arrivals = self.columns.arrival_s
        first, last = np.searchsorted(arrivals, (start_s, end_s), side="left").tolist()
        if first >= last:
            raise TraceError(f"{self.name}: no request arrives in the window {start_s:g} s to {end_s:g} s")
        columns = self.columns.take(np.arange(first, last))
        columns = replace(columns, arrival_s=columns.arrival_s - start_s, raw_arrival_s=None)
        return Trace.from_columns(columns, self.name)

    def head(self, count: int) -> Trace:
        """Return the first `count` requests (all, if there are fewer)."""
        if count < 1:
            raise TraceError(f"count must be at least 1, not {count}")
        return Trace.from_columns(self.columns.take(np.arange(min(count, len(self)))), self.name)

    def to_frame(self) -> pd.DataFrame:
        """Return the requests as a data frame, one column a field."""
        import pandas as pd  # half a second to import: not every user of a trace needs it

        fields = TraceRequest.__slots__
        return pd.DataFrame({field: [getattr(row, field) for row in self.requests] for field in fields})


def sample_path() -> Path:
    """Return the path of the synthetic sample trace that ships with the package."""
    return Path(__file__).parent / "samples" / "sample.jsonl.gz"
