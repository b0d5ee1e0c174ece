"""What a GPU costs an hour: data, from a file that is there to be edited."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from engine.errors import UserError

EXAMPLES = Path(__file__).parent / "prices.json"


def load_prices(path: Path | None) -> dict[str, float]:
    """Read US dollars per GPU-hour by kind of GPU; None: the examples that ship. Raises UserError."""
    path = path or EXAMPLES
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    prices = data.get("usd_per_gpu_hour") if isinstance(data, dict) else None
    if not isinstance(prices, dict):
        raise UserError(f"{path}: must be an object with usd_per_gpu_hour, prices by kind of GPU")
    for gpu, price in prices.items():
        known = isinstance(price, (int, float)) and not isinstance(price, bool)
        if not known or not math.isfinite(price) or price < 0:
            raise UserError(f"{path}: usd_per_gpu_hour: {gpu}={price!r} must be a number of at least 0")
    return {gpu.lower(): float(price) for gpu, price in prices.items()}
