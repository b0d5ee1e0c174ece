"""Reads the lines of measured-vLLM files, with the place in every complaint."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from engine.errors import UserError

Row = Mapping[str, Any]


def read_lines(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield (place, object) of each line of a JSONL file. Raises UserError naming file and line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UserError(f"{path}: cannot be read: {reason}") from None
    for count, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        place = f"{path}:{count}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{place}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"{place}: must be an object")
        yield place, row


def number(row: Row, name: str, place: str) -> float:
    """Return a finite number of at least 0. Raises UserError naming place and field."""
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise UserError(f"{place}: {name}={value!r} must be a number of at least 0")
    return float(value)


def part(row: Row, name: str, place: str) -> Row:
    """Return an object within an object. Raises UserError naming place and field."""
    value = row.get(name)
    if not isinstance(value, dict):
        raise UserError(f"{place}: {name} must be an object")
    return value
