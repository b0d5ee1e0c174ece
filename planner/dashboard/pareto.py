"""The page Speed against throughput: the Pareto front of what the search tried."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import altair as alt
import streamlit as st

from planner.chart_rows import pareto_rows, pieces_of
from planner.dashboard import charts
from planner.dashboard.answers import answer_for
from planner.dashboard.state import Current

USER = "tokens/s that 95 % of users get at least"
GPU = "output tokens/s per GPU"
SHAPES = ["circle", "square", "diamond", "triangle-up"]


def draw(current: Current) -> None:
    """Draw the page."""
    st.title("Speed against throughput", anchor=False)
    st.caption(
        "Every configuration that the search tried, at the highest rate it sustains. On the Pareto front are those that no other "
        "beats in throughput without being slower for the user."
    )
    answer = answer_for(current.task("plan"), begin=False, button="Search for a plan")
    if answer is None:
        return
    rows, corner = pareto_rows(answer["pareto"]), answer["slo_corner"]
    if not rows:
        st.info(
            "No configuration sustains any rate under this SLO: there is nothing to draw. The page Plan says what binds."
        )
        return
    left, right = st.columns(2)
    with left:
        charts.show(_users(rows, corner), "front", "Throughput per GPU against tokens a second for a user")
    with right:
        charts.show(
            _first_token(rows, current.scenario.ttft_ms),
            "first",
            "Throughput per GPU against time to first token",
        )
    st.caption(
        "Shaded: outside the SLO (service level objective). TP: tensor parallelism, GPUs that share one copy of the model. Shapes say on how much of "
        "the trace a configuration was tried: poor ones are dropped early. TTFT: time to first token; p95: 95 of 100 requests are faster."
    )
    table = charts.frame(rows).sort_values(["front", "tokens_per_s_per_gpu"], ascending=False)
    st.dataframe(
        table[
            [
                "label",
                "tokens_per_s_per_gpu",
                "tokens_per_s_per_user",
                "ttft_ms",
                "rps_per_gpu",
                "bottleneck",
                "judged_on",
                "on_front",
            ]
        ],
        hide_index=True,
        column_config={
            "label": "configuration",
            "tokens_per_s_per_gpu": st.column_config.NumberColumn("tokens/s per GPU", format="%.0f"),
            "tokens_per_s_per_user": st.column_config.NumberColumn("tokens/s per user", format="%.0f"),
            "ttft_ms": st.column_config.NumberColumn("TTFT p95, ms", format="%.0f"),
            "rps_per_gpu": st.column_config.NumberColumn("requests/s per GPU", format="%.2f"),
            "bottleneck": "what binds",
            "judged_on": "tried on",
            "on_front": "on the front",
        },
        key="pareto_table",
    )


def _points(rows: list[dict[str, Any]], x: alt.X) -> alt.Chart:
    base = alt.Chart(charts.frame(rows))
    pieces = pieces_of(rows)
    y = alt.Y("tokens_per_s_per_gpu:Q", title=GPU, scale=alt.Scale(zero=False, padding=10))
    return base.mark_point(filled=True, size=80, opacity=0.85).encode(
        x=x,
        y=y,
        color=alt.Color(
            "tp_name:N",
            title="GPUs a replica",
            sort=["TP 1", "TP 2", "TP 4", "TP 8"],
            scale=alt.Scale(
                domain=["TP 1", "TP 2", "TP 4", "TP 8"],
                range=[charts.BLUE, charts.ORANGE, charts.GREEN, charts.PINK],
            ),
            legend=charts.legend(),
        ),
        shape=alt.Shape(
            "judged_on:N",
            title="tried on",
            scale=alt.Scale(domain=pieces, range=SHAPES[: len(pieces)]),
            legend=alt.Legend(title=None, orient="bottom", columns=1, labelLimit=260, **charts.GREY_SYMBOLS),
        ),
        tooltip=[
            alt.Tooltip("label:N", title="configuration"),
            alt.Tooltip("tokens_per_s_per_gpu:Q", title="output tokens/s per GPU", format=",.0f"),
            alt.Tooltip("tokens_per_s_per_user:Q", title="tokens/s per user", format=",.0f"),
            alt.Tooltip("ttft_ms:Q", title="TTFT p95, ms", format=",.0f"),
            alt.Tooltip("bottleneck:N", title="what binds"),
            alt.Tooltip("judged_on:N", title="tried on"),
        ],
    )


def _users(rows: list[dict[str, Any]], corner: Mapping[str, float]) -> charts.Chart:
    x = alt.X("tokens_per_s_per_user:Q", title=USER, scale=alt.Scale(zero=True))
    ahead = [row for row in rows if row["front"]]
    line = (
        alt.Chart(charts.frame(ahead))
        .mark_line(color=charts.GREY, strokeDash=[4, 3], strokeWidth=2)
        .encode(
            x=alt.X("tokens_per_s_per_user:Q"),
            y=alt.Y("tokens_per_s_per_gpu:Q"),
            order=alt.Order("tokens_per_s_per_user:Q"),
        )
    )
    bound = corner["tokens_per_s_per_user"]
    return alt.layer(
        charts.shaded(x=(0, bound)), line, _points(rows, x), charts.slo_line(bound, "SLO", axis="x")
    ).properties(height=560, title="Pareto front: dashed")


def _first_token(rows: list[dict[str, Any]], bound_ms: float) -> charts.Chart:
    most = max(bound_ms * 1.15, *(row["ttft_ms"] for row in rows))
    x = alt.X(
        "ttft_ms:Q", title="time to first token, p95, ms", scale=alt.Scale(domain=[0, most], nice=False)
    )
    return alt.layer(
        charts.shaded(x=(bound_ms, most)),
        _points(rows, x),
        charts.slo_line(bound_ms, "SLO", axis="x"),
    ).properties(height=560, title="Against the first token")
