"""Predict the bursts that `python -m engine profile --tp 2 --requests 300` served: python -m docs.measured.tp2_bursts."""

import json

import numpy as np

from engine.adapter import AdapterSpec
from engine.config import ServingConfig
from engine.model_shape import load_model_shape
from sim.costs import costs_for
from sim.profile import PROFILES, load_profile
from sim.simulate import simulate
from traces import Trace, TraceRequest

REQUESTS, ADAPTERS, LENGTHS, SEED = 300, 32, (8, 512), 9


def burst(vocabulary, with_adapters, requests=REQUESTS, adapters=ADAPTERS):
    """Return the requests as `engine.parallel_profile` drew them."""
    rng = np.random.default_rng(SEED)
    low, high = LENGTHS
    drawn = []
    for number in range(requests):
        prompt = rng.integers(0, vocabulary, int(rng.integers(low, high + 1)))
        output = int(rng.integers(low, high + 1))
        adapter = f"a{rng.integers(adapters)}"
        drawn.append(
            TraceRequest(
                id=number,
                arrival_s=0.0,
                prompt_tokens=len(prompt),
                output_tokens=output,
                adapter=adapter if with_adapters else None,
            )
        )
    return Trace(drawn, "burst")


def main():
    """Print measured beside predicted."""
    profile = load_profile(PROFILES / "llama-3.1-8b.h200.json")
    measured = json.loads((PROFILES / "llama-3.1-8b.h200.tp2.json").read_text(encoding="utf-8"))["steps"]
    vocabulary = load_model_shape("llama-3.1-8b").vocab_size
    for row in (row for row in measured if row["case"] == "burst"):
        sharding = "replicated" if row["lora_sharding"] == "base" else row["lora_sharding"]
        rank = 32 if row["group"] == "bd16x2" else 16
        options = {"kind": "bd_lora", "nblocks": 2} if sharding == "block_diagonal" else {}
        specs = {f"a{n}": AdapterSpec(name=f"a{n}", rank=rank, **options) for n in range(ADAPTERS)}
        config = ServingConfig(tp=2, lora_sharding=sharding, collectives=row["collectives"])
        trace = burst(vocabulary, row["group"] is not None)
        result = simulate(trace, config, costs_for(profile, config), adapters=specs)
        rps = result.metrics["throughput_rps"]
        name = f"{row['lora_sharding']}, {row['group'] or 'base'} | {row['collectives']}"
        print(f"| {name} | {row['rps']:.1f} | {rps:.1f} | {rps / row['rps'] - 1:+.1%} |")


if __name__ == "__main__":
    main()
