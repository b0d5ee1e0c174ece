"""Typed fields out of a client's JSON object; whatever is wrong is a 400 that names the field."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

from engine.server.errors import ApiError, invalid

MAX_SHOWN = 80


def parse_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object of a request's body. Raises a 400 for anything else."""
    try:
        data = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        raise invalid("the body is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise invalid(f"the body is not JSON: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(data, dict):
        raise invalid(f"the body must be a JSON object, not {_type_of(data)}")
    return data


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def bad_field(name: str, problem: str) -> ApiError:
    """Return the 400 for a field."""
    return invalid(f"{name} {problem}", name)


def show(value: Any) -> str:
    """Return a value as JSON, cut to a length that is fit for an error."""
    try:
        text = json.dumps(value)
    except RecursionError:
        return "a deeply nested value"
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


def text(name: str, value: Any) -> str:
    """Return a text. Lone surrogates, which no UTF-8 has, are refused."""
    if not isinstance(value, str):
        raise bad_field(name, f"must be a string, not {_type_of(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise bad_field(name, "holds a lone surrogate, which is not text") from None
    return value


def boolean(data: Mapping[str, Any], name: str, default: bool = False) -> bool:
    """Return a field that is true or false."""
    value = data.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise bad_field(name, f"must be true or false, not {show(value)}")
    return value


def integer(data: Mapping[str, Any], name: str, low: int, high: int) -> int | None:
    """Return a whole number in low..high, None where it is not given."""
    value = data.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise bad_field(name, f"must be a whole number, not {show(value)}")
    if not low <= value <= high:
        raise bad_field(name, f"must be in {low}..{high}, not {show(value)}")
    return value


def number(data: Mapping[str, Any], name: str, default: float) -> float:
    """Return a finite number."""
    value = data.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise bad_field(name, f"must be a number, not {show(value)}")
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    if not math.isfinite(result):
        raise bad_field(name, "must be finite")
    return result


def _type_of(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
