"""What the first visitor would wait for: importing the pages, reading what ships, and drawing charts once."""

from __future__ import annotations

import gc
import logging

from altair.utils.schemapi import disable_debug_mode

from planner.dashboard import (
    pages,  # noqa: F401  so that it is imported
    plan,
    scenario_form,
)
from planner.dashboard.state import current_of
from planner.scenario import Scenario
from planner.worked import find_worked

UNSEEN = "streamlit.runtime.scriptrunner_utils.script_run_context"  # warns that nobody sees what is drawn


def warm_up() -> None:
    """Draw what ships of the first page, for nobody to see."""
    scenario = Scenario()
    current = current_of(scenario, scenario_form.price_of(scenario.gpu))
    worked = find_worked(current.task("plan"))
    logging.getLogger(UNSEEN).disabled = True
    try:
        if worked is not None:
            plan.body(current, worked.answer)
    finally:
        logging.getLogger(UNSEEN).disabled = False


def lighten() -> None:
    """Leave out, for the rest of this process, what costs each run of a page time and a server nothing to miss."""
    disable_debug_mode()  # Altair checks every part of a chart as it is made, besides the whole; tests do
    gc.freeze()  # Streamlit collects garbage after every run: 0.07 s, were it to look through what stays anyway
