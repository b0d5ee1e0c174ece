"""A made-up simulator with a known optimum: latency grows with the load on a replica, and each setting has a capacity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.adapter import adapters_of_trace
from engine.config import ServingConfig
from engine.step import StepShape
from planner.jobs import Runner
from planner.probe import Prober
from planner.search import Findings, search
from planner.space import Space
from planner.workers import Workers
from planner.workload import Workload
from sim.heating import Heating
from sim.result import SimResult, Utilisation
from sim.segment import DecodeRun
from traces import Trace, TraceRequest
from traces.metrics import Slo, metrics

CAPACITY_RPS = {1: 10.0, 2: 16.0, 4: 24.0, 8: 30.0}  # of a replica, by TP degree


def capacity_rps(config: ServingConfig) -> float:
    """What a configuration sustains: 2,048 tokens a step are best, 64 sequences too few."""
    chunk = {512: 0.7, 1024: 0.9, 2048: 1.0}[config.max_num_batched_tokens]
    slots = {64: 0.8}.get(config.max_num_seqs, 1.0)
    return CAPACITY_RPS[config.tp] * chunk * slots * config.replicas


def simulate(trace: Trace, config: ServingConfig, costs: Any, *, slo: Slo, **_: Any) -> SimResult:
    """5 % of the requests are late at the capacity, one in a hundred more for each percent beyond."""
    rows = np.arange(len(trace))
    load = trace.rate_rps / capacity_rps(config)
    late = rows < len(trace) * min(1.0, max(0.0, load - 0.95))
    columns = {
        "arrival_s": trace.columns.arrival_s,
        "scheduled_s": trace.columns.arrival_s,
        "first_token_s": trace.columns.arrival_s + np.where(late, 2 * slo.ttft_s, 0.5 * slo.ttft_s),
        "output_tokens": trace.columns.output_tokens,
        "adapter": np.full(len(trace), None, dtype=object),
        "load_wait_s": np.zeros(len(trace)),
        "prompt_tokens": trace.columns.prompt_tokens,
        "preemptions": np.zeros(len(trace)),
        "cached_tokens": np.zeros(len(trace)),
    }
    columns["finish_s"] = columns["first_token_s"] + 0.5 * slo.tpot_s * (trace.columns.output_tokens - 1)
    use = Utilisation(
        step_share=min(1.0, load),
        gpu_share=min(1.0, load),
        link_share=0.0,
        kv_pages_mean=0.1,
        kv_pages_max=0.2,
        adapter_pages_mean=0.1,
        adapter_pages_max=0.1,
        sequences_mean=0.1,
        sequences_max=0.1,
        batch_mean=1.0,
        time_shares={},
    )
    return SimResult(
        metrics=metrics(columns, slo),
        columns=columns,
        utilisation=use,
        bottleneck="matmul",
        facts={},
        refused={},
        adapter_loads=0,
        duration_s=trace.duration_s,
    )


@dataclass(frozen=True)
class FakeCosts:
    """So many seconds a token."""

    second: float
    heating: Heating | None = None

    def step_s(self, shape: StepShape) -> float:
        return self.second * shape.tokens

    def host_s(self, shape: Any) -> float:
        return 0.0

    def load_s(self, num_bytes: int) -> float:
        return 0.0

    def decode_run(self, shape: Any, steps: int) -> DecodeRun:
        return DecodeRun(self.second, 0.0, steps)

    def parts_s(self, shape: Any) -> dict[str, float]:
        return {}

    def provenance(self, shape: Any) -> str:
        return "interpolated"


@dataclass(frozen=True)
class FakePrice:
    """The same costs whatever is asked."""

    second: float

    def __call__(self, config: ServingConfig) -> FakeCosts:
        return FakeCosts(self.second)


def even_trace(rate_rps: float, count: int = 400, prompt: int = 100, output: int = 50) -> Trace:
    """Requests at equal distances, over a few adapters."""
    return Trace(
        TraceRequest(
            id=i,
            arrival_s=i / rate_rps,
            prompt_tokens=prompt,
            output_tokens=output,
            adapter=f"a{i % 5}",
            rank=8,
        )
        for i in range(count)
    )


def find(
    rate_rps: float,
    gpus: int,
    *,
    workers: int = 1,
    simulate: Callable[..., SimResult] = simulate,
    second: float = 1e-4,
    slo: Slo | None = None,
    **space: Any,
) -> Findings:
    """Search a space with the fake simulator."""
    trace = even_trace(rate_rps)
    prober = Prober(
        workload=Workload.of(trace),
        slo=slo or Slo(),
        adapters=adapters_of_trace(trace.adapters),
        price=FakePrice(second),
        simulate=simulate,
    )
    with Workers(Runner(prober), workers) as jobs:
        return search(Space(gpus=gpus, **space), prober, jobs)
