"""Builds an engine, replays a trace on it and writes the run record."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from engine.adapter import AdapterSpec
from engine.blueprint import Blueprint, blueprint
from engine.build import Progress, build_runner
from engine.config import ServingConfig
from engine.engine import Engine
from engine.merge_choice import with_hot_adapter
from engine.provenance import provenance
from engine.replay import Served, replay, replay_on_replicas, requests_frame, steps_frame
from engine.replica_process import ReplicaReport
from engine.replicas import Replicas
from traces import Trace
from traces.metrics import metrics
from traces.run_record import RunRecord, write_run


def record_replays(
    config: ServingConfig,
    adapters: Mapping[str, AdapterSpec],
    replays: Sequence[tuple[Trace, Path]],
    *,
    seed: int,
    load_level: float | None,
    progress: Progress,
) -> list[dict[str, float]]:
    """Serve traces in real time, one after the other on one runner and each from a cold GPU; write each record; return the metrics."""
    config = with_hot_adapter(config, (row.adapter for trace, _ in replays for row in trace.requests))
    plan = blueprint(config, adapters)  # what is wrong with the configuration itself is said first
    if config.replicas > 1:
        return _record_on_replicas(plan, replays, seed, load_level, progress)
    runner = build_runner(config, adapters, seed=seed, progress=progress)
    totals = []
    try:
        for trace, out in replays:
            runner.builder.clear()
            engine = Engine(runner.blueprint, runner)
            served = replay(engine, trace, seed=seed, progress=_teller(trace, progress))
            report = ReplicaReport(
                steps=engine.steps,
                adapter_loads=engine.scheduler.residency.loads,
                memory_used_bytes=_memory_used_bytes(runner.device),
            )
            totals.append(
                write_record(plan, served, {0: report}, trace, out, seed=seed, load_level=load_level)
            )
    finally:
        runner.close()
    return totals


def _record_on_replicas(
    plan: Blueprint,
    replays: Sequence[tuple[Trace, Path]],
    seed: int,
    load_level: float | None,
    progress: Progress,
) -> list[dict[str, float]]:
    progress(f"building {plan.config.replicas} replicas")
    replicas = Replicas(plan.config, plan.adapters, seed=seed)
    totals = []
    try:
        replicas.await_ready()
        for trace, out in replays:
            served = replay_on_replicas(replicas, plan, trace, seed=seed, progress=_teller(trace, progress))
            reports = replicas.reports()
            for index in replicas.lost:
                progress(f"replica {index} died; the others served its requests")
            totals.append(write_record(plan, served, reports, trace, out, seed=seed, load_level=load_level))
    finally:
        replicas.close()
    return totals


def _teller(trace: Trace, progress: Progress) -> Callable[[float, int], None]:
    progress(f"replaying {trace.name}: {len(trace)} requests over {trace.duration_s:.0f} s")
    return lambda now_s, left: progress(f"{now_s:6.1f} s  {left} unfinished")


def write_record(
    plan: Blueprint,
    served: list[Served],
    reports: Mapping[int, ReplicaReport],
    trace: Trace,
    out: Path,
    *,
    seed: int,
    load_level: float | None,
) -> dict[str, float]:
    """Write what replicas did with a trace; return the metrics."""
    config = plan.config
    adapters = {name: plan.adapters[name] for name in trace.adapters}
    requests = requests_frame(served, {name: spec.rank for name, spec in adapters.items()})
    totals = metrics(requests, adapter_loads=sum(report.adapter_loads for report in reports.values()))
    run: dict[str, Any] = {
        "schema_version": 1,
        "config": config.to_json(),
        "backend": config.backend,
        "trace": {
            "name": trace.name,
            "requests": len(trace),
            "duration_s": trace.duration_s,
            "rate_rps": trace.rate_rps,
        },
        "adapters": [_adapter_json(spec) for spec in adapters.values()],
        "seed": seed,
        "load": load_level,
        "num_pages": plan.memory.num_pages,
        "page_bytes": plan.memory.page_bytes,
        "steps": sum(len(report.steps) for report in reports.values()),
        "gpu_memory_used_bytes": next(iter(reports.values())).memory_used_bytes,
        "totals": totals,
        **provenance(),
    }
    steps = pd.concat(
        [
            steps_frame(report.steps).assign(**({"replica": index} if config.replicas > 1 else {}))
            for index, report in reports.items()
        ]
    )
    write_run(out, RunRecord(run=run, requests=requests, steps=steps.reset_index(drop=True)))
    return totals


def _memory_used_bytes(device: torch.device) -> int | None:
    """Return what is in use on the GPU, context and graphs included."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def _adapter_json(spec: AdapterSpec) -> dict[str, Any]:
    data = asdict(spec)
    data["path"] = None if spec.path is None else str(spec.path)
    return data
