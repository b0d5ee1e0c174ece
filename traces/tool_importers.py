"""Importers of the formats in which other tools keep requests: Vidur, BLIS and vLLM's timed trace.

As in `traces.importers`, ids are 0-based row numbers and times are seconds from the first row.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import numpy as np

from traces.builder import TraceBuilder
from traces.errors import TraceError
from traces.importers import TICKS_PER_SECOND, TimeUnit, Warn, adapter_of, csv_records, finish, number_of
from traces.native import json_lines
from traces.trace import Trace

_VIDUR_FIELDS = {"prompt_tokens": "num_prefill_tokens", "output_tokens": "num_decode_tokens"}
_BLIS_FIELDS = {
    "arrival_s": "arrival_time_us",
    "prompt_tokens": "input_tokens",
    "output_tokens": "output_tokens",
}
_TIMED_NAMES = {  # what vLLM's timed traces have called the lengths
    "prompt_tokens": ("input_length", "prompt_tokens", "input_tokens", "prompt_len"),
    "output_tokens": ("output_length", "output_tokens", "expected_output_len", "output_len"),
}


def import_vidur(
    path: str | os.PathLike[str], rate_rps: float | None = None, seed: int = 0, warn: Warn = warnings.warn
) -> Trace:
    """Read a Vidur CSV: num_prefill_tokens, num_decode_tokens and, where it has times, arrived_at in seconds.

    A file of lengths alone gets Poisson arrivals of `rate_rps` drawn with `seed`; without a rate it is refused. Source: microsoft/vidur.
    """
    if rate_rps is not None and not rate_rps > 0:
        raise TraceError(f"--rate (={rate_rps}) must be above 0")
    rng = np.random.default_rng(seed)
    builder = TraceBuilder(str(path), field_names=_VIDUR_FIELDS | {"arrival_s": "arrived_at"})
    first_s: float | None = None
    instant_s = 0.0
    for j, (place, row) in enumerate(csv_records(path, _VIDUR_FIELDS)):
        if "arrived_at" in row:
            if rate_rps is not None:
                raise TraceError(f"{path}: has its own arrivals (arrived_at); --rate is for files without")
            instant_s = number_of(place, "arrived_at", row["arrived_at"])
        elif rate_rps is None:
            raise TraceError(f"{path}: has no column arrived_at; --rate gives its requests Poisson arrivals")
        else:
            instant_s += float(rng.exponential(1 / rate_rps))
        first_s = instant_s if first_s is None else first_s
        fields = {
            "id": j,
            "arrival_s": round(instant_s - first_s, 6),
            **{name: number_of(place, column, row[column]) for name, column in _VIDUR_FIELDS.items()},
        }
        builder.add(place, fields)
    return finish(builder, path, warn)


def import_blis(path: str | os.PathLike[str], warn: Warn = warnings.warn) -> Trace:
    """Read a BLIS TraceV2 CSV: arrival_time_us, input_tokens, output_tokens, and adapter where there is such a column."""
    builder = TraceBuilder(str(path), field_names=_BLIS_FIELDS)
    first_us: float | None = None
    for j, (place, row) in enumerate(csv_records(path, _BLIS_FIELDS)):
        instant_us = number_of(place, "arrival_time_us", row["arrival_time_us"])
        first_us = instant_us if first_us is None else first_us
        fields: dict[str, Any] = {
            "id": j,
            "arrival_s": round((instant_us - first_us) / 1e6, 6),
            "prompt_tokens": number_of(place, "input_tokens", row["input_tokens"]),
            "output_tokens": number_of(place, "output_tokens", row["output_tokens"]),
            "adapter": adapter_of(place, {name: value or None for name, value in row.items()}),
        }
        builder.add(place, fields)
    return finish(builder, path, warn)


def import_timed(
    path: str | os.PathLike[str], time_unit: TimeUnit = "s", warn: Warn = warnings.warn
) -> Trace:
    """Read vLLM's timed trace, JSONL with `timestamp` in seconds and the lengths; an adapter by any of its aliases."""
    builder = TraceBuilder(str(path), field_names={"arrival_s": "timestamp"})
    first: float | None = None
    for j, (number, row) in enumerate(json_lines(path)):
        place = f"{path}:{number}"
        instant = row.get("timestamp")
        if isinstance(instant, bool) or not isinstance(instant, (int, float)):
            raise TraceError(f"{place}: timestamp must be a finite number, not {str(instant)[:60]}")
        first = float(instant) if first is None else first
        fields = {
            "id": j,
            "arrival_s": round((float(instant) - first) / TICKS_PER_SECOND[time_unit], 6),
            "adapter": adapter_of(place, row),
            "rank": row.get("rank"),
        }
        for name, known in _TIMED_NAMES.items():
            given = [key for key in known if key in row]
            if not given:
                raise TraceError(f"{place}: {name} is missing: none of {', '.join(known)}")
            fields[name] = row[given[0]]
        builder.add(place, fields)
    return finish(builder, path, warn)
