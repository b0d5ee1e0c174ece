"""The page Adapters × rank: how many adapters of which rank a GPU serves."""

from __future__ import annotations

from typing import Any

import altair as alt
import streamlit as st

from planner.chart_rows import grid_rows
from planner.dashboard import charts
from planner.dashboard.answers import answer_for
from planner.dashboard.choose import choose_config
from planner.dashboard.state import Current


def draw(current: Current) -> None:
    """Draw the page."""
    st.title("Adapters × rank", anchor=False)
    st.caption(
        "The highest rate for each GPU that keeps the promise, if the trace's busiest requests asked for so many adapters of one rank, "
        "as unevenly as they do now. One replica of the configuration."
    )
    config = choose_config(current, "grid")
    answer = answer_for(current.task("grid", config))
    if answer is None:
        return
    rows = grid_rows(answer["cells"])
    charts.show(_heat(rows), "grid", "Requests a second per GPU by number of adapters and rank")
    st.caption(
        "Bold frame: nearest to this trace. Crossed out: no rate keeps the promise, or the configuration cannot run; hover to see why. "
        "“Memory of all”: what all adapters together would take of the GPU's pages; above 100 % they take turns."
    )
    st.dataframe(
        charts.frame(rows)[["adapters", "rank", "rps_per_gpu", "pool_pct", "why"]],
        hide_index=True,
        column_config={
            "rps_per_gpu": st.column_config.NumberColumn("requests/s per GPU", format="%.2f"),
            "pool_pct": st.column_config.NumberColumn("memory of all, % of the pages", format="%.1f"),
            "why": "verdict",
        },
        key="grid_table",
    )


def _heat(rows: list[dict[str, Any]]) -> charts.Chart:
    base = alt.Chart(charts.frame(rows))
    x = alt.X("adapters:O", title="adapters", axis=alt.Axis(labelAngle=0, format=","))
    y = alt.Y("rank:O", title="rank", sort="descending")
    tooltip = [
        alt.Tooltip("adapters:O"),
        alt.Tooltip("rank:O"),
        alt.Tooltip("rps_per_gpu:Q", title="requests/s per GPU", format=".2f"),
        alt.Tooltip("pool_pct:Q", title="memory of all, % of the pages", format=".1f"),
        alt.Tooltip("why:N", title="verdict"),
    ]
    cells = base.mark_rect(stroke=charts.GREY, strokeWidth=0.5).encode(
        x=x,
        y=y,
        color=alt.Color(
            "rps_per_gpu:Q",
            title="requests/s per GPU",
            scale=alt.Scale(scheme="cividis", nice=False),
            legend=alt.Legend(orient="right"),
        ),
        tooltip=tooltip,
    )
    none = (
        alt.Chart(charts.frame([row for row in rows if not row["feasible"]] or [{}]))
        .mark_point(shape="cross", angle=45, size=700, color=charts.RED, strokeWidth=2)
        .encode(x=x, y=y, tooltip=tooltip)
    )
    here = (
        alt.Chart(charts.frame([row for row in rows if row["current"]] or [{}]))
        .mark_rect(filled=False, stroke=charts.RED, strokeWidth=4)
        .encode(x=x, y=y)
    )
    text = base.mark_text(fontSize=14).encode(
        x=x,
        y=y,
        text=alt.Text("text:N"),
        color=alt.condition("datum.light", alt.value("black"), alt.value("white")),
        tooltip=tooltip,
    )
    layers = [cells, text]
    if any(not row["feasible"] for row in rows):
        layers.append(none)
    if any(row["current"] for row in rows):
        layers.append(here)
    return alt.layer(*layers).properties(height=420)
