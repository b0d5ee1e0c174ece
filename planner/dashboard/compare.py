"""The page Compare and cost: two configurations side by side, what a million tokens cost, and one simulated run over time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import altair as alt
import streamlit as st

from engine.config import ServingConfig
from planner.chart_rows import choices, comparison_rows, cost_rows, timeline_rows
from planner.comparison import compare
from planner.dashboard import charts
from planner.dashboard.answers import answer_for, peek
from planner.dashboard.choose import choose_config, words
from planner.dashboard.state import PINNED, Current, pinned

Side = tuple[Current, Mapping[str, Any]]
HERE, ASIDE = "This scenario", "Put aside"


def draw(current: Current) -> None:
    """Draw the page."""
    st.title("Compare and cost", anchor=False)
    sides = _sides(current)
    _pin(current)
    if len(sides) < 2:
        st.info(
            "There is nothing to compare yet: search for a plan on the page Plan. To compare two scenarios, put the first aside here, "
            "change the form and search again."
        )
    else:
        _compare(sides)
    st.subheader("One simulated run over time", anchor=False)
    config = choose_config(current, "timeline")
    seen = answer_for(current.task("timeline", config))
    if seen is not None:
        _timeline(seen, config)


def _sides(current: Current) -> dict[str, Side]:
    """Return what can be compared, by name: the choices of this scenario's plan and of the one put aside."""
    sides: dict[str, Side] = {}
    other = pinned()
    for title, scenario in ((HERE, current), (ASIDE, other)):
        answer = None if scenario is None else peek(scenario.task("plan"))
        if answer is None or scenario is None:
            continue
        for name, choice in choices(answer["plan"]).items():
            sides[f"{title} · {name}: {words(choice['config'])}"] = (scenario, choice)
    return sides


def _pin(current: Current) -> None:
    left, right = st.columns([1, 3], vertical_alignment="center")
    if left.button("Put this scenario aside", help="Then change the form: both can be compared here."):
        st.session_state[PINNED] = current
        st.rerun()
    other = pinned()
    if other is not None:
        scenario = other.scenario
        right.caption(
            f"Put aside: {other.trace.name} at {other.trace.rate_rps:.2f} requests a second, at most {scenario.gpus} × "
            f"{scenario.gpu.upper()}, {scenario.model}; {scenario.promise}."
        )


def _compare(sides: Mapping[str, Side]) -> None:
    names = list(sides)
    titles = list(dict.fromkeys(name.split(" · ")[0] for name in names))
    if titles == [ASIDE]:
        st.caption(
            "Nothing is planned for the form's scenario yet (page Plan): these are choices of the one put aside."
        )
    # Two scenarios are compared by what is best in each, one by its first two choices.
    other = next(place for place, name in enumerate(names) if place and name.startswith(titles[-1]))
    columns, mix = st.columns(2), "_".join(titles)
    first = columns[0].selectbox("Left", names, index=0, key=f"compare_left_{mix}")
    second = columns[1].selectbox("Right", names, index=other, key=f"compare_right_{mix}")
    left, right = sides[first], sides[second]
    rows = comparison_rows(compare(left[1], right[1]))
    st.dataframe(
        charts.frame(rows),
        hide_index=True,
        height=35 * (len(rows) + 1) + 3,
        key="comparison",
    )
    st.caption(
        "At the trace's own rate, but for the sustainable one. In brackets the interval of the prediction; “unsure”: the intervals overlap. "
        "p95, p99: 95 or 99 of 100 requests are faster. Preemptions: requests set back because memory ran out."
    )
    st.subheader("What a million tokens cost", anchor=False)
    _cost({"Left": left, "Right": right})


def _cost(sides: Mapping[str, Side]) -> None:
    priced = {}
    for column, (name, (scenario, choice)) in zip(st.columns(2), sides.items(), strict=True):
        gpu = choice["config"]["gpu"].upper()
        price = column.number_input(
            f"{name}: US dollars per {gpu} and hour",
            0.0,
            1000.0,
            value=scenario.usd_per_gpu_hour or 0.0,
            step=0.5,
            key=f"compare_price_{name}_{gpu}",
        )
        priced[name] = (scenario.trace, choice, float(price))
    rows = cost_rows(priced)
    st.dataframe(
        charts.frame(rows),
        hide_index=True,
        column_config={
            name: st.column_config.NumberColumn(format="$%.2f")
            for name in ("$ an hour", "$ per million output tokens", "$ per million tokens in all")
        }
        | {"requests/s": st.column_config.NumberColumn(format="%.2f")},
        key="costs",
    )
    st.caption(
        "“in all”: prompt and output tokens together. At the trace's rate the GPUs may idle; at the highest sustainable rate they do not."
    )


def _timeline(seen: Mapping[str, Any], config: ServingConfig) -> None:
    rows = timeline_rows(seen)
    left, right = st.columns(2)
    with left:
        charts.show(
            _lines(rows["requests"], "requests", [charts.BLUE, charts.RED]),
            "requests",
            "Requests that run and wait over time",
        )
        charts.show(
            _lines(rows["loads"], "adapter loads a second", [charts.GREEN]),
            "loads",
            "Adapter loads over time",
        )
    with right:
        charts.show(
            _lines(rows["pages"], "% of the pages", [charts.ORANGE, charts.PINK]),
            "pages",
            "Pages held by KV cache and adapters",
        )
        charts.show(
            _busy(rows["busy"], config.tp), "busy", "Share of the time in which each replica's GPUs ran steps"
        )
    st.caption(
        "Means over equal spans of the run. KV cache: attention's keys and values of the requests that run. A replica's GPUs are busy together: "
        f"here {config.tp} a replica."
    )


def _lines(rows: list[dict[str, Any]], title: str, colours: list[str]) -> charts.Chart:
    names = list(dict.fromkeys(row["what"] for row in rows))
    return (
        alt.Chart(charts.frame(rows), height=260)
        .mark_line(strokeWidth=1.5)
        .encode(
            x=alt.X("at_s:Q", title="time, s"),
            y=alt.Y("value:Q", title=title),
            color=alt.Color("what:N", scale=alt.Scale(domain=names, range=colours), legend=charts.legend()),
            strokeDash=alt.StrokeDash(
                "what:N", scale=alt.Scale(domain=names, range=[[1, 0], [5, 3]]), legend=None
            ),
            tooltip=[
                alt.Tooltip("what:N", title="series"),
                alt.Tooltip("at_s:Q", title="time, s", format=".0f"),
                alt.Tooltip("value:Q", title=title, format=".2f"),
            ],
        )
    )


def _busy(rows: list[dict[str, Any]], tp: int) -> charts.Chart:
    names = list(dict.fromkeys(row["what"] for row in rows))
    return (
        alt.Chart(charts.frame(rows), height=max(260, 18 * len(names) + 150))
        .mark_rect()
        .encode(
            x=alt.X("from_s:Q", title="time, s", scale=alt.Scale(nice=False)),
            x2=alt.X2("to_s"),
            y=alt.Y("what:N", title=None, sort=names, axis=alt.Axis(labelOverlap=False)),
            color=alt.Color(
                "value:Q",
                title="% of the time busy",
                scale=alt.Scale(scheme="cividis", domain=[0, 100]),
                legend=alt.Legend(orient="top", gradientLength=160),
            ),
            tooltip=[
                alt.Tooltip("what:N", title="replica (1 GPU)" if tp == 1 else f"replica ({tp} GPUs)"),
                alt.Tooltip("at_s:Q", title="time, s", format=".0f"),
                alt.Tooltip("value:Q", title="busy, %", format=".1f"),
            ],
        )
    )
