"""The native trace file: one JSON object a line, gzip accepted.

    {"id": 0, "arrival_s": 0.0, "prompt_tokens": 374, "output_tokens": 44, "adapter": "a0013", "rank": 64,
     "session": "s1", "prefix_blocks": [0, 1]}

Arrival and the two lengths are required; `adapter` null or absent is the base model; unknown keys are
ignored.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from traces.builder import TraceBuilder
from traces.columns import TraceColumns
from traces.errors import TraceError
from traces.files import numbered_lines, write_lines
from traces.trace import Trace

ROWS_AT_ONCE = 4096


def load(path: str | os.PathLike[str], raw_arrivals: bool = False) -> Trace:
    """Read a native trace.

    A line's `arrival_spread_s`, where it has one, is its arrival unless `raw_arrivals`. Raises TraceError,
    one line that names file, line and field, for anything that is missing, out of range, or out of order.
    """
    builder = TraceBuilder(str(path), raw_arrivals=raw_arrivals)
    for number, row in json_lines(path):
        builder.add(f"{path}:{number}", row)
    return Trace.from_columns(builder.columns(), trace_name(path))


def save(trace: Trace, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write a native trace, whole or not at all; equal traces give equal bytes.

    `load` gives the trace back unchanged. Raises TraceError if the file is there and may not be overwritten.
    """
    write_lines(path, to_lines(trace), overwrite=overwrite)


def json_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) of a JSONL file. Raises TraceError where a line is not one JSON object."""
    for number, line in numbered_lines(path):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise TraceError(f"{path}:{number}: not JSON: {reason}") from None
        if not isinstance(row, dict):
            raise TraceError(f"{path}:{number}: not a JSON object but {type(row).__name__}")
        yield number, row


def trace_name(path: str | os.PathLike[str]) -> str:
    """Return a file's name without its folder and endings."""
    name = Path(path).name
    for ending in (".gz", ".jsonl", ".csv", ".json"):
        name = name.removesuffix(ending)
    return name


def to_lines(trace: Trace) -> Iterator[str]:
    """Yield the lines of the native file, without their ends."""
    encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
    for first in range(0, len(trace), ROWS_AT_ONCE):
        for row in _rows(trace.columns, slice(first, first + ROWS_AT_ONCE)):
            yield encode(row)


def _rows(columns: TraceColumns, rows: slice) -> Iterator[dict[str, Any]]:
    """Yield some rows as the file holds them; all at once as Python numbers would take 100 bytes each."""
    arrivals = columns.arrival_s[rows].tolist()
    raw = None if columns.raw_arrival_s is None else columns.raw_arrival_s[rows].tolist()
    prompts, outputs = columns.prompt_tokens[rows].tolist(), columns.output_tokens[rows].tolist()
    sessions, blocks = columns.sessions, columns.prefix_blocks
    for i, adapter in enumerate(columns.adapter_index[rows].tolist()):
        place = rows.start + i
        row: dict[str, Any] = {"id": columns.ids[place], "arrival_s": arrivals[i] if raw is None else raw[i]}
        if raw is not None:
            row["arrival_spread_s"] = arrivals[i]
        row |= {"prompt_tokens": prompts[i], "output_tokens": outputs[i]}
        if adapter >= 0:
            row["adapter"] = columns.adapter_names[adapter]
            if columns.adapter_ranks[adapter] is not None:
                row["rank"] = columns.adapter_ranks[adapter]
        if sessions is not None and sessions[place] is not None:
            row["session"] = sessions[place]
        if blocks is not None and blocks[place] is not None:
            row["prefix_blocks"] = blocks[place]
        yield row
