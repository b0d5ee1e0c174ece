"""The page Plan: what is recommended, what it will do, what binds, and what else there is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import altair as alt
import streamlit as st

from planner.chart_rows import binding, choice_table, interval, rate_rows, shape, span
from planner.dashboard import charts, downloads, trace_section
from planner.dashboard.answers import answer_for, peek
from planner.dashboard.choose import words
from planner.dashboard.state import Current
from planner.token_cost import with_price

PLAIN: dict[str, Any] = {
    "delta_color": "off",
    "delta_arrow": "off",
}  # what stands below a number is no change


def draw(current: Current) -> None:
    """Draw the page."""
    _heading(current)
    answer = answer_for(current.task("plan"), begin=False, button="Search for a plan")
    if answer is None:
        st.caption(
            "The search simulates hundreds of runs of this trace; the other pages can be used meanwhile."
        )
    body(current, answer)


def lead(current: Current) -> bool:
    """Draw the page's heading and the recommendation, and nothing that takes a browser long; False, and nothing drawn, where
    none is known."""
    answer = peek(current.task("plan"))
    if answer is None or answer["plan"]["recommended"] is None:
        return False
    _heading(current)
    _winner(with_price(answer["plan"], current.usd_per_gpu_hour))
    return True


def body(current: Current, answer: Mapping[str, Any] | None) -> None:
    """Draw what stands below the heading: the plan, where there is one, and the trace."""
    if answer is not None:
        _plan(with_price(answer["plan"], current.usd_per_gpu_hour), answer)
    st.subheader("The trace", anchor=False)
    trace_section.draw(current.trace)


def _heading(current: Current) -> None:
    scenario, trace = current.scenario, current.trace
    st.title("Plan", anchor=False)
    st.caption(
        f"{trace.name}: {len(trace):,} requests at {trace.rate_rps:.2f} a second, {len(trace.adapters):,} LoRA adapters of "
        f"{scenario.model}, at most {scenario.gpus} × {scenario.gpu.upper()}. Promised (SLO): {scenario.promise}."
    )


def _plan(plan: Mapping[str, Any], answer: Mapping[str, Any]) -> None:
    recommends = plan["recommended"] is not None
    if recommends:
        _winner(plan)
    else:
        _nothing(plan)
    rates, table = charts.frame(rate_rows(plan)), choice_table(plan)
    if len(rates):
        charts.show(
            _rates(rates, plan["trace"]["rate_rps"]), "rates", "Highest sustainable rate of each choice"
        )
    if table:
        _table(table)
    if recommends:
        downloads.draw(plan, answer)
    _notes(plan)


def _winner(plan: Mapping[str, Any]) -> None:
    best = plan["recommended"]
    st.success(f"**Recommended:** {words(best['config'])}.", icon=":material/check_circle:")
    predicted, config = best["predicted"], best["config"]
    numbers = st.columns(6)
    numbers[0].metric(
        "GPUs",
        config["tp"] * config["replicas"],
        f"{config['replicas']} × {config['tp']}",
        help=shape(config),
        **PLAIN,
    )
    _predicted(
        numbers[1],
        "Sustains",
        predicted["sustainable_rps"],
        (1, "/s"),
        "Requests a second: the highest rate at which the SLO is met. Below: the interval in which it should lie.",
    )
    _predicted(
        numbers[2],
        "TTFT, p95",
        predicted["ttft_p95_s"],
        (1e3, "ms"),
        "TTFT: from arrival to first token, at the trace's own rate; 95 of 100 requests are faster (p95).",
    )
    _predicted(
        numbers[3],
        "TPOT, p95",
        predicted["tpot_p95_s"],
        (1e3, "ms"),
        "TPOT: mean time between a request's later tokens, at the trace's own rate; 95 of 100 are faster (p95).",
    )
    _predicted(
        numbers[4],
        "Meet the SLO",
        predicted["slo_attainment"],
        (100, "%"),
        "Share of all requests that meet every bound, at the trace's own rate.",
    )
    cost = best["cost_usd_per_hour"]
    numbers[5].metric(
        "Cost an hour", "–" if cost is None else f"${cost:,.2f}", "at the form's price", **PLAIN
    )
    fewest = plan["fewest_gpus"]
    st.markdown(
        f"**What binds first:** {binding(best['bottleneck'])}. "
        + (
            ""
            if fewest is None
            else f"**Fewest GPUs that keep the promise at this rate:** {words(fewest['config'])}."
        )
    )


def _predicted(
    column: Any, label: str, prediction: Mapping[str, Any], unit: tuple[float, str], said: str
) -> None:
    """Show a number with its interval below it."""
    column.metric(label, interval(prediction, *unit), span(prediction, unit[0]), help=said, **PLAIN)


def _nothing(plan: Mapping[str, Any]) -> None:
    nearest = plan["nearest_miss"]
    if nearest is None:
        reasons = sorted({row["reason"] for row in plan["trials"] if row.get("reason")})
        st.error("No configuration can run. " + " ".join(f"{reason}." for reason in reasons[:3]))
        return
    st.error(
        f"No configuration within {plan['gpus']} GPUs keeps the promise. The nearest, {words(nearest['config'])}, sustains "
        f"{nearest['sustainable_rps']:.2f} of {plan['trace']['rate_rps']:.2f} requests a second. "
        f"What most requests miss: {nearest['misses']}; what binds: {binding(nearest['bottleneck'])}."
    )


def _rates(rows: Any, rate_rps: float) -> charts.Chart:
    base = alt.Chart(rows)
    names = alt.Y("choice:N", sort=None, title=None, axis=alt.Axis(labelLimit=200, labelOverlap=False))
    tooltip = [
        alt.Tooltip("choice:N"),
        alt.Tooltip("shape:N"),
        alt.Tooltip("rps:Q", title="sustains, requests/s", format=".1f"),
        alt.Tooltip("low:Q", title="at least", format=".1f"),
        alt.Tooltip("high:Q", title="at most", format=".1f"),
        alt.Tooltip("provenance:N", title="costs rest on"),
    ]
    bars = base.mark_bar(color=charts.SKY, size=18).encode(
        x=alt.X("rps:Q", title="requests/s, with the interval of the prediction"), y=names, tooltip=tooltip
    )
    spans = base.mark_errorbar(ticks=True, thickness=2, color=charts.BLUE).encode(
        x=alt.X("low:Q", title=""), x2=alt.X2("high"), y=names
    )
    marks = base.mark_point(filled=True, size=70, color=charts.BLUE).encode(
        x=alt.X("rps:Q"), y=names, shape=_shape(), tooltip=tooltip
    )
    return alt.layer(
        bars, spans, marks, charts.slo_line(rate_rps, "the trace's rate", axis="x", above=True)
    ).properties(height=36 * len(rows) + 190, title="Highest rate that keeps the promise")


def _shape() -> alt.Shape:
    return alt.Shape("provenance:N", scale=charts.PROVENANCE_SHAPE, legend=charts.legend("costs are"))


def _table(rows: list[dict[str, Any]]) -> None:
    one, three = st.column_config.NumberColumn(format="%.1f"), st.column_config.NumberColumn(format="%.3g")
    st.dataframe(
        charts.frame(rows),
        hide_index=True,
        column_config={
            "sustains, requests/s": one,
            "TTFT p95, ms": three,
            "TPOT p95, ms": three,
            "meet the SLO, %": st.column_config.NumberColumn(format="%.2f"),
            "memory used, GB": one,
            "$ an hour": st.column_config.NumberColumn(format="%.2f"),
        },
        key="choices",
    )
    st.caption(
        "TTFT: time to first token; TPOT: time per output token; both, and the share that meets the SLO (service level objective: what is "
        "promised), at the trace's own rate; p95: 95 of 100 requests are better. "
        "Extrapolated: some of its steps lie beyond what was measured."
    )


def _notes(plan: Mapping[str, Any]) -> None:
    for retrained in plan["retraining"]:
        rates = retrained["sustainable_rps_a_replica"]
        st.caption(
            f"If the adapters were retrained ({retrained['change']}), a replica would sustain {rates['retrained']:.2f} "
            f"instead of {rates['now']:.2f} requests a second."
        )
    with st.expander(f"{len(plan['warnings'])} warnings, {len(plan['assumptions'])} assumptions"):
        for title in ("warnings", "assumptions"):
            if plan[title]:
                st.markdown(f"**{title.capitalize()}**\n" + "\n".join(f"- {note}" for note in plan[title]))
