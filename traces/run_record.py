"""Run records: what the engine did with a trace, request by request and step by step.

A record is a folder: `run.json` (configuration, hardware, versions, totals), `requests.jsonl.gz` (one object
a request) and `steps.jsonl.gz` (the first line names the columns, every other line is one step's values in
that order: a tenth of the size of objects). Floats are rounded to a microsecond (in
`run.json`: not).
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from traces.errors import TraceError
from traces.files import check_writable, numbered_lines, os_reason, read_text, write_lines
from traces.native import json_lines

RUN_FILE, REQUESTS_FILE, STEPS_FILE = "run.json", "requests.jsonl.gz", "steps.jsonl.gz"

REQUEST_COLUMNS = (
    "id",
    "arrival_s",
    "scheduled_s",
    "first_token_s",
    "finish_s",
    "prompt_tokens",
    "output_tokens",
    "adapter",
    "rank",
    "load_wait_s",
    "preemptions",
    "cached_tokens",
)
COLUMNS_SINCE = {"cached_tokens": 0}  # columns that older records do not have -> what they are there


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RunRecord:
    """One replay.

    `run`: configuration, hardware, versions, commit, backend, totals. `requests`: one row a request with at
    least REQUEST_COLUMNS, times in seconds from the trace's start, NaN where it did not come to that; also
    `prefix_blocks` where the trace has them.
    `steps`: one row a step, scalars and short lists.
    """

    run: dict[str, Any]
    requests: pd.DataFrame
    steps: pd.DataFrame

    def __post_init__(self) -> None:
        missing = [name for name in REQUEST_COLUMNS if name not in self.requests.columns]
        if missing:
            raise TraceError(f"requests of a run record must have the column {missing[0]}")


def write_run(path: str | os.PathLike[str], record: RunRecord) -> None:
    """Write a record as a folder, whole or not at all.

    Raises TraceError if the folder is there and not empty, or if it cannot be written.
    """
    folder = Path(path)
    check_free(folder)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        write_lines(
            temporary / RUN_FILE, [json.dumps(_plain(record.run, digits=15), indent=2, allow_nan=False)]
        )
        write_lines(temporary / REQUESTS_FILE, _object_lines(record.requests))
        write_lines(temporary / STEPS_FILE, _table_lines(record.steps))
        os.replace(temporary, folder)
    except OSError as error:
        raise TraceError(f"{folder}: cannot be written: {os_reason(error)}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_free(folder: Path) -> None:
    """Raise TraceError unless a record may be written here: nothing there yet, or an empty folder.

    A replay calls it before it starts, so that a minute on the GPU is not lost at its end.
    """
    if folder.is_dir():
        if any(folder.iterdir()):
            raise TraceError(f"{folder}: the output folder is not empty")
    elif folder.exists():
        raise TraceError(f"{folder}: is a file, not a folder")
    check_writable(folder)


def read_run(path: str | os.PathLike[str]) -> RunRecord:
    """Read a record. Raises TraceError naming the file, and the line where one is wrong."""
    folder = Path(path)
    if not folder.is_dir():
        raise TraceError(f"{folder}: no such run record")
    rows = [row for _, row in json_lines(folder / REQUESTS_FILE)]
    requests = pd.DataFrame(rows) if rows else pd.DataFrame(columns=pd.Index(REQUEST_COLUMNS))
    for name, value in COLUMNS_SINCE.items():
        if name not in requests.columns:
            requests[name] = value
    missing = [name for name in REQUEST_COLUMNS if name not in requests.columns]
    if missing:
        raise TraceError(f"{folder / REQUESTS_FILE}: column {missing[0]} is missing")
    _check_numbers(folder / REQUESTS_FILE, requests)
    return RunRecord(
        run=_read_run_file(folder / RUN_FILE), requests=requests, steps=_read_table(folder / STEPS_FILE)
    )


def _check_numbers(path: Path, requests: pd.DataFrame) -> None:
    """Raise TraceError where a column that must hold numbers does not, or a count is missing or not whole."""
    for name in REQUEST_COLUMNS:
        if name in ("id", "adapter"):
            continue
        for position, value in enumerate(requests[name].tolist()):
            missing = value is None or value != value
            number = isinstance(value, int | float) and not isinstance(value, bool)
            counts = name in ("prompt_tokens", "output_tokens", "preemptions", "cached_tokens")
            whole = not counts or (number and not missing and float(value).is_integer())
            if not (number or missing) or not whole or (missing and name == "arrival_s"):
                raise TraceError(f"{path}:{position + 1}: {name} has a wrong value: {value!r}")


def find_runs(folder: str | os.PathLike[str]) -> list[Path]:
    """Return the folders at or below this one that hold a run record, sorted by path.

    Folders whose name begins with a dot are passed over: a record is written in one before it is in its
    place.
    """
    root = Path(folder)
    if not root.is_dir():
        raise TraceError(f"{root}: no such folder")
    found = (file.parent for file in root.rglob(RUN_FILE))
    return sorted(
        run for run in found if not any(part.startswith(".") for part in run.relative_to(root).parts)
    )


def _object_lines(frame: pd.DataFrame) -> Iterator[str]:
    columns = [str(column) for column in frame.columns]
    for row in _rows(frame):
        yield _encode(dict(zip(columns, row, strict=True)))


def _table_lines(frame: pd.DataFrame) -> Iterator[str]:
    yield _encode({"columns": [str(column) for column in frame.columns]})
    for row in _rows(frame):
        yield _encode(row)


def _rows(frame: pd.DataFrame) -> Iterator[list[Any]]:
    columns = [[_plain(value) for value in frame[column].tolist()] for column in frame.columns]
    return (list(row) for row in zip(*columns, strict=True))


def _encode(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _plain(value: Any, digits: int = 6) -> Any:
    """Return a value as JSON holds it: numpy unwrapped, floats rounded, NaN and missing as null."""
    if isinstance(value, dict):
        return {str(key): _plain(item, digits) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, digits) for item in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist(), digits)
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return round(value, digits) if math.isfinite(value) else None
    return None if value is pd.NA or value is pd.NaT else value


def _read_run_file(path: Path) -> dict[str, Any]:
    try:
        run = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise error if isinstance(error, TraceError) else TraceError(f"{path}: not JSON: {error}") from None
    if not isinstance(run, dict):
        raise TraceError(f"{path}: not a JSON object but {type(run).__name__}")
    return run


def _read_table(path: Path) -> pd.DataFrame:
    lines = list(numbered_lines(path))
    if not lines:
        raise TraceError(f"{path}: is empty: its first line must name the columns")
    values: list[Any] = []
    for number, line in lines:
        try:
            values.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise TraceError(f"{path}:{number}: not JSON: {error}") from None
    header = values[0].get("columns") if isinstance(values[0], dict) else None
    if not isinstance(header, list):
        raise TraceError(f"{path}:{lines[0][0]}: must be an object with the list `columns`")
    for (number, _), row in zip(lines[1:], values[1:], strict=True):
        if not isinstance(row, list) or len(row) != len(header):
            raise TraceError(f"{path}:{number}: must be a list of {len(header)} values")
    return pd.DataFrame(values[1:], columns=pd.Index(header))
