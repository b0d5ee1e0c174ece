"""The page Memory: what a GPU's memory holds as more adapters stay on it."""

from __future__ import annotations

from typing import Any

import altair as alt
import streamlit as st

from engine.config import ServingConfig
from planner.adapter_point import RANKS, adapter_point
from planner.chart_rows import choices, fit_rows, memory_rows
from planner.dashboard import charts
from planner.dashboard.answers import peek
from planner.dashboard.choose import choose_config
from planner.dashboard.state import Current, told_in_place
from planner.memory_view import PARTS, MemoryView, choice_rows, fit_by_rank, memory_view

COLOURS = dict(
    zip(
        [*PARTS.values(), "KV cache in use", "free pages"],
        [
            charts.BLUE,
            charts.PINK,
            charts.GREY,
            charts.ORANGE,
            charts.GREEN,
            charts.YELLOW,
            charts.GREEN,
            charts.SKY,
        ],
        strict=True,
    )
)
KV_HELP = (
    "KV cache: the keys and values of attention for every token of the requests that run; so many tokens fit."
)


def draw(current: Current) -> None:
    """Draw the page."""
    st.title("Memory", anchor=False)
    st.caption(
        "One GPU's memory. Adapters and the KV cache (attention's keys and values) take pages of one pool: "
        "what adapters hold, running requests cannot."
    )
    config = choose_config(current, "memory")
    _chosen(current, config)
    here = adapter_point(current.trace)
    st.subheader("As more adapters stay on the GPU", anchor=False)
    rank = st.select_slider(
        "Rank of the adapters (LoRA on all seven linears)",
        RANKS,
        value=here[1] if here else 16,
        key="memory_rank",
    )
    with told_in_place():
        view = memory_view(config, int(rank))
        by_rank = fit_by_rank(config, RANKS)
    _numbers(view, here[0] if here else 0)
    charts.show(
        _stack(view, here[0] if here else None),
        "stack",
        "Memory of one GPU against the number of resident adapters",
    )
    st.caption(
        "Adapters beyond those that fit are not refused: they wait in host memory and take turns on the GPU. Shaded: more "
        "than fit at a time beside one request of the longest context."
    )
    st.subheader("How many fit, by rank", anchor=False)
    charts.show(_by_rank(by_rank), "by_rank", "Adapters that fit on one GPU, by rank")


def _chosen(current: Current, config: ServingConfig) -> None:
    """Draw what the search saw the GPU hold at its fullest."""
    answer = peek(current.task("plan"))
    named = {} if answer is None else choices(answer["plan"])
    for choice in named.values():
        if ServingConfig.from_json(choice["config"]) == config:
            st.subheader("At its fullest, at the highest rate it sustains", anchor=False)
            rows = memory_rows(choice_rows(choice["memory_per_gpu_bytes"]))
            charts.show(_bar(rows), "chosen", "What one GPU's memory holds at its fullest")
            return


def _bar(rows: list[dict[str, Any]]) -> charts.Chart:
    order = [row["part"] for row in rows]
    return (
        alt.Chart(charts.frame(rows), height=200)
        .mark_bar(size=42)
        .encode(
            x=alt.X("gb:Q", title="GB on one GPU", stack="zero", scale=alt.Scale(nice=False)),
            color=_colour(order),
            order=alt.Order("order:Q"),
            tooltip=[
                alt.Tooltip("part:N", title="part"),
                alt.Tooltip("gb:Q", title="GB", format=".2f"),
                alt.Tooltip("share:Q", title="share of the GPU", format=".1%"),
            ],
        )
    )


def _colour(order: list[str]) -> alt.Color:
    return alt.Color(
        "part:N",
        sort=order,
        scale=alt.Scale(domain=order, range=[COLOURS[part] for part in order]),
        legend=charts.legend(columns=4),
    )


def _numbers(view: MemoryView, adapters: int) -> None:
    columns = st.columns(4)
    columns[0].metric(
        "One adapter takes", f"{fit_rows([{'adapter_bytes': view.adapter_bytes}])[0]['mb']:,.1f} MB"
    )
    columns[1].metric("Adapters that fit at a time", f"{view.fit:,}")
    columns[2].metric("KV tokens, no adapters", f"{view.kv_tokens(0):,}", help=KV_HELP)
    if adapters:
        columns[3].metric(f"KV tokens, {adapters:,} adapters", f"{view.kv_tokens(adapters):,}", help=KV_HELP)


def _stack(view: MemoryView, adapters: int | None) -> charts.Chart:
    rows = memory_rows(view.rows)
    order = list(PARTS.values())
    most = max(row["adapters"] for row in rows)
    area = (
        alt.Chart(charts.frame(rows))
        .mark_area()
        .encode(
            x=alt.X(
                "adapters:Q",
                title="adapters resident on the GPU",
                scale=alt.Scale(domain=[0, most], nice=False),
            ),
            y=alt.Y("gb:Q", title="GB on one GPU", stack="zero"),
            color=_colour(order),
            order=alt.Order("order:Q"),
            tooltip=[
                alt.Tooltip("adapters:Q", format=","),
                alt.Tooltip("part:N", title="part"),
                alt.Tooltip("gb:Q", title="GB", format=".2f"),
            ],
        )
    )
    layers = [area, charts.shaded(x=(min(view.fit, most), most))]
    layers.append(charts.top_line(view.fit, f"{view.fit:,} fit"))
    if adapters is not None and adapters <= most:
        layers.append(charts.top_line(adapters, f"the trace's {adapters:,}"))
    return alt.layer(*layers).properties(height=charts.HEIGHT)


def _by_rank(rows: list[dict[str, Any]]) -> charts.Chart:
    base = alt.Chart(charts.frame(fit_rows(rows)), height=280)
    x = alt.X("rank:O", title="rank", axis=alt.Axis(labelAngle=0))
    y = alt.Y("fit:Q", title="adapters that fit on one GPU")
    tooltip = [
        alt.Tooltip("rank:O"),
        alt.Tooltip("fit:Q", title="adapters that fit", format=","),
        alt.Tooltip("mb:Q", title="MB each", format=",.1f"),
    ]
    bars = base.mark_bar(color=charts.ORANGE, size=50).encode(x=x, y=y, tooltip=tooltip)
    labels = base.mark_text(dy=-8, color=charts.ORANGE).encode(x=x, y=y, text=alt.Text("fit:Q", format=","))
    return bars + labels
