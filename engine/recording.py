"""Builds an engine, replays a trace on it and writes the run record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from engine.adapter import AdapterSpec
from engine.blueprint import blueprint
from engine.build import Progress, build_runner
from engine.config import ServingConfig
from engine.engine import Engine
from engine.errors import UserError
from engine.provenance import provenance
from engine.replay import Served, replay, requests_frame, steps_frame
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
    blueprint(config, adapters)  # what is wrong with the configuration itself is said first
    if config.replicas != 1:
        raise UserError(
            f"replicas={config.replicas}: the engine replays one replica; more are not built yet. "
            "Replay one with replicas=1 and its share of the trace"
        )
    runner = build_runner(config, adapters, seed=seed, progress=progress)
    totals = []
    try:
        for trace, out in replays:
            runner.builder.clear()
            engine = Engine(runner.blueprint, runner)
            progress(f"replaying {trace.name}: {len(trace)} requests over {trace.duration_s:.0f} s")
            served = replay(
                engine,
                trace,
                seed=seed,
                progress=lambda now_s, left: progress(f"{now_s:6.1f} s  {left} unfinished"),
            )
            totals.append(write_record(engine, served, trace, out, seed=seed, load_level=load_level))
    finally:
        runner.close()
    return totals


def write_record(
    engine: Engine,
    served: list[Served],
    trace: Trace,
    out: Path,
    *,
    seed: int,
    load_level: float | None,
) -> dict[str, float]:
    """Write what an engine did with a trace; return its metrics."""
    config, scheduler = engine.blueprint.config, engine.scheduler
    adapters = {name: engine.blueprint.adapters[name] for name in trace.adapters}
    requests = requests_frame(served, {name: spec.rank for name, spec in adapters.items()})
    totals = metrics(requests, adapter_loads=scheduler.residency.loads)
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
        "num_pages": engine.blueprint.memory.num_pages,
        "page_bytes": engine.blueprint.memory.page_bytes,
        "steps": len(engine.steps),
        "gpu_memory_used_bytes": _memory_used_bytes(engine.runner.device),
        "totals": totals,
        **provenance(),
    }
    write_run(out, RunRecord(run=run, requests=requests, steps=steps_frame(engine.steps)))
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
