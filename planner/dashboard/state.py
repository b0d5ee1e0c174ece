"""What pages share: the scenario of the form, its trace, and the searches of this server."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import Any

import streamlit as st

from engine.errors import UserError
from planner.background import Background
from planner.scenario import SYNTHETIC_ONLY, Scenario
from planner.task import Kind, Task
from planner.trace_input import Upload, made, sample
from traces import Trace, TraceError

MOST_UPLOADS = 32
CURRENT, PROBLEM, PINNED = "current", "problem", "pinned"


@dataclass(frozen=True, slots=True, kw_only=True)
class Current:
    """The scenario of the form, its trace at the rate to plan for, and a GPU's price an hour (None: not known)."""

    scenario: Scenario
    trace: Trace
    usd_per_gpu_hour: float | None

    def task(self, kind: Kind, config: Any = None) -> Task:
        """Return a question about this scenario."""
        return Task(
            kind=kind,
            scenario=self.scenario,
            trace=self.trace,
            config=config,
            usd_per_gpu_hour=self.usd_per_gpu_hour,
        )


class Uploads:
    """The traces sent to this server, by digest; the oldest go first."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Upload] = OrderedDict()
        self._lock = Lock()

    def keep(self, digest: str, upload: Upload) -> None:
        """Keep a trace."""
        with self._lock:
            self._kept[digest] = upload
            self._kept.move_to_end(digest)
            while len(self._kept) > MOST_UPLOADS:
                self._kept.popitem(last=False)

    def find(self, digest: str) -> Upload | None:
        """Return a trace that was kept."""
        with self._lock:
            return self._kept.get(digest)


@st.cache_resource(show_spinner=False)
def background() -> Background:
    """Return the searches of this server: they outlive pages and sessions."""
    return Background()


@st.cache_resource(show_spinner=False)
def uploads() -> Uploads:
    """Return the traces that were sent to this server."""
    return Uploads()


def trace_of(scenario: Scenario) -> Trace:
    """Return a scenario's trace at the rate to plan for. Raises UserError where an upload is not here (any more), and TraceError."""
    if scenario.source == "upload":
        upload = uploads().find(scenario.upload)
        if upload is None:
            wanted = "the trace of this link is not on this server (any more)" if scenario.upload else ""
            raise UserError(wanted or "choose a file to upload")
        trace = upload.trace
    elif scenario.source == "synthetic":
        kept = {name: getattr(scenario, name) for name in SYNTHETIC_ONLY}
        trace = _made(Scenario(source="synthetic", **kept))
    else:
        trace = _sample()
    return trace if scenario.rate_scale == 1.0 else trace.scaled(scenario.rate_scale)


def current_of(scenario: Scenario, usd_per_gpu_hour: float | None) -> Current:
    """Return a scenario with its trace. Raises as `trace_of`."""
    return Current(scenario=scenario, trace=trace_of(scenario), usd_per_gpu_hour=usd_per_gpu_hour)


def set_current(scenario: Scenario, usd_per_gpu_hour: float | None) -> None:
    """Make a scenario the one that pages show, or note what is wrong with it."""
    st.session_state.pop(CURRENT, None)
    try:
        current = current_of(scenario, usd_per_gpu_hour)
    except (UserError, TraceError) as error:
        st.session_state[PROBLEM] = str(error)
        return
    st.session_state.pop(PROBLEM, None)
    st.session_state[CURRENT] = current


def current_or_stop(title: str) -> Current:
    """Return what the form holds; where it holds nothing that can be shown, say why and end the page there."""
    found = st.session_state.get(CURRENT)
    if not isinstance(found, Current):
        st.title(title, anchor=False)
        problem = st.session_state.get(PROBLEM, "")
        st.info(f"There is no trace to plan for yet: {problem}. The form on the left is where to mend it.")
        st.stop()
    return found


def pinned() -> Current | None:
    """Return the scenario that was put aside to compare with."""
    found = st.session_state.get(PINNED)
    return found if isinstance(found, Current) else None


@contextmanager
def told_in_place() -> Iterator[None]:
    """Show what a user can mend as one line where it happened, and end the page there."""
    try:
        yield
    except (UserError, TraceError) as error:
        st.error(str(error))
        st.stop()


@lru_cache(maxsize=1)
def _sample() -> Trace:
    return sample()


@lru_cache(maxsize=8)
def _made(scenario: Scenario) -> Trace:
    return made(scenario)
