"""JSON from files that users give: whatever is wrong with it is one UserError that names the place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.errors import UserError


def read_json(path: str | Path) -> Any:
    """Return what a JSON file holds. Raises UserError naming the file where it cannot be read or parsed."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", path=path) from None
    except UnicodeDecodeError:
        raise UserError("not UTF-8", path=path) from None
    try:
        return parse_json(text)
    except UserError as error:
        raise UserError(f"{error}", path=path) from None


def parse_json(text: str) -> Any:
    """Return the value of a JSON text. Raises UserError, also where it is nested too deeply or a number too long to read."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON: {' '.join(str(error).split())}") from None
