"""The capacity-planning dashboard: `streamlit run app.py`. What it serves is planner/dashboard/navigation.py.

The server imports the pages and draws the first one before it takes visitors, so that none of them waits for that.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import streamlit as st

from planner.dashboard.warm_up import lighten, warm_up


@asynccontextmanager
async def _ready(_app: st.App) -> AsyncIterator[None]:
    warm_up()
    lighten()
    yield


app = st.App(Path(__file__).parent / "planner" / "dashboard" / "navigation.py", lifespan=_ready)
