"""Worked answers that ship: what the default scenario's pages show before anything is computed here.

Each is a planner's answer written down by `python -m planner.worked`, with the version of the code and the measurements that it came from. One of
another version is *stale*: it may be shown as what it is, and is to be computed anew. tests/dashboard holds them against fresh ones.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.config import ServingConfig
from engine.errors import UserError
from planner.prices import load_prices
from planner.scenario import Scenario
from planner.task import Answer, Kind, Task, Tell, code_version
from planner.token_cost import CHOICES
from planner.trace_input import sample

FOLDER = Path(__file__).parent / "dashboard" / "worked"
ABOUT_A_CHOICE: tuple[Kind, ...] = ("curve", "traffic", "timeline", "domain", "grid")


@dataclass(frozen=True, slots=True)
class Worked:
    """An answer that ships. stale: other code or other measurements gave it."""

    answer: Answer
    stale: bool


def find_worked(task: Task) -> Worked | None:
    """Return the shipped answer of a task; None where there is none."""
    path = FOLDER / f"{task.kind}.json"
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    if data.get("key") != task.key or not _readable(data["answer"]):
        return None
    return Worked(data["answer"], stale=data.get("version") != code_version())


def _readable(answer: Answer) -> bool:
    """Say whether this code knows every configuration that an answer speaks of."""
    plan = answer.get("plan") or {"alternatives": []}
    known = [plan.get(name) for name in CHOICES]
    try:
        for choice in (*known, *plan["alternatives"]):
            if choice is not None:
                ServingConfig.from_json(choice["config"])
    except UserError:
        return False
    return True


def default_tasks(plan: Answer) -> Iterator[Task]:
    """Yield the tasks about the recommended configuration of the default scenario's plan, and about the recorded runs."""
    scenario = Scenario()
    config = ServingConfig.from_json(plan["plan"]["recommended"]["config"])
    for kind in ABOUT_A_CHOICE:
        yield Task(kind=kind, scenario=scenario, trace=sample(), config=config)
    yield Task(kind="trust", scenario=scenario, trace=sample())


def default_plan_task() -> Task:
    """Return the plan that the first screen shows."""
    scenario = Scenario()
    price = load_prices(None).get(scenario.gpu)
    return Task(kind="plan", scenario=scenario, trace=sample(), usd_per_gpu_hour=price)


def write_all(tell: Tell) -> None:
    """Work every answer out anew and write it."""
    from planner.answers import answer  # what answers are made of takes a second or two to import

    first = default_plan_task()
    plan = answer(first, tell)
    _write(first, plan)
    for task in default_tasks(plan):
        _write(task, answer(task, tell))


def _write(task: Task, found: Answer) -> None:
    FOLDER.mkdir(exist_ok=True)
    data = {"key": task.key, "version": code_version(), "answer": found}
    text = json.dumps(data, indent=1, allow_nan=False, sort_keys=True)
    (FOLDER / f"{task.kind}.json").write_text(text + "\n", "utf-8")


def _tell(stage: str, done: int, total: int) -> None:
    if not done:
        print(f"{stage}: {total}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    write_all(_tell)
