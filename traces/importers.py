"""Importers of public trace formats.

Each returns a Trace whose ids are the 0-based row numbers of the source file, counted before any row is
dropped, and whose times are seconds from the first row. What a user should know is told through `warn`.
"""

from __future__ import annotations

import csv
import io
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np

from traces.builder import TraceBuilder
from traces.errors import TraceError
from traces.files import read_text
from traces.native import json_lines, trace_name
from traces.trace import Trace

TimeUnit = Literal["s", "ms", "us"]
TICKS_PER_SECOND: dict[TimeUnit, int] = {"s": 1, "ms": 1_000, "us": 1_000_000}

MOONCAKE_TICK_S = 3.0  # the clock of the conversation trace: 12,031 rows share 1,180 times, about 3 s apart
PLAUSIBLE_RPS = (0.005, 1000.0)  # public traces run from 0.0066/s (BurstGPT) to some hundreds a second
ADAPTER_ALIASES = ("adapter", "lora", "lora_name", "adapter_id")

Warn = Callable[[str], None]

_AZURE_TIME = re.compile(r"(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d)?")
_AZURE_FIELDS = {
    "arrival_s": "TIMESTAMP",
    "prompt_tokens": "ContextTokens",
    "output_tokens": "GeneratedTokens",
}
_BURSTGPT_FIELDS = {
    "arrival_s": "Timestamp",
    "prompt_tokens": "Request tokens",
    "output_tokens": "Response tokens",
}
_MOONCAKE_FIELDS = {
    "arrival_s": "timestamp",
    "prompt_tokens": "input_length",
    "output_tokens": "output_length",
    "prefix_blocks": "hash_ids",
}


def import_azure(path: str | os.PathLike[str], warn: Warn = warnings.warn) -> Trace:
    """Read an Azure LLM inference CSV: TIMESTAMP (up to 9 fractional digits), ContextTokens, GeneratedTokens.

    Source: Azure/AzurePublicDataset; Patel et al., Splitwise, ISCA 2024.
    """
    builder = TraceBuilder(str(path), field_names=_AZURE_FIELDS)
    first_ns: int | None = None
    for row, (place, record) in enumerate(csv_records(path, _AZURE_FIELDS)):
        instant_ns = _azure_instant_ns(place, record["TIMESTAMP"])
        first_ns = instant_ns if first_ns is None else first_ns
        fields = {
            "id": row,
            "arrival_s": round((instant_ns - first_ns) / 1e9, 6),
            "prompt_tokens": number_of(place, "ContextTokens", record["ContextTokens"]),
            "output_tokens": number_of(place, "GeneratedTokens", record["GeneratedTokens"]),
        }
        builder.add(place, fields)
    return finish(builder, path, warn)


def import_burstgpt(path: str | os.PathLike[str], warn: Warn = warnings.warn) -> Trace:
    """Read a BurstGPT CSV by column names (version 3 adds `Session ID`), times in seconds.

    Rows with zero request or response tokens are failures: dropped, and counted in a warning. A request
    without a session gets `api:{Model}:{ten-minute window}`. Source: HPMLL/BurstGPT; Wang et al., KDD 2025.
    """
    builder = TraceBuilder(str(path), field_names=_BURSTGPT_FIELDS)
    first_s: float | None = None
    dropped = 0
    for row, (place, record) in enumerate(csv_records(path, _BURSTGPT_FIELDS)):
        instant_s = number_of(place, "Timestamp", record["Timestamp"])
        prompt = number_of(place, "Request tokens", record["Request tokens"])
        output = number_of(place, "Response tokens", record["Response tokens"])
        first_s = instant_s if first_s is None else first_s
        if prompt == 0 or output == 0:
            dropped += 1
            continue
        fields: dict[str, Any] = {
            "id": row,
            "arrival_s": round(instant_s - first_s, 6),
            "prompt_tokens": prompt,
            "output_tokens": output,
        }
        if "Session ID" in record:
            fields["session"] = record["Session ID"] or f"api:{record.get('Model')}:{int(instant_s // 600)}"
        builder.add(place, fields)
    if dropped:
        warn(f"{path}: dropped {dropped} rows with zero request or response tokens (failed requests)")
    return finish(builder, path, warn)


def import_mooncake(
    path: str | os.PathLike[str],
    time_unit: TimeUnit = "ms",
    spread: bool | None = None,
    warn: Warn = warnings.warn,
) -> Trace:
    """Read a Mooncake or AIPerf JSONL:

    timestamp, input_length, output_length; hash_ids and session_id optional.

    `spread` lays the k rows of one timestamp t evenly over the clock's tick, row i at t + 3·i/k seconds, and
    keeps the source's clock as `raw_arrival_s`; None does so where the clock ticks about every 3 s, and says
    it. The session is `session_id`, else the first prefix block that is not common to all requests. An
    adapter may be called adapter, lora, lora_name or adapter_id. Source: kvcache-ai/Mooncake, FAST 2025.
    """
    rows = [(f"{path}:{number}", row) for number, row in json_lines(path)]
    per_second = TICKS_PER_SECOND[time_unit]
    instants = [_timestamp(place, row) for place, row in rows]
    raw_s = [round((instant - instants[0]) / per_second, 6) for instant in instants]
    if spread is None:
        spread = _ticks_coarsely(raw_s)
        if spread:
            warn(f"{path}: its clock ticks every 3 s: requests of one tick are spread over it (--no-spread)")
    spread_s = _spread(raw_s) if spread else [None] * len(rows)
    session_block = _session_block(rows)
    builder = TraceBuilder(str(path), field_names=_MOONCAKE_FIELDS)
    for j, (place, row) in enumerate(rows):
        fields = {
            "id": j,
            "arrival_s": raw_s[j],
            "arrival_spread_s": spread_s[j],
            "prompt_tokens": row.get("input_length"),
            "output_tokens": row.get("output_length"),
            "adapter": adapter_of(place, row),
            "rank": row.get("rank"),
            "session": row.get("session_id", _block(row, session_block)),
            "prefix_blocks": row.get("hash_ids"),
        }
        builder.add(place, fields)
    return finish(builder, path, warn)


def finish(builder: TraceBuilder, path: str | os.PathLike[str], warn: Warn) -> Trace:
    """Return the trace; warn where its rate makes no sense."""
    trace = Trace.from_columns(builder.columns(), trace_name(path))
    low, high = PLAUSIBLE_RPS
    if len(trace) > 1 and not low <= trace.rate_rps <= high:
        rate = f"{len(trace)} requests in {trace.duration_s:g} s, {trace.rate_rps:.3g} a second"
        warn(f"{path}: {rate}: implausible; is the time unit right (--time-unit)?")
    return trace


def csv_records(
    path: str | os.PathLike[str], needed: Mapping[str, str]
) -> Iterator[tuple[str, dict[str, str | None]]]:
    """Yield (place, row) of a CSV that has the needed columns. Raises TraceError naming line and column."""
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    try:
        missing = [name for name in needed.values() if name not in (reader.fieldnames or ())]
        if missing and reader.fieldnames:
            raise TraceError(
                f"{path}:1: column {missing[0]} is missing: the header is {','.join(reader.fieldnames)}"
            )
        for record in reader:
            yield f"{path}:{reader.line_num}", record
    except csv.Error as error:
        raise TraceError(f"{path}:{reader.line_num}: not CSV: {error}") from None


def _azure_instant_ns(place: str, text: str | None) -> int:
    match = _AZURE_TIME.fullmatch((text or "").strip())
    try:
        if match is None:
            raise ValueError
        seconds, fraction, zone = match.groups()
        instant = datetime.fromisoformat(seconds + (zone or "Z"))
    except ValueError:
        raise TraceError(f"{place}: TIMESTAMP must be YYYY-MM-DD HH:MM:SS.fffffff, not {text!r}") from None
    since = instant - datetime(1970, 1, 1, tzinfo=UTC)
    return (since.days * 86_400 + since.seconds) * 10**9 + int((fraction or "0").ljust(9, "0"))


def number_of(place: str, field: str, text: str | None) -> float:
    """Parse a CSV field; whether the number makes sense is the builder's to say."""
    if text is None or not text.strip():
        raise TraceError(f"{place}: {field} is missing")
    try:
        value = float(text)
    except ValueError:
        raise TraceError(f"{place}: {field} must be a number, not {text[:60]!r}") from None
    if not math.isfinite(value):
        raise TraceError(f"{place}: {field} must be finite, not {text[:60]!r}")
    return value


def _timestamp(place: str, row: Mapping[str, Any]) -> float:
    value = row.get("timestamp")
    if value is None:
        raise TraceError(f"{place}: timestamp is missing")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -1e300 < value < 1e300:
        raise TraceError(f"{place}: timestamp must be a finite number, not {str(value)[:60]}")
    return value


def _ticks_coarsely(raw_s: list[float]) -> bool:
    ticks = np.unique(raw_s)
    if len(ticks) < 2 or len(ticks) == len(raw_s):
        return False
    return abs(float(np.median(np.diff(ticks))) - MOONCAKE_TICK_S) < 0.05 * MOONCAKE_TICK_S


def _spread(raw_s: list[float]) -> list[float | None]:
    sizes, seen = Counter(raw_s), Counter[float]()
    spread_s: list[float | None] = []
    for tick_s in raw_s:
        spread_s.append(round(tick_s + MOONCAKE_TICK_S * seen[tick_s] / sizes[tick_s], 6))
        seen[tick_s] += 1
    return spread_s


def _session_block(rows: list[tuple[str, dict[str, Any]]]) -> int:
    """Return which prefix block tells conversations apart: 1 where all share the first, else 0."""
    firsts = {_block(row, 0) for _, row in rows}
    return 1 if len(firsts) == 1 and len(rows) > 1 else 0


def _block(row: Mapping[str, Any], index: int) -> str | None:
    blocks = row.get("hash_ids")
    return str(blocks[index]) if isinstance(blocks, list) and len(blocks) > index else None


def adapter_of(place: str, row: Mapping[str, Any]) -> Any:
    """Return the adapter by any of its aliases. Raises TraceError where two differ."""
    given = {alias: row[alias] for alias in ADAPTER_ALIASES if row.get(alias) is not None}
    if len({str(value) for value in given.values()}) > 1:
        raise TraceError(f"{place}: {' and '.join(given)} name different adapters")
    return next(iter(given.values()), None)
