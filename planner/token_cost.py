"""What tokens cost: a price per GPU-hour over what a configuration makes in an hour."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np

from traces import Trace

MILLION = 1e6
HOUR_S = 3600.0
CHOICES = ("recommended", "fewest_gpus", "nearest_miss")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCost:
    """US dollars: an hour, and per million tokens at a rate. output: of generated tokens alone; all: prompt and generated ones."""

    usd_per_hour: float
    rate_rps: float
    usd_per_million_output: float
    usd_per_million_all: float


def token_cost(trace: Trace, gpus: int, rate_rps: float, usd_per_gpu_hour: float) -> TokenCost | None:
    """Return what tokens cost where `gpus` GPUs serve requests like the trace's at a rate; None where the rate is 0."""
    if rate_rps <= 0:
        return None
    usd_per_hour = gpus * usd_per_gpu_hour
    output = float(np.mean(trace.columns.output_tokens))
    prompt = float(np.mean(trace.columns.prompt_tokens))
    hourly = rate_rps * HOUR_S / MILLION
    return TokenCost(
        usd_per_hour=usd_per_hour,
        rate_rps=rate_rps,
        usd_per_million_output=usd_per_hour / (hourly * output),
        usd_per_million_all=usd_per_hour / (hourly * (output + prompt)),
    )


def with_price(plan: Mapping[str, Any], usd_per_gpu_hour: float | None) -> dict[str, Any]:
    """Return a plan's JSON form with its hourly costs by another price; a price changes nothing else of a plan."""
    priced = deepcopy(dict(plan))
    for choice in (*(priced[name] for name in CHOICES), *priced["alternatives"]):
        if choice is not None:
            gpus = choice["config"]["tp"] * choice["config"]["replicas"]
            choice["cost_usd_per_hour"] = None if usd_per_gpu_hour is None else gpus * usd_per_gpu_hour
    return priced
