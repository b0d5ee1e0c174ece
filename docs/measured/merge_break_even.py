"""When merging pays, by the simulator's costs: python -m docs.measured.merge_break_even.

First: how many decode steps of one adapter alone a merge (and taking out) is worth, by rank and batch. Then: throughput of a saturated trace
under never and hot by the share of the requests that the hot adapter has. Prints Markdown; needs no GPU; says whether switch costs were measured.
"""

from __future__ import annotations

from dataclasses import replace

from docs.measured.merge_replay import skewed
from engine.adapter import AdapterSpec
from engine.blueprint import blueprint
from engine.config import ServingConfig
from engine.step import StepShape
from sim.costs import StepCosts, costs_for
from sim.merge_costs import switches_of
from sim.profile import find_profile, load_profile
from sim.simulate import simulate

CONTEXT = 512
BATCHES, RANKS = (1, 8, 32, 128, 256), (16, 64, 128)
SHARES = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0)
REQUESTS, RATE_RPS = 450, 60.0


def main() -> None:
    """Print both tables."""
    config = ServingConfig()
    costs = costs_for(load_profile(find_profile(config)), config)
    print_break_even(config, costs)
    print_shares(config, costs)


def print_break_even(config: ServingConfig, costs: StepCosts) -> None:
    """Print decode steps a merge is worth."""
    specs = {f"r{rank}": AdapterSpec(name=f"r{rank}", rank=rank) for rank in RANKS}
    plan = blueprint(config.with_changes(merge="dynamic"), specs)
    switches = switches_of(plan)
    assert switches is not None
    print(f"Switch costs: {switches.provenance}\n")
    print("| rank | in + out, ms | " + " | ".join(f"batch {batch}" for batch in BATCHES) + " |")
    print("|" + "---|" * (len(BATCHES) + 2))
    for name in specs:
        both_s = switches.between(None, name) + switches.between(name, None)
        cells = []
        for batch in BATCHES:
            gain_s = costs.step_s(decode_of(batch, plan.footprints[name].weight_bytes)) - costs.step_s(
                decode_of(batch, 0)
            )
            cells.append(f"{both_s / gain_s:.0f} ({1e3 * gain_s:.2f} ms)" if gain_s > 0 else "never")
        print(f"| {name[1:]} | {1e3 * both_s:.1f} | " + " | ".join(cells) + " |")


def decode_of(batch: int, weight_bytes: int) -> StepShape:
    """Return a decode step of one adapter (no bytes: of the base)."""
    base = StepShape(
        decode_rows=batch, decode_kv_tokens=batch * CONTEXT, decode_kv_max=CONTEXT, sample_rows=batch
    )
    if not weight_bytes:
        return base
    return replace(
        base, lora_tokens=batch, lora_adapters=1, lora_bytes=weight_bytes, lora_single_bytes=weight_bytes * (batch == 1),
        lora_token_bytes=batch * weight_bytes,
    )  # fmt: skip


def print_shares(config: ServingConfig, costs: StepCosts) -> None:
    """Print throughput by the hot adapter's share."""
    print("\n| share of the hot adapter | never, req/s | hot | dynamic | hot over never |")
    print("|---|---|---|---|---|")
    for share in SHARES:
        trace = skewed(REQUESTS, RATE_RPS, share, False)
        modes = (
            config,
            config.with_changes(merge="hot", merge_adapter="adapter-00"),
            config.with_changes(merge="dynamic"),
        )
        if "adapter-00" not in trace.adapters:
            modes = (modes[0], config.with_changes(merge="hot"), modes[2])
        found = [simulate(trace, mode, costs).metrics["throughput_rps"] for mode in modes]
        print(
            f"| {share:.0%} | "
            + " | ".join(f"{rps:.2f}" for rps in found)
            + f" | {found[1] / found[0]:.3f} |"
        )


if __name__ == "__main__":
    main()
