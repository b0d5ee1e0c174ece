"""What the cost model says of S-LoRA's sharding and block-diagonal factors at TP 8: python -m docs.measured.sharding_predictions.

Interval: latency of a collective between eight GPUs as between two, or three times it (a tree's depth); the model takes the latter for NCCL.
"""

import itertools

import sim.costs
import sim.exchange
from engine.adapter import AdapterSpec
from engine.blueprint import blueprint
from engine.config import ServingConfig
from engine.step_profile import MadeUpStep, made_up_shape
from sim.costs import costs_for
from sim.profile import find_profile, load_profile

BATCHES = (1, 16, 32, 64)
KV_TOKENS = 256
RANK = 16
TREE = sim.exchange.log2


def step_ms(profile, model, gpu, sharding, collectives, factor, batch, *, flat):
    """Return a decode step of `batch` distinct adapters (0: a prompt of 1,024 tokens of one), ms."""
    config = ServingConfig(model=model, gpu=gpu, tp=8, lora_sharding=sharding, collectives=collectives)
    kind = {"kind": "bd_lora", "nblocks": 8} if sharding == "block_diagonal" else {}
    specs = {str(n): AdapterSpec(name=str(n), rank=RANK * factor, **kind) for n in range(max(1, batch))}
    wanted = MadeUpStep(decodes=tuple((KV_TOKENS, str(n)) for n in range(batch)))
    if not batch:
        wanted = MadeUpStep(chunks=((0, 1024, "0"),))
    shape = made_up_shape(wanted, blueprint(config, specs).footprints)
    sim.exchange.log2 = (lambda _: 1.0) if flat else TREE
    sim.costs._composed.cache_clear()  # what was priced before by the other
    try:
        return costs_for(profile, config).step_s(shape) * 1e3
    finally:
        sim.exchange.log2 = TREE


def main():
    """Print one row a model, GPU and multiple of the rank."""
    profile = load_profile(find_profile(ServingConfig()))
    print("| model, GPU | block-diagonal rank | decode, b = 1 | 16 | 32 | 64 | prefill 1,024 |")
    print("|---|---|---|---|---|---|---|")
    for model, gpu, factor in itertools.product(
        ("llama-3.1-8b", "llama-3.1-70b"), ("h200", "a100-80"), (2, 4)
    ):
        cells = []
        for batch in (*BATCHES, 0):
            ratios = []
            for flat in (False, True):
                theirs = step_ms(profile, model, gpu, "slora_published", "nccl", 1, batch, flat=flat)
                ours = step_ms(profile, model, gpu, "block_diagonal", "nccl", factor, batch, flat=flat)
                ratios.append(theirs / ours)
            cells.append(f"{ratios[0]:.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        print(f"| {model}, {gpu} | {factor} × {RANK} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
