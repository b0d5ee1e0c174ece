"""How fast the simulator is: simulated requests per second of CPU, on S-LoRA's lengths over 200 adapters."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from engine.adapter import adapters_of_trace
from engine.blueprint import blueprint
from engine.config import ServingConfig
from sim.replica import StepTimes
from sim.simulate import simulate
from traces import Trace
from traces.assign import Assignment, assign
from traces.synth import S_LORA, synthesize

ADAPTERS = 200
CAPACITY_REQUESTS = 2000
LOADS = (("10%", 0.1), ("75%", 0.75), ("saturated", 1.5))


def bench(requests: int, config: ServingConfig, costs: StepTimes) -> Iterator[dict[str, Any]]:
    """Yield one row a load: requests simulated per second of CPU, and the process's peak memory so far."""
    capacity_rps = _capacity_rps(config, costs)
    for name, load in LOADS:
        trace = _workload(requests, load * capacity_rps)
        plan = blueprint(config, adapters_of_trace(trace.adapters))
        started_s = time.process_time()
        simulate(trace, config, costs, plan=plan)
        elapsed_s = time.process_time() - started_s
        yield {
            "load": name,
            "requests": requests,
            "requests_per_s": requests / elapsed_s,
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }


def _capacity_rps(config: ServingConfig, costs: StepTimes) -> float:
    """Return the throughput of a backlog that never ends within the trace."""
    flood = _workload(CAPACITY_REQUESTS, 1e5)
    return simulate(flood, config, costs).metrics["throughput_rps"]


def _workload(requests: int, rate_rps: float) -> Trace:
    trace = synthesize(replace(S_LORA, rate_rps=rate_rps), requests, seed=0)
    return assign(trace, Assignment(rule="R1-slora", adapters=ADAPTERS, rank_mix=(16,), seed=0))
