"""How long a person waits: `python -m tests.dashboard.measure` prints seconds to the first screen and to each page.

First: from the address to the recommendation's numbers, and to the last chart, in a new browser context, of the server's first visitor and of later
ones. A bare page of Streamlit's, measured in the same way, is what no dashboard is faster than. Switch: from a click on a page's name to all of
it drawn.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import Browser, Page

from tests.dashboard import browser

TITLES = (
    "SLO against rate",
    "Memory",
    "Trust",
    "Speed against throughput",
    "Adapters × rank",
    "Adapter traffic",
)
ROUNDS = 3
BARE = """
import streamlit as st
st.set_page_config(layout="wide")
st.title("Plan")
st.success("Recommended:")
st.metric("GPUs", 8)
"""


def first_screen(page: Page, base: str, *, whole: bool = True) -> tuple[float, float]:
    """Return the seconds to the numbers and, if asked, to the whole first page."""
    started_at_s = time.monotonic()
    page.goto(base, wait_until="commit")
    page.get_by_text("Recommended:").wait_for()
    page.locator("[data-testid=stMetricValue]").first.wait_for()
    numbers_s = time.monotonic() - started_at_s
    if whole:
        browser.settled(page)
    return numbers_s, time.monotonic() - started_at_s


def floor(chromium: Browser) -> list[float]:
    """Return the seconds to the same of a Streamlit page with nothing else on it, visit by visit."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "bare.py"
        script.write_text(BARE, "utf-8")
        with browser.server(str(script)) as base:
            return [first_screen(page, base, whole=False)[0] for page in visits(chromium, ROUNDS + 1)]


def visits(chromium: Browser, count: int) -> Iterator[Page]:
    """Yield pages of visitors who were never here, one after the other."""
    for _ in range(count):
        page = chromium.new_page(viewport={"width": browser.WIDTH, "height": browser.HEIGHT})
        yield page
        page.close()


def switch(page: Page, title: str) -> float:
    """Return the seconds from a click to the page being drawn."""
    started_at_s = time.monotonic()
    page.get_by_role("link", name=title, exact=True).click()
    page.get_by_role("heading", name=title, exact=True).wait_for()
    browser.settled(page)
    return time.monotonic() - started_at_s


def main() -> int:
    """Measure and print."""
    load = os.getloadavg()
    print(f"load averages {load[0]:.1f} {load[1]:.1f} {load[2]:.1f} on {os.cpu_count()} cores")
    with browser.browser() as chromium:
        print(
            "a bare Streamlit page:",
            " ".join(f"{seconds:.2f}" for seconds in floor(chromium)),
            "s",
            flush=True,
        )
    with browser.server() as base, browser.browser() as chromium:
        for visit, page in enumerate(visits(chromium, ROUNDS + 1)):
            numbers_s, whole_s = first_screen(page, base)
            visitor = "later visitor" if visit else "first visitor"
            print(f"{visitor}: numbers after {numbers_s:.2f} s, all charts after {whole_s:.2f} s", flush=True)
        page = chromium.new_page(viewport={"width": browser.WIDTH, "height": browser.HEIGHT})
        first_screen(page, base)
        waits: dict[str, list[float]] = {}
        for _ in range(ROUNDS):
            for title in (*TITLES, "Compare and cost", "Plan"):
                waits.setdefault(title, []).append(switch(page, title))
        for title, seconds in waits.items():
            print(f"switch to {title}: median {statistics.median(seconds):.2f} s of {len(seconds)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
