"""A real browser: uploads a trace, runs a plan, opens every page, downloads the plan."""

import json

import pytest

from planner.scenario import Scenario
from planner.trace_input import made
from traces.native import to_lines

browser_of = pytest.importorskip("tests.dashboard.browser", reason="Playwright is not installed")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(browser_of.find_browser() is None, reason="no Chromium: apt-get install chromium"),
]

SMALL = Scenario(source="synthetic", requests=300, rate_rps=4.0, adapters=10, lengths="uniform")
TITLES = {
    "Plan": "Recommended",
    "SLO against rate": "Knee: highest rate",
    "Memory": "Adapters that fit at a time",
    "Trust": "Recorded runs",
    "Speed against throughput": "Pareto front",
    "Adapters × rank": "Bold frame",
    "Adapter traffic": "Found loaded",
    "Compare and cost": "What a million tokens cost",
}


@pytest.fixture(scope="module")
def page():
    with browser_of.server() as base, browser_of.browser() as chromium:
        context = chromium.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
        opened = context.new_page()
        opened.set_default_timeout(120_000)
        opened.goto(base)
        browser_of.settled(opened)
        yield opened


def upload(page, name: str, text: str) -> None:
    page.locator("input[type=file]").set_input_files(
        {"name": name, "mimeType": "application/json", "buffer": text.encode()}
    )


def test_a_person_uploads_a_trace_plans_and_takes_the_plan_away(page) -> None:
    page.get_by_text("Upload a file").click()
    lines = list(to_lines(made(SMALL)))
    upload(page, "broken.jsonl", "\n".join([*lines[:3], '{"arrival_s": 9, "prompt_tokens": 0}']))
    page.get_by_text("broken.jsonl:4: prompt_tokens must be").wait_for()
    upload(page, "mine.jsonl", "\n".join(lines))
    page.get_by_text("mine: 300 requests").wait_for()
    page.get_by_label("GPUs at most").fill("1")
    page.get_by_label("GPUs at most").press("Enter")
    page.get_by_text("at most 1 × H200").wait_for()
    page.get_by_role("button", name="Search for a plan").click()
    page.get_by_role("button", name="Cancel").wait_for()
    page.get_by_text("Recommended:").wait_for(timeout=300_000)
    browser_of.settled(page)
    assert "upload=" in page.url and "gpus=1" in page.url
    with page.expect_download() as downloading:
        page.get_by_role("button", name="Plan (JSON)").click()
    plan = json.loads(downloading.value.path().read_text())
    assert plan["trace"]["requests"] == 300 and plan["recommended"]["config"]["gpu"] == "h200"
    link = page.url
    for title, seen in TITLES.items():
        page.get_by_role("link", name=title, exact=True).click()
        page.get_by_role("heading", name=title, exact=True).wait_for()
        page.get_by_text(seen).first.wait_for(timeout=300_000)
        page.locator(browser_of.CHART).first.wait_for()
        browser_of.settled(page, 300)
        assert page.get_by_text("Traceback").count() == 0
        assert page.locator("[data-testid=stException]").count() == 0
    other = page.context.new_page()
    other.goto(link)
    other.get_by_text("mine: 300 requests").wait_for(timeout=60_000)
    other.get_by_text("Recommended:").wait_for()
    other.close()
