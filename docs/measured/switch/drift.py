"""What merging in place loses over 10,000 tokens."""

from __future__ import annotations

from dataclasses import replace

import torch

from docs.measured.switch.run import EXPERTS, TOP_K, Run, candidates, ops_of
from engine.dynamic_adapter import DynamicAdapterSpec
from engine.expert_merge import ExpertMerge
from engine.expert_pools import random_expert_pools
from engine.model_shape import ModelShape
from engine.switch_paths import SwitchDecoder
from engine.weights import random_weights
from kernels.sgmm import Sgmm


def measure_drift(run: Run, shape: ModelShape, rank: int) -> None:
    """Merge 10,000 random tokens in place into one layer of real shapes, and say what is lost."""
    shape = replace(shape, num_layers=1, vocab_size=128)
    steps = 3 if run.tiny else 10_000
    ops = ops_of(run)
    weights = random_weights(shape, run.dtype, run.device, seed=0)
    spec = DynamicAdapterSpec(name="d", num_experts=EXPERTS, top_k=TOP_K, rank=rank)
    pools = random_expert_pools(spec, shape, seed=rank, dtype=run.dtype, device=run.device)
    if run.tiny:
        ops = replace(ops, merge_of=lambda plan: Sgmm(plan, candidates(run)[1]))
    merge = ExpertMerge(pools, weights, ops, in_place=True)
    decoder = SwitchDecoder(shape, weights, pools, ops, batch=1, max_tokens=16, merge=merge)
    x = torch.randn(steps, shape.hidden_size, device=run.device).to(run.dtype)
    at = torch.zeros(1, dtype=torch.int64, device=run.device)

    def token() -> None:
        decoder.route.keep_last()
        decoder.route.fill(x.index_select(0, at), pools.routers[0])
        merge.merge_(decoder.route)
        at.add_(1).clamp_(max=steps - 1)

    replay = run.capture(token)
    merge.restore()
    decoder.route.segments.zero_()
    at.zero_()
    update = (
        pools.layers[0][3].a[0].float().square().sum() * pools.layers[0][3].b[0].float().square().sum()
    ).sqrt()
    scale = (update / weights.layers[0].down.float().norm() / rank**0.5).item()
    for done in range(1, steps + 1):
        replay()
        if done in (1, 10, 100, 1000, steps):
            drift = merge.drift(decoder.route)
            bound = 2**-8 / 3**0.5 * done**0.5
            row = {
                "model": shape.name,
                "rank": rank,
                "tokens": done,
                "drift": round(drift, 6),
                "bound": round(bound, 6),
            }
            run.add("drift", {**row, "expert_over_weight": round(scale, 4)})
