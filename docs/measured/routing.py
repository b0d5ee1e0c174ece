"""The router table of docs/scheduling.md: four GPUs behind each router, in simulation: python -m docs.measured.routing [--requests 6000].

Prints Markdown. Deterministic: equal code and profile give equal tables.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from engine.adapter import adapters_of_trace
from engine.blueprint import blueprint
from engine.config import ServingConfig
from sim.costs import costs_for
from sim.profile import find_profile, load_profile
from sim.router_costs import with_router_costs
from sim.simulate import simulate
from traces import Trace
from traces.assign import Assignment, assign
from traces.like import LIKE, synthesize_like
from traces.metrics import Slo
from traces.synth import S_LORA, synthesize

REPLICAS, SEED = 4, 3
ROUTERS = ("round_robin", "least_loaded", "adapter_affinity", "cost_aware")
SLO = Slo(ttft_s=0.2, tpot_s=0.03)


def scenarios(requests: int) -> dict[str, tuple[Trace, dict[str, int]]]:
    """Return traces by name, and what each changes in the configuration."""
    wide = Assignment(adapters=400, zipf_s=0.92, rank_mix=(8, 16, 32, 64, 128), seed=SEED)
    lengths = synthesize(replace(S_LORA, rate_rps=120.0), requests, SEED)
    code = synthesize_like(LIKE["azure-code"], requests, SEED, rate_rps=28.0, max_model_len=8192)
    conv = synthesize_like(LIKE["azure-conv"], requests, SEED, rate_rps=50.0, max_model_len=8192)
    return {
        "S-LoRA's lengths, 120 req/s": (assign(lengths, wide), {}),
        "the same, pools of 8,000 pages": (assign(lengths, wide), {"num_pages": 8000}),
        "like Azure's conversations, 50 req/s": (assign(conv, wide), {}),
        "like Azure's code (bursts), 28 req/s": (assign(code, wide), {}),
    }


def main() -> None:
    """Print one table a scenario."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=6000)
    profile = load_profile(find_profile(ServingConfig()))
    for name, (trace, changes) in scenarios(parser.parse_args().requests).items():
        base = ServingConfig(replicas=REPLICAS, **changes)
        costs = costs_for(profile, base)
        adapters = adapters_of_trace(trace.adapters)
        print(f"\n**{name}**\n")
        print("| router | req/s | TTFT p50 | p95 | p99 | TPOT p50 | p95 | SLO met | loads |")
        print("|---|---|---|---|---|---|---|---|---|")
        for router in ROUTERS:
            config = base.with_changes(router="least_loaded" if router == "cost_aware" else router)
            if router == "cost_aware":
                config = with_router_costs(config, costs, blueprint(config, adapters), SLO)
            found = simulate(trace, config, costs, slo=SLO).metrics
            cells = [f"{found['throughput_rps']:.1f}"]
            cells += [f"{1e3 * found[f'ttft_{at}_s']:.0f} ms" for at in ("p50", "p95", "p99")]
            cells += [f"{1e3 * found[f'tpot_{at}_s']:.1f} ms" for at in ("p50", "p95")]
            cells += [f"{found['slo_attainment']:.1%}", f"{found['adapter_loads']:,}"]
            print(f"| {router} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
