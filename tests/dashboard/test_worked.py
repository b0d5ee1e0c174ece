"""The answers that ship are what the planner says now."""

import pytest

from engine.config import ServingConfig
from planner import worked
from planner.answers import answer, question
from planner.worked import default_plan_task, default_tasks, find_worked
from sim.costs import costs_for
from sim.simulate import simulate

HINT = "the shipped answers are not this code's: make worked-answers"


def shipped(task):
    found = find_worked(task)
    assert found is not None, HINT
    return found.answer


def without_times(value):
    return {name: item for name, item in value.items() if name != "took_s"}


def test_every_page_has_an_answer_that_ships() -> None:
    plan = shipped(default_plan_task())
    kinds = [task.kind for task in default_tasks(plan) if shipped(task)]
    assert kinds == [*worked.ABOUT_A_CHOICE, "trust"]


def test_the_shipped_recommendation_does_what_it_says() -> None:
    """One simulation of it, to see in seconds what `test_fresh_answers_are_equal` sees in minutes."""
    task = default_plan_task()
    best = shipped(task)["plan"]["recommended"]
    asked = question(task)
    config = ServingConfig.from_json(best["config"])
    result = simulate(
        task.trace, config, costs_for(asked.profile, config), adapters=asked.specs, slo=asked.slo, seed=42
    )
    said = {name: best["predicted"][name]["value"] for name in ("ttft_p95_s", "tpot_p95_s", "slo_attainment")}
    assert {name: result.metrics[name] for name in said} == pytest.approx(said), HINT


@pytest.mark.slow
def test_fresh_answers_are_equal() -> None:
    first = default_plan_task()
    plan = answer(first, lambda stage, done, total: None)
    assert without_times(plan) == without_times(shipped(first)), HINT
    for task in default_tasks(plan):
        fresh = answer(task, lambda stage, done, total: None)
        assert without_times(fresh) == without_times(shipped(task)), f"{task.kind}: {HINT}"
