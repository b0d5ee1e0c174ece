"""The dashboard as a person meets it: a server of its own and a headless Chromium.

`python -m tests.dashboard.browser` takes the screenshots of docs/screenshots anew (`make screenshots`).
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).parent.parent.parent
SHOTS = ROOT / "docs" / "screenshots"
WIDTH, HEIGHT = 1280, 900
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PAGES = ("plan", "attainment", "memory", "trust", "pareto", "adapters", "traffic", "compare")
CHART = "[data-testid=stVegaLiteChart] canvas, [data-testid=stVegaLiteChart] svg.marks"
MOST_BYTES = 300_000


def find_browser() -> str | None:
    """Return Debian's Chromium."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


@contextlib.contextmanager
def server(script: str = "app.py") -> Iterator[str]:
    """Serve the dashboard, or another script, on a free port until the block ends; yield its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "streamlit", "run", script, "--server.port", str(port)]
    process = subprocess.Popen(
        [*command, "--server.address", "127.0.0.1"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    try:
        _wait_until_up(address, process)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=30)


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """Start Chromium for a block."""
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=find_browser(), args=["--no-sandbox"])
        yield started
        started.close()


def settled(page: Page, most_s: float = 120.0) -> None:
    """Wait until the page is drawn: the form is there, nothing is being worked out, no chart is empty, nothing is stale."""
    page.wait_for_selector("h1", timeout=most_s * 1e3)
    page.wait_for_function(
        """() => document.querySelector('[data-testid=stSidebar] [data-testid=stNumberInput]')
            && document.querySelector('[data-testid=stApp][data-test-script-state=notRunning]')
            && !document.querySelector('[data-testid=stStatusWidget], [data-testid=stSkeleton], [data-stale=true]')
            && [...document.querySelectorAll('[data-testid=stVegaLiteChart]')].every(
                chart => chart.querySelector('canvas, svg.marks'))""",
        timeout=most_s * 1e3,
    )


def whole_page(page: Page) -> None:
    """Make the window as tall as the page, so that one picture holds all of it."""
    page.wait_for_timeout(800)
    tall = page.evaluate("document.querySelector('[data-testid=stMainBlockContainer]').scrollHeight")
    page.set_viewport_size({"width": WIDTH, "height": max(HEIGHT, min(4000, int(tall) + 20))})
    page.wait_for_timeout(1200)


def shoot(page: Page, name: str) -> Path:
    """Take a picture of the whole page, small enough to keep in a repository."""
    from PIL import Image

    whole_page(page)
    SHOTS.mkdir(parents=True, exist_ok=True)
    path = SHOTS / f"{name}.png"
    page.screenshot(path=path)
    with Image.open(path) as picture:
        whole = picture.convert("RGB")
    whole.save(path, optimize=True)
    if path.stat().st_size > MOST_BYTES:  # the most distant colours are kept: those of charts
        whole.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(path, optimize=True)
    page.set_viewport_size({"width": WIDTH, "height": HEIGHT})
    return path


def address_of(base: str, name: str) -> str:
    """Return a page's address; the first page's is the bare one."""
    return base if name == PAGES[0] else f"{base}/{name}"


def main() -> int:
    """Take all screenshots, and the first page's in the dark theme."""
    with server() as base, browser() as chromium:
        for scheme, names in (("light", PAGES), ("dark", ("plan", "attainment", "trust"))):
            context = chromium.new_context(
                viewport={"width": WIDTH, "height": HEIGHT},
                color_scheme=scheme,  # type: ignore[arg-type]
            )
            page = context.new_page()
            for name in names:
                page.goto(address_of(base, name))
                settled(page)
                path = shoot(page, name if scheme == "light" else f"{name}-dark")
                size = path.stat().st_size
                print(f"{path.relative_to(ROOT)}: {size:,} bytes", flush=True)
                if size > MOST_BYTES:
                    return 1
    return 0


def _wait_until_up(address: str, process: subprocess.Popen[bytes], most_s: float = 60.0) -> None:
    ends_at_s = time.monotonic() + most_s
    while time.monotonic() < ends_at_s and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/_stcore/health", timeout=2):
            return
        time.sleep(0.2)
    raise RuntimeError("the dashboard did not come up")


if __name__ == "__main__":
    sys.exit(main())
