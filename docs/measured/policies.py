"""The tables of docs/scheduling.md: policies on synthetic traces, in simulation.

    python -m docs.measured.policies [--requests 4000] [--scenario "near saturation"] [--ageing]

Prints Markdown. Deterministic: equal code and profile give equal tables.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from engine.config import ServingConfig
from engine.queue_clustered import ClusteredQueue
from sim.costs import costs_for
from sim.profile import find_profile, load_profile
from sim.result import SimResult
from sim.simulate import simulate
from traces import Trace
from traces.metrics import Slo
from traces.synth import S_LORA, synthesize

ADAPTERS = 200
SEED = 1
SLO = Slo(ttft_s=1.0, tpot_s=0.05)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """S-LoRA's lengths at a rate; `hot_share` of the requests use adapter 0, the others the rest alike (None: all alike)."""

    rate_rps: float
    hot_share: float | None = None
    rank: int = 16

    def trace(self, requests: int) -> Trace:
        """Draw the trace."""
        base = synthesize(replace(S_LORA, rate_rps=self.rate_rps), requests, SEED)
        rng = np.random.default_rng([SEED, 99])
        index = rng.integers(0, ADAPTERS, requests)
        if self.hot_share is not None:
            light = rng.integers(1, ADAPTERS, requests)
            index = np.where(rng.random(requests) < self.hot_share, 0, light)
        columns = replace(
            base.columns,
            adapter_index=index.astype(np.int64),
            adapter_names=tuple(f"adapter-{number:03d}" for number in range(ADAPTERS)),
            adapter_ranks=(self.rank,) * ADAPTERS,
        )
        return Trace.from_columns(columns, "policies")


SCENARIOS = {
    "near saturation": Scenario(rate_rps=38.0),
    "one hot tenant": Scenario(rate_rps=60.0, hot_share=0.8),
    "twice the capacity": Scenario(rate_rps=84.0),
    "large adapters": Scenario(rate_rps=60.0, rank=64),
}

POLICIES: dict[str, dict[str, Any]] = {
    "fcfs": {},
    "clustered": {"scheduler": "clustered"},
    "clustered, cap 32": {"scheduler": "clustered", "max_adapters_per_step": 32},
    "clustered, cap 8": {"scheduler": "clustered", "max_adapters_per_step": 8},
    "fcfs, cap 32": {"max_adapters_per_step": 32},
    "fair": {"scheduler": "fair"},
    "slo, 1 s": {"scheduler": "slo", "ttft_slo_s": 1.0},
}

HEADER = (
    "| policy | req/s | TTFT p50 | TTFT p99 | light tenants' TTFT p50 | p99 | SLO met | adapters a step | refused |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def run(trace: Trace, changes: dict[str, Any]) -> SimResult:
    """Simulate Llama-3.1-8B on an H200 with the shipped profile."""
    config = ServingConfig(**changes)
    costs = costs_for(load_profile(find_profile(config)), config)
    return simulate(trace, config, costs, slo=SLO, record_steps=True)


def row(name: str, result: SimResult) -> str:
    """Return a result as a line of the table."""
    columns, values = result.columns, result.metrics
    ttft_s = columns["first_token_s"] - columns["arrival_s"]
    light = ttft_s[(columns["adapter"] != "adapter-000") & ~np.isnan(ttft_s)]
    assert result.steps is not None
    distinct = np.mean([step.shape.lora_adapters for step in result.steps])
    times = [values["ttft_p50_s"], values["ttft_p99_s"], *np.percentile(light, [50, 99])]
    cells = [f"{values['throughput_rps']:.1f}", *(f"{time_s:.2f}" for time_s in times)]
    cells += [f"{100 * values['slo_attainment']:.0f} %", f"{distinct:.0f}"]
    cells += [f"{100 * sum(result.refused.values()) / len(columns['id']):.0f} %"]
    return f"| {name} | {' | '.join(cells)} |"


def ageing(requests: int) -> Iterator[str]:
    """Yield what bounds on overtaking give, at twice the capacity."""
    trace = SCENARIOS["twice the capacity"].trace(requests)
    defaults = ClusteredQueue.__init__.__kwdefaults__
    assert defaults is not None
    for bound in (128, 512, 1024, 2048, 8192):
        defaults["most_overtakes"] = bound
        for cap in (None, 32):
            result = run(trace, {"scheduler": "clustered", "max_adapters_per_step": cap})
            yield row(f"{bound}, {'no cap' if cap is None else f'cap {cap}'}", result)


def main() -> None:
    """Print the tables asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--scenario", choices=SCENARIOS)
    parser.add_argument("--ageing", action="store_true")
    options = parser.parse_args()
    if options.ageing:
        print(HEADER, *ageing(options.requests), sep="\n", flush=True)
        return
    for name in [options.scenario] if options.scenario else SCENARIOS:
        print(f"\n{name}: {SCENARIOS[name]}\n\n{HEADER}", flush=True)
        trace = SCENARIOS[name].trace(options.requests)
        for policy, changes in POLICIES.items():
            print(row(policy, run(trace, changes)), flush=True)


if __name__ == "__main__":
    main()
