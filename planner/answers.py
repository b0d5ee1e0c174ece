"""What a task is answered with: the planner's and the simulator's functions by kind of task, each answer as JSON holds it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.adapter import AdapterSpec, adapters_of_trace
from engine.budget import gpu_spec
from engine.config import ServingConfig
from engine.model_shape import load_model_shape
from planner import trust
from planner.adapter_grid import GridAsked, adapter_grid
from planner.adapter_traffic import adapter_traffic
from planner.exports import ENGINES, export
from planner.html_report import html_report
from planner.pareto import pareto_points, slo_corner
from planner.rate_curve import Asked, rate_curve
from planner.recommend import Question, recommend
from planner.space import Space
from planner.task import Answer, Kind, Task, Tell, plain_json
from planner.timeline import watch
from planner.workload import max_model_len
from sim.costs import costs_for
from sim.profile import Profile, find_profile, load_profile
from sim.simulate import simulate

SEED = 42
TRACE_FILE = "trace.jsonl.gz"


def answer(task: Task, tell: Tell) -> Answer:
    """Answer a task. Raises UserError for what cannot be answered, RuntimeError for what failed."""
    started_at_s = time.monotonic()
    answers: dict[Kind, Callable[[Task, Tell], Any]] = {
        "plan": _plan,
        "curve": _curve,
        "grid": _grid,
        "traffic": _traffic,
        "timeline": _timeline,
        "trust": _trust,
        "domain": _domain,
    }
    found: Answer = plain_json(answers[task.kind](task, tell))
    return found | {"took_s": round(time.monotonic() - started_at_s, 2)}


def question(task: Task) -> Question:
    """Return what the planner is asked: the defaults of the command `plan` but for what the scenario says."""
    scenario, profile = task.scenario, profile_of(task.scenario.model, task.scenario.gpu)
    base = ServingConfig(
        model=scenario.model,
        gpu=scenario.gpu,
        max_model_len=max_model_len(task.trace, load_model_shape(scenario.model)),
        page_tokens=profile.page_tokens,
        graph_max_tokens=profile.graph_max_tokens,
    )
    price = task.usd_per_gpu_hour
    return Question(
        trace=task.trace,
        space=Space(gpus=scenario.gpus, base=base),
        slo=scenario.slo,
        profile=profile,
        objective=scenario.objective,
        prices={} if price is None else {scenario.gpu: price},
        seed=SEED,
    )


def profile_of(model: str, gpu: str) -> Profile:
    """Return the shipped profile for a model and a GPU, known by its file's name alone: pages show no paths."""
    gpu_spec(gpu)
    profile = load_profile(find_profile(ServingConfig(model=model, gpu=gpu)))
    return replace(profile, source=Path(profile.source).name)


def _plan(task: Task, tell: Tell) -> dict[str, Any]:
    found = recommend(question(task), progress=tell)
    best = found.recommended
    return {
        "plan": found.to_json(),
        "exports": [] if best is None else _exports(best.config, _adapters(task)),
        "report_html": html_report(found),
        "pareto": pareto_points(found.trials),
        "slo_corner": slo_corner(found.slo),
    }


def _exports(config: ServingConfig, adapters: dict[str, AdapterSpec]) -> list[dict[str, Any]]:
    """Return what a configuration is in the words of every engine; the trace is called as the download is."""
    made = [export(engine, config, adapters, TRACE_FILE) for engine in ENGINES]
    return [
        {"engine": item.engine, "file": item.name, "text": item.text, "warnings": list(item.warnings)}
        for item in made
    ]


def _curve(task: Task, tell: Tell) -> dict[str, Any]:
    profile = _profile(task)
    asked = Asked(
        trace=task.trace,
        config=_config(task),
        slo=task.scenario.slo,
        profile=profile,
        adapters=_adapters(task),
        seed=SEED,
    )
    return rate_curve(asked, tell=tell).to_json()


def _grid(task: Task, tell: Tell) -> dict[str, Any]:
    asked = GridAsked(
        trace=task.trace,
        config=_config(task),
        slo=task.scenario.slo,
        profile=_profile(task),
        seed=SEED,
    )
    return {"cells": adapter_grid(asked, tell=tell)}


def _traffic(task: Task, tell: Tell) -> dict[str, Any]:
    tell("simulating the trace", 0, 1)
    config = _config(task)
    costs = costs_for(_profile(task), config)
    result = simulate(task.trace, config, costs, adapters=_adapters(task), slo=task.scenario.slo)
    return adapter_traffic(result, task.scenario.slo).to_json()


def _timeline(task: Task, tell: Tell) -> dict[str, Any]:
    tell("simulating the trace", 0, 1)
    config = _config(task)
    costs = costs_for(_profile(task), config)
    result, seen = watch(task.trace, config, costs, adapters=_adapters(task), slo=task.scenario.slo)
    return seen.to_json() | {"duration_s": result.duration_s, "bottleneck": result.bottleneck}


def _trust(task: Task, tell: Tell) -> dict[str, Any]:
    tell("simulating the recorded runs", 0, 1)
    return trust.recorded_runs()


def _domain(task: Task, tell: Tell) -> dict[str, Any]:
    tell("simulating the trace", 0, 1)
    return trust.domain(task.trace, _config(task), _adapters(task), _profile(task))


def _profile(task: Task) -> Profile:
    return profile_of(task.scenario.model, task.scenario.gpu)


def _adapters(task: Task) -> dict[str, AdapterSpec]:
    return adapters_of_trace(task.trace.adapters)


def _config(task: Task) -> ServingConfig:
    assert task.config is not None, f"a task {task.kind!r} is about a configuration"
    return task.config
