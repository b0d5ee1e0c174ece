"""The page Adapter traffic: who is asked for, who has to be loaded, and who gets less than was promised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import altair as alt
import streamlit as st

from planner.chart_rows import percent, traffic_rows
from planner.dashboard import charts
from planner.dashboard.answers import answer_for
from planner.dashboard.choose import choose_config
from planner.dashboard.state import Current

VERDICT = alt.Scale(domain=["meets", "misses"], range=[charts.BLUE, charts.RED])


def draw(current: Current) -> None:
    """Draw the page."""
    st.title("Adapter traffic", anchor=False)
    st.caption(
        "Each adapter's share of the traffic and what its own requests get, in one simulated run at the trace's rate."
    )
    if not current.trace.adapters:
        st.info("No request of this trace asks for an adapter: all use the base model.")
        return
    config = choose_config(current, "traffic")
    answer = answer_for(current.task("traffic", config))
    if answer is None:
        return
    _numbers(answer)
    rows = traffic_rows(answer)
    charts.show(
        _popularity(rows),
        "popularity",
        "Share of the requests by adapter, and how often it was loaded already",
    )
    charts.show(
        _latency(rows, current.scenario.ttft_ms),
        "latency",
        "Time to first token, 99th percentile, by adapter",
    )
    st.caption(
        "Rarely asked for adapters are loaded anew more often, so their requests wait longer. Misses: fewer of its own requests meet "
        f"the SLO than the promised {current.scenario.attainment_pct:g} %; with few requests that may be chance. "
        "TTFT: time to first token; TPOT: time per output token; p99: 99 of 100 requests are faster."
    )
    st.dataframe(
        charts.frame(rows),
        hide_index=True,
        column_config={
            "place": "place",
            "share_pct": st.column_config.NumberColumn("share, %", format="%.2f"),
            "cumulative_pct": st.column_config.NumberColumn("with those before, %", format="%.1f"),
            "hit_pct": st.column_config.NumberColumn("found loaded, %", format="%.1f"),
            "load_wait_ms": st.column_config.NumberColumn("wait for its load, ms", format="%.2f"),
            "ttft_p99_ms": st.column_config.NumberColumn("TTFT p99, ms", format="%.0f"),
            "tpot_p99_ms": st.column_config.NumberColumn("TPOT p99, ms", format="%.1f"),
            "slo_pct": st.column_config.NumberColumn("meet the SLO, %", format="%.1f"),
            "meets": "promise",
        },
        key="traffic_table",
    )


def _numbers(answer: Mapping[str, Any]) -> None:
    columns = st.columns(5)
    columns[0].metric("Adapters asked for", f"{len(answer['rows']):,}")
    columns[1].metric("Loads", f"{answer['loads']:,}", help="Adapters copied to a GPU, over all replicas.")
    columns[2].metric(
        "Evictions", f"{answer['evictions']:,}", help="Idle adapters whose pages others needed."
    )
    hits = percent(answer["hit_rate"])
    columns[3].metric(
        "Found loaded",
        "–" if hits is None else f"{hits:.1f} %",
        help="Share of the requests that did not wait for their adapter.",
    )
    columns[4].metric(
        "Miss the promise",
        f"{answer['missing']:,}",
        help="Adapters whose own requests meet the SLO less often than promised.",
    )


def _popularity(rows: list[dict[str, Any]]) -> charts.Chart:
    base = alt.Chart(charts.frame(rows))
    x = alt.X("place:Q", title="adapters, the most asked for first", scale=alt.Scale(nice=False, padding=6))
    bars = base.mark_bar(color=charts.SKY).encode(
        x=x,
        y=alt.Y("share_pct:Q", title="share of the requests, %"),
        tooltip=[
            alt.Tooltip("adapter:N"),
            alt.Tooltip("rank:Q"),
            alt.Tooltip("requests:Q", format=","),
            alt.Tooltip("share_pct:Q", title="share, %", format=".2f"),
            alt.Tooltip("hit_pct:Q", title="found loaded, %", format=".1f"),
        ],
    )
    hits = base.mark_line(
        color=charts.RED, strokeWidth=2, point=alt.OverlayMarkDef(color=charts.RED, size=14)
    ).encode(x=x, y=alt.Y("hit_pct:Q", title="found loaded, % (line)", scale=alt.Scale(domain=[0, 100])))
    return alt.layer(bars, hits).resolve_scale(y="independent").properties(height=330)


def _latency(rows: list[dict[str, Any]], bound_ms: float) -> charts.Chart:
    points = (
        alt.Chart(charts.frame(rows))
        .mark_point(filled=True, opacity=0.85)
        .encode(
            x=alt.X(
                "place:Q", title="adapters, the most asked for first", scale=alt.Scale(nice=False, padding=6)
            ),
            y=alt.Y("ttft_p99_ms:Q", title="time to first token, p99, ms"),
            size=alt.Size(
                "rank:Q",
                title="rank",
                legend=charts.legend("rank", values=[8, 32, 128], **charts.GREY_SYMBOLS),
                scale=alt.Scale(range=[20, 220]),
            ),
            color=alt.Color("meets:N", title="promise", scale=VERDICT, legend=charts.legend("promise")),
            shape=alt.Shape(
                "meets:N",
                title="promise",
                scale=alt.Scale(domain=["meets", "misses"], range=["circle", "triangle-up"]),
            ),
            tooltip=[
                alt.Tooltip("adapter:N"),
                alt.Tooltip("rank:Q"),
                alt.Tooltip("requests:Q", format=","),
                alt.Tooltip("ttft_p99_ms:Q", title="TTFT p99, ms", format=".0f"),
                alt.Tooltip("slo_pct:Q", title="meet the SLO, %", format=".1f"),
            ],
        )
    )
    return alt.layer(points, charts.slo_line(bound_ms, f"bound: {bound_ms:g} ms")).properties(height=330)
