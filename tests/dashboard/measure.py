"""How long a person waits: `python -m tests.dashboard.measure` prints seconds to the first screen and to each page.

First: from the address to the recommendation's numbers, and to the last chart, in a new browser context: of the server's first visitor (who waits for
imports too) and of later ones. Switch: from a click on a page's name to all of it drawn.
"""

import os
import statistics
import sys
import time

from playwright.sync_api import Page

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


def first_screen(page: Page, base: str) -> tuple[float, float]:
    """Return the seconds to the numbers and to the whole first page."""
    started_at_s = time.monotonic()
    page.goto(base, wait_until="commit")
    page.get_by_text("Recommended:").wait_for()
    page.locator("[data-testid=stMetricValue]").first.wait_for()
    numbers_s = time.monotonic() - started_at_s
    browser.settled(page)
    return numbers_s, time.monotonic() - started_at_s


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
    with browser.server() as base, browser.browser() as chromium:
        for visitor in ("first visitor", *(["later visitor"] * ROUNDS)):
            page = chromium.new_page(viewport={"width": browser.WIDTH, "height": browser.HEIGHT})
            numbers_s, whole_s = first_screen(page, base)
            print(f"{visitor}: numbers after {numbers_s:.2f} s, all charts after {whole_s:.2f} s", flush=True)
        waits: dict[str, list[float]] = {}
        for _ in range(ROUNDS):
            for title in (*TITLES, "Compare and cost", "Plan"):
                waits.setdefault(title, []).append(switch(page, title))
        for title, seconds in waits.items():
            print(f"switch to {title}: median {statistics.median(seconds):.2f} s of {len(seconds)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
