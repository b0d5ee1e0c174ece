"""One page at a time, as `app.py` draws it, with the answers that ship taken as fresh."""

import dataclasses
import sys

import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

from planner import background, worked
from planner.dashboard import answers
from planner.dashboard.state import background as searches


def script(path):
    from planner.dashboard import pages, scenario_form

    scenario_form.show()
    next(page for page in pages.PAGES if page.path == path).show()


@pytest.fixture(autouse=True)
def own_main():
    """Put `__main__` back, which a drawn page replaces by its script: processes started later would run that."""
    ours = sys.modules["__main__"]
    yield
    sys.modules["__main__"] = ours


@pytest.fixture
def open_page(monkeypatch):
    """Return what opens a page, with a link's query; searches are answered by `fake_process`."""

    def fresh(task):
        found = worked.find_worked(task)
        return None if found is None else dataclasses.replace(found, stale=False)

    monkeypatch.setattr(answers, "find_worked", fresh)
    monkeypatch.setattr(background, "MODULE", "tests.dashboard.fake_process")
    st.cache_resource.clear()

    def opened(path: str, **query: str) -> AppTest:
        page = AppTest.from_function(script, args=(path,), default_timeout=60)
        for name, value in query.items():
            page.query_params[name] = value
        return page.run()

    yield opened
    searches().close()
    st.cache_resource.clear()
