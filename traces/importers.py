"""Importers of public trace formats.

Each returns a Trace whose ids are the 0-based row numbers of the source file, counted before any row is
dropped, and whose times are seconds from the first row. What a user should know is told through `warn`.
"""

from __future__ import annotations

import csv
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np

from traces.builder import TraceBuilder
from traces.columns import Floats, TraceColumns
from traces.errors import TraceError
from traces.files import text_lines
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
    per_second = TICKS_PER_SECOND[time_unit]
    builder = TraceBuilder(str(path), field_names=_MOONCAKE_FIELDS)
    first: float | None = None
    unnamed = bytearray()  # 1 where a row has no session_id
    for j, (number, row) in enumerate(json_lines(path)):
        place = f"{path}:{number}"
        instant = _timestamp(place, row)
        first = instant if first is None else first
        fields = {
            "id": j,
            "arrival_s": round((instant - first) / per_second, 6),
            "prompt_tokens": row.get("input_length"),
            "output_tokens": row.get("output_length"),
            "adapter": adapter_of(place, row),
            "rank": row.get("rank"),
            "session": row.get("session_id"),
            "prefix_blocks": row.get("hash_ids"),
        }
        unnamed.append("session_id" not in row)
        builder.add(place, fields)
    columns = _with_sessions(builder.columns(), unnamed)
    if spread is None:
        spread = _ticks_coarsely(columns.arrival_s)
        if spread:
            warn(f"{path}: its clock ticks every 3 s: requests of one tick are spread over it (--no-spread)")
    return plausible(_spread(columns) if spread else columns, path, warn)


def finish(builder: TraceBuilder, path: str | os.PathLike[str], warn: Warn) -> Trace:
    """Return what was built; warn where its rate makes no sense."""
    return plausible(builder.columns(), path, warn)


def plausible(columns: TraceColumns, path: str | os.PathLike[str], warn: Warn) -> Trace:
    """Return the trace of a file; warn where its rate makes no sense."""
    trace = Trace.from_columns(columns, trace_name(path))
    low, high = PLAUSIBLE_RPS
    if len(trace) > 1 and not low <= trace.rate_rps <= high:
        rate = f"{len(trace)} requests in {trace.duration_s:g} s, {trace.rate_rps:.3g} a second"
        warn(f"{path}: {rate}: implausible; is the time unit right (--time-unit)?")
    return trace


def csv_records(
    path: str | os.PathLike[str], needed: Mapping[str, str]
) -> Iterator[tuple[str, dict[str, str | None]]]:
    """Yield (place, row) of a CSV that has the needed columns. Raises TraceError naming line and column."""
    reader = csv.DictReader(text_lines(path))
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


def _ticks_coarsely(raw_s: Floats) -> bool:
    ticks = np.unique(raw_s)
    if len(ticks) < 2 or len(ticks) == len(raw_s):
        return False
    return abs(float(np.median(np.diff(ticks))) - MOONCAKE_TICK_S) < 0.05 * MOONCAKE_TICK_S


def _spread(columns: TraceColumns) -> TraceColumns:
    """Return the columns with the i-th of k rows of one tick at i/k of it; their own clock is kept beside."""
    raw_s = columns.arrival_s
    _, first, sizes = np.unique(raw_s, return_index=True, return_counts=True)
    within = np.arange(len(raw_s)) - np.repeat(first, sizes)
    spread_s = (raw_s + MOONCAKE_TICK_S * within / np.repeat(sizes, sizes)).round(6)
    same = bool((spread_s == raw_s).all())
    return replace(columns, arrival_s=spread_s, raw_arrival_s=None if same else raw_s)


def _with_sessions(columns: TraceColumns, unnamed: bytearray) -> TraceColumns:
    """Name the sessions of rows that do not by the prefix block that tells conversations apart: the second where all share the first."""
    blocks = columns.prefix_blocks
    if blocks is None or not any(unnamed):
        return columns
    firsts = {row[:1] for row in blocks if row}
    place = 1 if len(firsts) == 1 and all(blocks) and len(blocks) > 1 else 0
    known = columns.sessions or (None,) * len(blocks)
    names: dict[str, str] = {}
    sessions = []
    for row, session, without in zip(blocks, known, unnamed, strict=True):
        if without and row is not None and len(row) > place:
            name = str(row[place])
            session = names.setdefault(name, name)
        sessions.append(session)
    return replace(columns, sessions=tuple(sessions) if any(s is not None for s in sessions) else None)


def adapter_of(place: str, row: Mapping[str, Any]) -> Any:
    """Return the adapter by any of its aliases. Raises TraceError where two differ."""
    given = {alias: row[alias] for alias in ADAPTER_ALIASES if row.get(alias) is not None}
    if len({str(value) for value in given.values()}) > 1:
        raise TraceError(f"{place}: {' and '.join(given)} name different adapters")
    return next(iter(given.values()), None)
