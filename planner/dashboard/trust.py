"""The page Trust: predictions against every recorded run, and where the scenario lies in what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import altair as alt
import streamlit as st

from planner.chart_rows import percent
from planner.dashboard import charts
from planner.dashboard.answers import answer_for
from planner.dashboard.choose import choose_config
from planner.dashboard.state import Current

LEVELS = ["under 50 %", "50 to 80 %", "80 to 95 %", "95 % and more"]
LEVEL_COLOURS = [charts.BLUE, charts.ORANGE, charts.GREEN, charts.RED]
LEVEL_SHAPES = ["circle", "square", "triangle-up", "diamond"]


def draw(current: Current) -> None:
    """Draw the page."""
    st.title("Trust", anchor=False)
    st.caption(
        "Runs recorded on real GPUs, simulated again from the same requests. Costs are fitted to a profile of single steps; "
        "no recorded run was used to fit them."
    )
    recorded = answer_for(current.task("trust"))
    if recorded is not None:
        _recorded(recorded)
    st.subheader("Is this scenario within what was measured?", anchor=False)
    config = choose_config(current, "trust")
    placed = answer_for(current.task("domain", config))
    if placed is not None:
        _domain(placed)


def _recorded(recorded: Mapping[str, Any]) -> None:
    columns = st.columns(3)
    columns[0].metric("Recorded runs", recorded["runs"])
    for column, band in zip(columns[1:], recorded["within"], strict=True):
        share = percent(band["share"])
        column.metric(
            f"Numbers within ±{band['band_pct']:g} %",
            "–" if share is None else f"{share:.0f} %",
            help=f"Of {band['rows']} numbers: throughput and the median, p95 and p99 of latencies in every run.",
        )
    families = list(recorded["lines"])
    halves = st.columns(2)
    for place, family in enumerate(families):
        with halves[place % len(halves)]:
            charts.show(
                _scatter(recorded, family), f"scatter_{family}", f"{family}: predicted against measured"
            )
    st.caption(
        "Each point is one number of one run: on the line it was predicted exactly. Inner band: ±5 %; outer band: ±10 %. "
        "TTFT: time to first token; TPOT: time per output token; p50, p95, p99: so many of 100 requests are faster; "
        "load: the rate over what the configuration can do."
    )
    charts.show(_bias(recorded["bias"]), "bias", "Mean signed error by metric and load")
    with st.expander("All numbers"):
        _numbers(recorded["rows"])


def _numbers(rows: list[dict[str, Any]]) -> None:
    columns = ["run", "name", "load_level", "measured", "predicted", "error_pct", "unit"]
    st.dataframe(
        charts.frame(rows)[columns],
        hide_index=True,
        column_config={
            "name": "number",
            "load_level": "load",
            "measured": st.column_config.NumberColumn(format="%.2f"),
            "predicted": st.column_config.NumberColumn(format="%.2f"),
            "error_pct": st.column_config.NumberColumn("error, %", format="%+.1f"),
        },
        key="recorded",
    )


def _scatter(recorded: Mapping[str, Any], family: str) -> charts.Chart:
    rows = [row for row in recorded["rows"] if row["family"] == family]
    unit = rows[0]["unit"]
    lines = charts.frame(recorded["lines"][family])
    scale = alt.Scale(type="log", nice=False)
    x = alt.X("measured:Q", title=f"measured, {unit}", scale=scale, axis=alt.Axis(tickCount=5, format="~s"))
    base = alt.Chart(lines)
    title = f"predicted, {unit}"
    layers = [
        base.mark_area(color=charts.GREY, opacity=opacity).encode(
            x=x,
            y=alt.Y(f"low{band}:Q", title=title, scale=scale, axis=alt.Axis(tickCount=5, format="~s")),
            y2=alt.Y2(f"high{band}"),
        )
        for band, opacity in ((10, 0.18), (5, 0.3))
    ]
    equal = base.mark_line(color=charts.GREY, strokeWidth=1).encode(x=x, y=alt.Y("equal:Q", scale=scale))
    points = (
        alt.Chart(charts.frame(rows))
        .mark_point(filled=True, size=60, opacity=0.9)
        .encode(
            x=x,
            y=alt.Y("predicted:Q", title=title, scale=scale),
            color=alt.Color(
                "load_level:N",
                scale=alt.Scale(domain=LEVELS, range=LEVEL_COLOURS),
                legend=charts.legend("load", columns=2),
            ),
            shape=alt.Shape("load_level:N", scale=alt.Scale(domain=LEVELS, range=LEVEL_SHAPES)),
            tooltip=[
                alt.Tooltip("run:N"),
                alt.Tooltip("name:N", title="number"),
                alt.Tooltip("measured:Q", format=".2f"),
                alt.Tooltip("predicted:Q", format=".2f"),
                alt.Tooltip("error_pct:Q", title="error, %", format="+.1f"),
                alt.Tooltip("load_level:N", title="load"),
            ],
        )
    )
    return alt.layer(*layers, equal, points).properties(height=360, title=family)


def _bias(rows: list[dict[str, Any]]) -> charts.Chart:
    base = alt.Chart(charts.frame(rows), title="Bias: mean signed error, %")
    x = alt.X("metric:N", title=None, sort=None, axis=alt.Axis(labelAngle=-30, labelOverlap=False))
    bars = base.mark_bar().encode(
        x=x,
        xOffset=alt.XOffset("load_level:N", sort=LEVELS),
        y=alt.Y("bias_pct:Q", title="above 0: predicted too much"),
        color=alt.Color(
            "load_level:N", scale=alt.Scale(domain=LEVELS, range=LEVEL_COLOURS), legend=charts.legend("load")
        ),
        tooltip=[
            alt.Tooltip("metric:N"),
            alt.Tooltip("load_level:N", title="load"),
            alt.Tooltip("bias_pct:Q", title="mean signed error, %", format="+.1f"),
            alt.Tooltip("median_abs_error_pct:Q", title="median error, %", format=".1f"),
            alt.Tooltip("worst_abs_error_pct:Q", title="worst error, %", format=".1f"),
        ],
    )
    bands = [charts.shaded(y=(-band, band), colour=charts.GREY) for band in (10, 5)]
    return alt.layer(*bands, bars).properties(height=380)


def _domain(placed: Mapping[str, Any]) -> None:
    facts = placed["profile"]
    said = f"Costs come from a profile of {facts['model']} on {facts['gpu']}, {facts['date']}, commit {facts['commit']}."
    st.caption(said)
    if not facts["same_gpu"]:
        st.warning("The scenario's kind of GPU was not measured: all costs are scaled by specification.")
    if not facts["same_model"]:
        st.warning(
            "The scenario's model was not measured: its costs are composed from another model's operators."
        )
    columns = st.columns(4)
    columns[0].metric("Steps simulated", f"{placed['steps']:,}")
    for column, row in zip(columns[1:], placed["shares"], strict=True):
        column.metric(f"Steps with {row['provenance']} costs", f"{percent(row['share']):.2f} %")
    charts.show(
        _extents(placed["extents"]), "extents", "The scenario's steps against the largest sizes measured"
    )
    st.caption(
        "For each size of a step: the median (circle), 95th percentile (square) and largest (triangle) over the scenario's steps, in "
        "percent of the largest that was measured. Shaded: beyond what was measured, where costs are extrapolated."
    )


def _extents(rows: list[dict[str, Any]]) -> charts.Chart:
    base = alt.Chart(charts.frame(rows))
    y = alt.Y("size:N", sort=None, title=None, axis=alt.Axis(labelLimit=260))
    domain = [0, max(115.0, *(row["most_pct"] for row in rows))]
    scale = alt.Scale(domain=domain, nice=False)
    tooltip = [
        alt.Tooltip("size:N"),
        alt.Tooltip("p50:Q", title="median", format=".3s"),
        alt.Tooltip("p95:Q", title="95th percentile", format=".3s"),
        alt.Tooltip("most:Q", title="largest", format=".3s"),
        alt.Tooltip("measured:Q", title="measured up to", format=".3s"),
        alt.Tooltip("beyond:Q", title="steps beyond", format=".2%"),
    ]
    title = "% of the largest size measured"
    rule = base.mark_rule(color=charts.GREY, strokeWidth=2).encode(
        x=alt.X("p50_pct:Q", title=title, scale=scale), x2=alt.X2("most_pct"), y=y
    )
    marks = [
        base.mark_point(filled=True, size=90, shape=shape, color=colour).encode(
            x=alt.X(f"{column}:Q", title=title, scale=scale), y=y, tooltip=tooltip
        )
        for column, shape, colour in (
            ("p50_pct", "circle", charts.BLUE),
            ("p95_pct", "square", charts.ORANGE),
            ("most_pct", "triangle-up", charts.RED),
        )
    ]
    beyond = charts.shaded(x=(100, domain[1]))
    return alt.layer(beyond, rule, *marks).properties(height=40 * len(rows) + 80)
