"""Two configurations side by side, metric by metric."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Better = Literal["left", "right", "equal", "unsure"]

# Metric -> its name, its unit, what it is multiplied by to be in that unit, and whether more is better.
METRICS: dict[str, tuple[str, str, float, bool]] = {
    "sustainable_rps": ("highest sustainable rate", "requests/s", 1.0, True),
    "slo_attainment": ("requests that meet the SLO", "%", 100.0, True),
    "ttft_p50_s": ("time to first token, median", "ms", 1e3, False),
    "ttft_p95_s": ("time to first token, p95", "ms", 1e3, False),
    "ttft_p99_s": ("time to first token, p99", "ms", 1e3, False),
    "tpot_p50_s": ("time per output token, median", "ms", 1e3, False),
    "tpot_p95_s": ("time per output token, p95", "ms", 1e3, False),
    "tpot_p99_s": ("time per output token, p99", "ms", 1e3, False),
    "e2e_p50_s": ("whole request, median", "s", 1.0, False),
    "e2e_p95_s": ("whole request, p95", "s", 1.0, False),
    "output_tokens_per_s": ("output tokens a second", "tokens/s", 1.0, True),
    "adapter_hit_rate": ("requests that find their adapter loaded", "%", 100.0, True),
    "adapter_loads": ("adapter loads", "", 1.0, False),
    "preemptions": ("preemptions", "", 1.0, False),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One metric of both. change_pct: right over left − 1, None where it cannot be told. better: unsure where the intervals overlap."""

    metric: str
    unit: str
    left: float | None
    left_low: float | None
    left_high: float | None
    right: float | None
    right_low: float | None
    right_high: float | None
    change_pct: float | None
    better: Better


def compare(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Compare two choices of plans in their JSON form."""
    return [
        asdict(_row(left["predicted"].get(name), right["predicted"].get(name), *said))
        for name, said in METRICS.items()
        if name in left["predicted"] or name in right["predicted"]
    ]


def _row(
    left: Mapping[str, Any] | None,
    right: Mapping[str, Any] | None,
    name: str,
    unit: str,
    factor: float,
    more: bool,
) -> Row:
    a, b = _numbers(left, factor), _numbers(right, factor)
    change = 100 * (b[0] / a[0] - 1) if a[0] and b[0] is not None else None
    return Row(
        metric=name,
        unit=unit,
        left=a[0],
        left_low=a[1],
        left_high=a[2],
        right=b[0],
        right_low=b[1],
        right_high=b[2],
        change_pct=change,
        better=_better(a, b, more),
    )


def _numbers(
    prediction: Mapping[str, Any] | None, factor: float
) -> tuple[float | None, float | None, float | None]:
    if prediction is None:
        return None, None, None
    value, low, high = (
        None if prediction[name] is None else prediction[name] * factor for name in ("value", "low", "high")
    )
    return value, low, high


def _better(
    a: tuple[float | None, float | None, float | None],
    b: tuple[float | None, float | None, float | None],
    more: bool,
) -> Better:
    if a[0] is None or b[0] is None or a[1] is None or a[2] is None or b[1] is None or b[2] is None:
        return "unsure"
    if a[0] == b[0]:
        return "equal"
    if a[1] <= b[2] and b[1] <= a[2]:
        return "unsure"
    return "left" if (a[0] > b[0]) == more else "right"
