"""The few numbers that the engine's cost-aware router prices requests by, from a profile's costs: the engine itself knows no cost model."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
from scipy.optimize import nnls

from engine.blueprint import Blueprint
from engine.config import ServingConfig
from engine.router_costs import RouterCosts
from engine.step import StepShape
from sim.replica import StepTimes
from traces.metrics import Slo

USUAL_KV_TOKENS = 256  # of a decode row, for which steps are priced
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
ADAPTERS_SHARE = 0.5  # of the pool that adapters are taken to have


def router_costs(costs: StepTimes, plan: Blueprint, slo: Slo) -> RouterCosts:
    """Return a straight line through the prices of decode steps by rows and adapters, and a token's price of a full prompt chunk."""
    config = plan.config
    footprints = list(plan.footprints.values())
    weight_bytes = int(np.mean([item.weight_bytes for item in footprints])) if footprints else 0
    copy_bytes = int(np.mean([item.copy_bytes for item in footprints])) if footprints else 0
    pages = float(np.mean([item.pages for item in footprints])) if footprints else 1.0
    sizes = [rows for rows in ROWS if rows <= config.max_num_seqs]
    grid = [
        (rows, adapters)
        for rows in sizes
        for adapters in sorted({1, rows // 2, rows} - {0} if footprints else {0})
        if adapters <= max(1, len(footprints))
    ]
    times_s = np.array([costs.step_s(_decodes(rows, adapters, weight_bytes)) for rows, adapters in grid])
    features = np.array([(1.0, rows, adapters) for rows, adapters in grid])
    line, _ = nnls(features / times_s[:, None], np.ones(len(grid)))
    chunk = config.max_num_batched_tokens
    prompt_s = costs.step_s(
        StepShape(
            prefill_tokens=chunk,
            prefill_chunks=1,
            prefill_pairs=chunk * (chunk + 1) // 2,
            prefill_kv_tokens=chunk,
            prefill_kv_max=chunk,
            sample_rows=1,
            lora_tokens=chunk if footprints else 0,
            lora_adapters=1 if footprints else 0,
            lora_bytes=weight_bytes,
            lora_token_bytes=chunk * weight_bytes,
        )
    )
    kept = ADAPTERS_SHARE * plan.memory.num_pages / pages
    return RouterCosts(
        prefill_token_s=prompt_s / chunk,
        step_s=max(float(line[0]), 1e-6),
        row_s=float(line[1]),
        adapter_s=float(line[2]),
        load_s=costs.load_s(copy_bytes) if footprints else 0.0,
        resident_adapters=max(1, int(kept)),
        chunk_tokens=chunk,
        ttft_slo_s=slo.ttft_s,
        tpot_slo_s=slo.tpot_s,
    )


def with_router_costs(config: ServingConfig, costs: StepTimes, plan: Blueprint, slo: Slo) -> ServingConfig:
    """Return the configuration with the router `cost_aware` and what it prices by."""
    found = asdict(router_costs(costs, plan, slo))
    rounded = {
        name: value if isinstance(value, int) else float(f"{value:.6g}") for name, value in found.items()
    }
    return config.with_changes(router="cost_aware", router_costs=rounded)


def _decodes(rows: int, adapters: int, weight_bytes: int) -> StepShape:
    single = adapters if adapters == rows else max(0, 2 * adapters - rows)
    return StepShape(
        decode_rows=rows,
        decode_kv_tokens=rows * USUAL_KV_TOKENS,
        decode_kv_max=USUAL_KV_TOKENS,
        sample_rows=rows,
        lora_tokens=rows if adapters else 0,
        lora_adapters=adapters,
        lora_bytes=adapters * weight_bytes,
        lora_single_bytes=single * weight_bytes,
        lora_token_bytes=rows * weight_bytes if adapters else 0,
    )
