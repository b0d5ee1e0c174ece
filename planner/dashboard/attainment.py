"""The page SLO against rate: where the knee is and how much headroom there is before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import altair as alt
import streamlit as st

from planner.chart_rows import curve_rows, interval, latency_rows, percent, span
from planner.dashboard import charts
from planner.dashboard.answers import answer_for
from planner.dashboard.choose import choose_config
from planner.dashboard.state import Current

LATENCIES = ("Time to first token, p95", "Time per output token, p95")
LABEL_SHARE = 0.15  # of a chart's width
CUT = 2  # latencies are drawn up to so many times their bound
RATE = "requests/s, the whole configuration"


def draw(current: Current) -> None:
    """Draw the page."""
    st.title("SLO against rate", anchor=False)
    st.caption(
        "How many requests keep the promise as the same traffic comes faster, and where that ends: the knee."
    )
    config = choose_config(current, "attainment")
    curve = answer_for(current.task("curve", config))
    if curve is None:
        return
    _numbers(curve, current)
    wanted_pct = current.scenario.attainment_pct
    rows = curve_rows(curve)
    charts.show(
        _attainment(rows, curve, wanted_pct),
        "attainment",
        "Share of requests that meet the SLO against the request rate",
    )
    slo = current.scenario.slo
    latencies = latency_rows(curve, {"ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s})
    for column, metric in zip(st.columns(2), LATENCIES, strict=True):
        with column:
            mine = [row for row in latencies if row["metric"] == metric]
            charts.show(_latency(mine, curve, metric), metric, f"{metric} against the request rate")
    st.caption(
        "Bands: where the prediction should lie. Triangles: some steps lie beyond what was measured, so the costs are extrapolated. "
        f"Shaded: rates that cannot be sustained. Latencies are cut at {CUT} times their bound."
    )


def _numbers(curve: Mapping[str, Any], current: Current) -> None:
    columns = st.columns(3)
    columns[0].metric(
        "Knee: highest rate that keeps the promise",
        interval(curve["knee_rps"], 1, "requests/s"),
        span(curve["knee_rps"], 1),
        delta_color="off",
        delta_arrow="off",
    )
    columns[1].metric("The trace's rate", f"{curve['trace_rps']:.2f} requests/s")
    headroom = percent(curve["headroom"])
    columns[2].metric(
        "Headroom",
        "–" if headroom is None else f"{headroom:+,.0f} %",
        help="How much the trace's rate can grow before the promise is broken; below 0 it is broken already.",
    )


def _points(rows: list[dict[str, Any]], y: str, title: str, scale: alt.Scale) -> alt.LayerChart:
    base = alt.Chart(charts.frame(rows))
    x = alt.X("rate_rps:Q", title=RATE, scale=alt.Scale(zero=True))
    vertical = alt.Y(f"{y}:Q", title=title, scale=scale)
    tooltip = [
        alt.Tooltip("rate_rps:Q", title="requests/s", format=".2f"),
        alt.Tooltip(f"{y}:Q", title=title, format=".3s"),
        alt.Tooltip(_low(y), title="at least", format=".3s"),
        alt.Tooltip(_high(y), title="at most", format=".3s"),
        alt.Tooltip("provenance:N", title="costs rest on"),
    ]
    band = base.mark_area(color=charts.SKY, opacity=0.3, clip=True).encode(
        x=x, y=alt.Y(_low(y), title=title, scale=scale), y2=alt.Y2(_high(y).removesuffix(":Q"))
    )
    line = base.mark_line(color=charts.BLUE, strokeWidth=2, clip=True).encode(x=x, y=vertical)
    points = base.mark_point(color=charts.BLUE, filled=True, size=70, clip=True).encode(
        x=x,
        y=vertical,
        shape=alt.Shape("provenance:N", scale=charts.PROVENANCE_SHAPE, legend=charts.legend("costs are")),
        tooltip=tooltip,
    )
    return band + line + points


def _low(y: str) -> str:
    return "low:Q" if y == "ms" else f"{y}_low:Q"


def _high(y: str) -> str:
    return "high:Q" if y == "ms" else f"{y}_high:Q"


def _span(curve: Mapping[str, Any]) -> tuple[float, float]:
    """Return the rates that are too high."""
    most = max(point["rate_rps"] for point in curve["points"])
    return (min(curve["knee_rps"]["value"], most), most)


def _crossing_label(curve: Mapping[str, Any]) -> float | None:
    """Return the trace's rate where its upright line would cross a label at the chart's left edge."""
    share = curve["trace_rps"] / max(point["rate_rps"] for point in curve["points"])
    return float(curve["trace_rps"]) if share < LABEL_SHARE else None


def _attainment(rows: list[dict[str, Any]], curve: Mapping[str, Any], wanted_pct: float) -> charts.Chart:
    return alt.layer(
        charts.shaded(x=_span(curve)),
        _points(rows, "attainment_pct", "requests that meet the SLO, %", alt.Scale(domain=[0, 102])),
        charts.slo_line(
            wanted_pct, f"promised: {wanted_pct:g} %", below=True, right_of=_crossing_label(curve)
        ),
        charts.mark_line(curve["trace_rps"], "the trace's rate", charts.GREEN, row=1),
        charts.mark_line(curve["knee_rps"]["value"], "knee", charts.RED),
    ).properties(height=charts.HEIGHT)


def _latency(rows: list[dict[str, Any]], curve: Mapping[str, Any], metric: str) -> charts.Chart:
    bound_ms = rows[0]["bound_ms"]
    scale = alt.Scale(domain=[0, CUT * bound_ms])
    return alt.layer(
        charts.shaded(x=_span(curve)),
        _points(rows, "ms", f"{metric}, ms", scale),
        charts.slo_line(bound_ms, f"bound: {bound_ms:g} ms"),
    ).properties(height=320)
