"""The trace in numbers and three small charts."""

from __future__ import annotations

import altair as alt
import streamlit as st

from planner.chart_rows import percent
from planner.dashboard import charts
from planner.trace_preview import preview
from traces import Trace
from traces.describe import describe

HEIGHT = 260
LEGEND = 40


def draw(trace: Trace) -> None:
    """Draw the summary and the preview of a trace."""
    found = describe(trace)
    numbers = st.columns(6)
    numbers[0].metric("Requests", f"{found.requests:,}")
    numbers[1].metric("Requests a second", f"{found.rate_rps:.3g}")
    numbers[2].metric(
        "Burstiness (CV)",
        "–" if found.arrival_cv is None else f"{found.arrival_cv:.2f}",
        help="CV: standard deviation of the gaps between arrivals over their mean; 1 is Poisson.",
    )
    numbers[3].metric("Prompt tokens", f"{found.prompt_tokens.mean:,.0f}", help="Mean of the requests.")
    numbers[4].metric("Output tokens", f"{found.output_tokens.mean:,.0f}", help="Mean of the requests.")
    top = percent(found.adapters.top10_share)
    numbers[5].metric(
        "Adapters",
        f"{found.adapters.count:,}",
        help="LoRA adapters." if top is None else f"The ten most asked for have {top:.0f} % of the requests.",
    )
    rows = preview(trace)
    left, middle, right = st.columns(3)
    with left:
        _arrivals(rows.arrivals)
    with middle:
        _lengths(rows.lengths)
    with right:
        _adapters(rows.adapters)


def _arrivals(rows: object) -> None:
    chart = (
        alt.Chart(charts.frame(rows), title="Arrivals", height=HEIGHT)  # type: ignore[arg-type]
        .mark_bar(color=charts.BLUE, binSpacing=0)
        .encode(
            x=alt.X("at_s:Q", title="time, s", bin="binned"),
            x2=alt.X2("end_s"),
            y=alt.Y("rps:Q", title="requests/s"),
            tooltip=[
                alt.Tooltip("at_s:Q", title="from, s", format=".0f"),
                alt.Tooltip("rps:Q", title="requests/s", format=".2f"),
            ],
        )
    )
    charts.show(chart, "arrivals", "Requests a second over the time of the trace")


def _lengths(rows: object) -> None:
    chart = (
        alt.Chart(charts.frame(rows), title="Lengths", height=HEIGHT + LEGEND)  # type: ignore[arg-type]
        .mark_line(interpolate="step", strokeWidth=2)
        .encode(
            x=alt.X("low:Q", title="tokens", scale=alt.Scale(type="log")),
            y=alt.Y("requests:Q", title="requests"),
            color=alt.Color(
                "kind:N",
                scale=alt.Scale(domain=["prompt", "output"], range=[charts.BLUE, charts.ORANGE]),
                legend=charts.legend(),
            ),
            tooltip=[
                alt.Tooltip("kind:N"),
                alt.Tooltip("low:Q", title="from, tokens", format=",.0f"),
                alt.Tooltip("high:Q", title="to, tokens", format=",.0f"),
                alt.Tooltip("requests:Q"),
            ],
        )
    )
    charts.show(chart, "lengths", "How many requests have which prompt and output length")


def _adapters(rows: object) -> None:
    if not rows:
        st.caption("No request of this trace asks for an adapter: all use the base model.")
        return
    chart = (
        alt.Chart(charts.frame(rows), title="Most asked for adapters", height=HEIGHT)  # type: ignore[arg-type]
        .mark_bar(color=charts.GREEN)
        .encode(
            x=alt.X("place:Q", title="place by requests", scale=alt.Scale(nice=False, padding=4)),
            y=alt.Y("requests:Q", title="requests"),
            tooltip=[
                alt.Tooltip("adapter:N"),
                alt.Tooltip("rank:Q"),
                alt.Tooltip("requests:Q", format=","),
                alt.Tooltip("share:Q", title="share of all", format=".1%"),
            ],
        )
    )
    charts.show(chart, "adapters", "Requests of the most asked for adapters")
