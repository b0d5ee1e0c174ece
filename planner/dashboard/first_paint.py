"""What a visitor sees first: the recommendation alone, where it is known; the form, the charts and the rest come right after.

A browser is busy with those for a second or more and paints nothing meanwhile.
"""

from __future__ import annotations

import streamlit as st

from engine.errors import UserError
from planner.dashboard import plan, scenario_form
from planner.dashboard.state import current_of
from traces import TraceError

BEGUN = "begun"
AFTER_S = 0.2


def show() -> bool:
    """Draw the recommendation and have the browser ask for all of the page; False, and nothing drawn, where this session has
    seen it or nothing is known to show."""
    if BEGUN in st.session_state:
        return False
    led = _lead()
    if led:
        _all_of_it()
    st.session_state[BEGUN] = True
    return led


def _lead() -> bool:
    scenario, problem = scenario_form.last()
    if problem:
        return False
    try:
        current = current_of(scenario, scenario_form.price_of(scenario.gpu))
    except (UserError, TraceError):
        return False  # the form tells it
    return plan.lead(current)


@st.fragment(run_every=AFTER_S)
def _all_of_it() -> None:
    """Draw nothing; when the browser, which keeps the time, has got so far, run the whole page."""
    if BEGUN in st.session_state:
        st.rerun()
