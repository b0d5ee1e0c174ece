"""What all charts share: colours that a colour-blind person can tell apart, SLO lines, shaded regions, sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import pandas as pd
import streamlit as st

# Okabe and Ito, Color Universal Design (2008), without the black, which a dark page swallows.
ORANGE, SKY, GREEN, YELLOW = "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, RED, PINK, GREY = "#0072B2", "#D55E00", "#CC79A7", "#8C8C8C"
PALETTE = [BLUE, ORANGE, GREEN, PINK, SKY, RED, YELLOW, GREY]

HEIGHT = 380  # axes and legend included, as Streamlit counts it
# Edges of a chart as channels: made once, for Altair takes milliseconds to read each.
LEFT: Any = alt.XValue(0)  # type: ignore[no-untyped-call]
TOP: Any = alt.YValue(0)  # type: ignore[no-untyped-call]
FOOT: Any = alt.YValue("height")  # type: ignore[no-untyped-call]
PROVENANCES = ["measured", "interpolated", "extrapolated"]
# What is extrapolated is told by its shape, not by colour alone.
PROVENANCE_SHAPE = alt.Scale(domain=PROVENANCES, range=["square", "circle", "triangle-up"])

Chart = alt.Chart | alt.LayerChart | alt.HConcatChart | alt.VConcatChart | alt.FacetChart


def frame(rows: Sequence[Any]) -> pd.DataFrame:
    """Return rows as Altair takes them."""
    return pd.DataFrame(list(rows))


def show(chart: Chart, key: str, alt_text: str) -> None:
    """Draw a chart across the page. alt_text: what it shows, for who cannot see it."""
    st.altair_chart(chart, width="stretch", key=f"chart_{key}", alt=alt_text)


def slo_line(
    value: float,
    label: str,
    *,
    axis: str = "y",
    above: bool = False,
    below: bool = False,
    right_of: float | None = None,
) -> alt.LayerChart:
    """Return a dashed line at a bound, with its name; above: the name stands over the chart, not in it; below: under the
    line; right_of: where on the other axis the name begins, the chart's edge if not given."""
    data = frame([{"at": value, "label": label, "begins": right_of}])
    base = alt.Chart(data)
    if axis == "y":
        rule = base.mark_rule(color=RED, strokeDash=[6, 4], strokeWidth=2).encode(y=alt.Y("at:Q"))
        text = base.mark_text(
            align="left",
            baseline="top" if below else "bottom",
            dx=4,
            dy=4 if below else -3,
            color=RED,
            fontSize=12,
        )
        begins = LEFT if right_of is None else alt.X("begins:Q")
        return rule + text.encode(x=begins, y=alt.Y("at:Q"), text=alt.Text("label:N"))
    rule = base.mark_rule(color=RED, strokeDash=[6, 4], strokeWidth=2).encode(x=alt.X("at:Q"))
    place: dict[str, Any] = (
        {"baseline": "bottom", "dy": -2} if above else {"baseline": "top", "dx": 5, "dy": 4}
    )
    text = base.mark_text(align="left", color=RED, fontSize=12, **place)
    return rule + text.encode(x=alt.X("at:Q"), y=TOP, text=alt.Text("label:N"))


def mark_line(value: float, label: str, colour: str = GREY, *, row: int = 0) -> alt.LayerChart:
    """Return an upright line that marks a place, its name at the foot; row: how many lines of text above the foot."""
    data = frame([{"at": value, "label": label}])
    base = alt.Chart(data)
    rule = base.mark_rule(color=colour, strokeWidth=2).encode(x=alt.X("at:Q"))
    text = base.mark_text(align="left", baseline="bottom", dx=5, dy=-6 - 16 * row, color=colour, fontSize=12)
    return rule + text.encode(x=alt.X("at:Q"), y=FOOT, text=alt.Text("label:N"))


def top_line(value: float, label: str) -> alt.LayerChart:
    """Return an upright line through a filled chart, its name above the chart."""
    base = alt.Chart(frame([{"at": value, "label": label}]))
    rule = base.mark_rule(color="white", strokeWidth=2, strokeDash=[6, 4]).encode(x=alt.X("at:Q"))
    text = base.mark_text(align="center", baseline="bottom", dy=-4, color=GREY, fontSize=12)
    return rule + text.encode(x=alt.X("at:Q"), y=TOP, text=alt.Text("label:N"))


def shaded(
    *, x: tuple[float, float] | None = None, y: tuple[float, float] | None = None, colour: str = RED
) -> alt.Chart:
    """Return a shaded region: a span of x, of y, or both; what is not given is all of the chart."""
    row: dict[str, float] = {}
    if x is not None:
        row |= {"x": x[0], "x2": x[1]}
    if y is not None:
        row |= {"y": y[0], "y2": y[1]}
    chart = alt.Chart(frame([row])).mark_rect(color=colour, opacity=0.1)
    encodings: dict[str, Any] = {}
    if x is not None:
        encodings |= {"x": alt.X("x:Q"), "x2": alt.X2("x2")}
    if y is not None:
        encodings |= {"y": alt.Y("y:Q"), "y2": alt.Y2("y2")}
    return chart.encode(**encodings)


# Where colour says something else, a legend's symbols are black unless told: unseen on a dark page.
GREY_SYMBOLS: dict[str, Any] = {"symbolFillColor": GREY, "symbolStrokeColor": GREY}


def legend(title: str | None = None, **more: Any) -> alt.Legend:
    """Return a legend above the chart, where it takes no width."""
    return alt.Legend(title=title, orient="top", labelLimit=260, **more)
