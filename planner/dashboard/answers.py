"""How a page gets an answer that takes long: from what this server knows, from what ships, or from a search in the background."""

from __future__ import annotations

import streamlit as st

from planner.background import Job
from planner.dashboard.state import background
from planner.task import Answer, Task
from planner.worked import find_worked

EVERY_S = 1.0  # each look costs server and browser CPU that the search could use


def answer_for(task: Task, *, begin: bool = True, button: str = "Search") -> Answer | None:
    """Return a task's answer; while there is none, show how far it is, or a button that begins it, and return None.

    begin: begin it unasked.
    """
    searches, key = background(), task.key
    job = searches.find(key)
    if job is None:
        worked = find_worked(task)
        if worked is not None and not worked.stale:
            return searches.put(task, worked.answer).answer
        if worked is not None:
            _outdated(searches.start(task))
            return worked.answer
        if begin:
            job = searches.start(task)
    if job is None:
        _ask(task, button)
        return None
    if job.state == "done":
        return job.answer
    worked = find_worked(task)
    if worked is not None:
        _outdated(job)
        return worked.answer
    _unfinished(job, task)
    return None


def peek(task: Task) -> Answer | None:
    """Return a task's answer if it is known already; begin and show nothing."""
    job = background().find(task.key)
    if job is not None and job.state == "done":
        return job.answer
    worked = find_worked(task)
    return None if worked is None else worked.answer


def _ask(task: Task, button: str) -> None:
    if st.button(button, type="primary", key=f"start_{task.key}"):
        background().start(task)
        st.rerun()


def _unfinished(job: Job, task: Task) -> None:
    if not job.ended:
        _progress(job.key)
        return
    if job.state == "failed":
        st.error(job.error)
    else:
        st.info("The search was cancelled.")
    if st.button("Search again", key=f"again_{job.key}"):
        background().start(task)
        st.rerun()


def _outdated(job: Job) -> None:
    if job.state == "failed":
        st.warning(f"This answer came from an earlier version of the code. {job.error}")
        return
    st.warning(
        "This answer came from an earlier version of the code or the measurements; it is being worked out anew."
    )
    if not job.ended:
        _progress(job.key)


@st.fragment(run_every=EVERY_S)
def _progress(key: str) -> None:
    """Show how far a search is, a button to cancel it, and the page anew when it has ended."""
    job = background().find(key)
    if job is None or job.ended:
        st.rerun()
    count = f": {job.done} of {job.total}" if job.total else ""
    bar, stop = st.columns([5, 1], vertical_alignment="bottom")
    bar.progress(job.share, text=f"{job.stage.capitalize()}{count}")
    if stop.button("Cancel", key=f"cancel_{key}", width="stretch"):
        background().cancel(key)
        st.rerun()
