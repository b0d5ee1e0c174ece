"""Predicted over measured as an SVG: a panel a metric, a dot a run, by load level; drawn by hand so that no plotting library is needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from math import ceil, floor, log10
from typing import Any

PANELS = (
    ("throughput_rps", "throughput, req/s", 1.0),
    ("ttft_p50_s", "TTFT p50, ms", 1e3),
    ("ttft_p99_s", "TTFT p99, ms", 1e3),
    ("tpot_p50_s", "TPOT p50, ms", 1e3),
    ("e2e_p95_s", "E2E p95, s", 1.0),
)
# Colours that are told apart without red and green (Okabe and Ito).
COLOURS = {"under50": "#56b4e9", "50to80": "#0072b2", "80to95": "#e69f00", "saturated": "#d55e00"}
SIZE, GAP, TOP = 190, 58, 54  # of a panel, between panels, above them
BAND = 0.1  # drawn around equality


def validation_svg(rows: Sequence[Mapping[str, Any]]) -> str:
    """Draw the rows of `sim validate`; intervals as vertical lines where they are there."""
    width, height = len(PANELS) * (SIZE + GAP) + GAP, TOP + SIZE + 48
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{GAP}" y="18" font-size="13">Predicted (vertical) against measured (horizontal); '
        f"grey: ±{BAND:.0%}; lines: 90 % intervals</text>",
    ]
    lines += _legend(width)
    for number, (metric, title, unit) in enumerate(PANELS):
        lines += _panel(
            GAP + number * (SIZE + GAP), [row for row in rows if row["metric"] == metric], title, unit
        )
    return "\n".join([*lines, "</svg>"]) + "\n"


def _legend(width: int) -> Iterator[str]:
    x = width - 96 * len(COLOURS) - 10
    for level, colour in COLOURS.items():
        yield f'<circle cx="{x}" cy="14" r="4" fill="{colour}"/><text x="{x + 8}" y="18">{level}</text>'
        x += 96


def _panel(left: float, rows: Sequence[Mapping[str, Any]], title: str, unit: float) -> Iterator[str]:
    points = [row for row in rows if row["measured"] and row["predicted"]]
    yield f'<text x="{left + SIZE / 2}" y="{TOP - 8}" text-anchor="middle">{escape(title)}</text>'
    yield f'<rect x="{left}" y="{TOP}" width="{SIZE}" height="{SIZE}" fill="none" stroke="#888"/>'
    if not points:
        return
    values = [unit * row[name] for row in points for name in ("measured", "predicted")]
    low, high = log10(min(values)) - 0.08, log10(max(values)) + 0.08

    def x(value: float) -> float:
        return left + SIZE * (log10(value) - low) / (high - low)

    def y(value: float) -> float:
        return TOP + SIZE * (1 - (log10(value) - low) / (high - low))

    a, b = 10**low, 10**high
    band = [(a, a * (1 - BAND)), (a, a * (1 + BAND)), (b, b * (1 + BAND)), (b, b * (1 - BAND))]
    corners = " ".join(f"{x(one):.1f},{y(other):.1f}" for one, other in band)
    clip = f"clip{left:.0f}"
    yield f'<clipPath id="{clip}"><rect x="{left}" y="{TOP}" width="{SIZE}" height="{SIZE}"/></clipPath>'
    yield f'<polygon points="{corners}" fill="#eee" clip-path="url(#{clip})"/>'
    yield f'<line x1="{x(a):.1f}" y1="{y(a):.1f}" x2="{x(b):.1f}" y2="{y(b):.1f}" stroke="#aaa"/>'
    for tick in _ticks(low, high):
        yield f'<text x="{x(tick):.1f}" y="{TOP + SIZE + 14}" text-anchor="middle" fill="#444">{tick:g}</text>'
        yield f'<text x="{left - 4}" y="{y(tick) + 4:.1f}" text-anchor="end" fill="#444">{tick:g}</text>'
    for row in points:
        colour = COLOURS.get(row["load_level"], "#000")
        at, to = x(unit * row["measured"]), y(unit * row["predicted"])
        ends = row.get("stretched_low") or row.get("low"), row.get("stretched_high") or row.get("high")
        if ends[0] and ends[1]:
            yield (
                f'<line x1="{at:.1f}" y1="{y(unit * ends[0]):.1f}" x2="{at:.1f}" y2="{y(unit * ends[1]):.1f}" '
                f'stroke="{colour}" stroke-opacity="0.4" clip-path="url(#{clip})"/>'
            )
        yield f'<circle cx="{at:.1f}" cy="{to:.1f}" r="3.5" fill="{colour}"><title>{escape(row["run"])}</title></circle>'


def _ticks(low: float, high: float) -> list[float]:
    found = [
        mantissa * 10.0**exponent
        for exponent in range(floor(low), ceil(high) + 1)
        for mantissa in ((1, 2, 5) if high - low > 0.8 else (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9))
        if low <= log10(mantissa * 10.0**exponent) <= high
    ]
    return found[:: max(1, ceil(len(found) / 5))]
