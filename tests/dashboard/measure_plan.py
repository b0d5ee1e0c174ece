"""A plan in the page against one on the command line: `python -m tests.dashboard.measure_plan TRACE [ROUNDS]`.

Each round is a command, then an upload and a click in a browser, with the defaults of both, on 8 GPUs. Wall: until the command ends, and from the
click until the recommendation is seen. CPU: of the command's processes; of the server's and the search's, and of the browser's. Where other work
is running, CPU tells more than wall.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import Browser

from tests.dashboard import browser

GPUS = 8
EVERY_S = 0.25
TICKS = os.sysconf("SC_CLK_TCK")


class Cpu:
    """CPU seconds of this process's descendants, by which child they descend from. Processes that ended count with what was last seen."""

    def __init__(self) -> None:
        self._most: dict[int, float] = {}
        self._child: dict[int, int] = {}

    def look(self) -> None:
        """Read /proc once."""
        parents, seconds = {}, {}
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                pid = int(folder.name)
                fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
                parents[pid], seconds[pid] = int(fields[1]), (int(fields[11]) + int(fields[12])) / TICKS
        for pid in seconds:
            if pid not in self._child and (child := _child_above(pid, parents)):
                self._child[pid] = child
            if pid in self._child:
                self._most[pid] = max(seconds[pid], self._most.get(pid, 0.0))

    def by_child(self) -> dict[int, float]:
        """Return the seconds of each child with all below it."""
        found: dict[int, float] = defaultdict(float)
        for pid, seconds in self._most.items():
            found[self._child[pid]] += seconds
        return dict(found)


def _child_above(pid: int, parents: dict[int, int]) -> int | None:
    while pid in parents:
        if parents[pid] == os.getpid():
            return pid
        pid = parents[pid]
    return None


@contextlib.contextmanager
def watched() -> Iterator[Cpu]:
    """Look at the CPU time of what runs in the block."""
    cpu, over = Cpu(), threading.Event()

    def look() -> None:
        while not over.wait(EVERY_S):
            cpu.look()

    cpu.look()
    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    yield cpu
    cpu.look()
    over.set()
    thread.join()


def on_the_command_line(trace: Path) -> tuple[float, float]:
    """Return wall and CPU seconds of `plan`."""
    with tempfile.TemporaryDirectory() as folder, watched() as cpu:
        before = cpu.by_child()
        started_at_s = time.monotonic()
        command = [
            sys.executable,
            "-m",
            "planner",
            "--trace",
            str(trace),
            "--gpus",
            str(GPUS),
            "--output-dir",
            folder,
        ]
        subprocess.run(command, cwd=browser.ROOT, check=True, stdout=subprocess.DEVNULL)
        wall_s = time.monotonic() - started_at_s
    return wall_s, sum(cpu.by_child().values()) - sum(before.values())


def in_the_page(trace: Path, chromium: Browser, driver: set[int]) -> tuple[float, float, float]:
    """Return wall seconds, and CPU seconds of server and search, and of the browser. driver: the browser's processes."""
    with browser.server() as base:
        page = chromium.new_page(viewport={"width": browser.WIDTH, "height": browser.HEIGHT})
        page.goto(base)
        browser.settled(page)
        page.get_by_text("Upload a file").click()
        page.locator("input[type=file]").set_input_files(trace)
        button = page.get_by_role("button", name="Search for a plan")
        button.wait_for(timeout=60_000)
        browser.settled(page)
        with watched() as cpu:
            before = cpu.by_child()
            started_at_s = time.monotonic()
            button.click()
            while not page.get_by_text("Recommended:").count():  # Playwright's own wait looks at each frame
                page.wait_for_timeout(250)
            wall_s = time.monotonic() - started_at_s
        page.context.close()
    spent = {child: seconds - before.get(child, 0.0) for child, seconds in cpu.by_child().items()}
    shown = sum(seconds for child, seconds in spent.items() if child in driver)
    return wall_s, sum(spent.values()) - shown, shown


def main() -> int:
    """Measure and print."""
    trace, rounds = Path(sys.argv[1]).resolve(), int(sys.argv[2]) if len(sys.argv) > 2 else 1
    with browser.browser() as chromium:
        first = Cpu()
        first.look()
        driver = set(first.by_child())
        for _ in range(rounds):
            load = os.getloadavg()[0]
            wall_s, cpu_s = on_the_command_line(trace)
            print(f"command: {wall_s:.1f} s, CPU {cpu_s:.1f} s; load average before {load:.1f}", flush=True)
            load = os.getloadavg()[0]
            wall_s, cpu_s, shown_s = in_the_page(trace, chromium, driver)
            print(
                f"page: {wall_s:.1f} s, CPU {cpu_s:.1f} s + {shown_s:.1f} s of the browser; load average before {load:.1f}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
