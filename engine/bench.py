"""`python -m engine bench`: the two figures that engines are compared by, measured on the whole engine.

Steady decode: b requests at once, each with an adapter of its own as far as there are any, 128-token prompts, 256 outputs: TPOT by batch.
Burst: all requests at time zero, prompts and outputs uniform in [8, 512], adapters uniform: requests per second until the last is done.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.adapter import AdapterSpec
from engine.build import Progress, build_runner
from engine.config import ServingConfig
from engine.engine import Engine, Generation
from engine.errors import UserError
from engine.prefix_keys import keys_of_tokens
from engine.requests import Request
from engine.runner import Runner

DECODE_PROMPT_TOKENS = 128
DECODE_OUTPUT_TOKENS = 256
BURST_TOKENS = (8, 512)


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchPlan:
    """Batches of the steady decode, and the requests of the bursts without and with adapters."""

    batches: tuple[int, ...] = (1, 16, 32, 64, 128)
    base_requests: int = 1000
    lora_requests: int = 600
    prompt_tokens: int = DECODE_PROMPT_TOKENS
    output_tokens: int = DECODE_OUTPUT_TOKENS
    burst_tokens: tuple[int, int] = BURST_TOKENS


def bench(
    config: ServingConfig,
    adapters: Mapping[str, AdapterSpec],
    plan: BenchPlan,
    *,
    seed: int,
    progress: Progress,
) -> Iterator[dict[str, Any]]:
    """Yield one row a measurement, first of the base model, then with the adapters. Adapters are on the GPU before decode is timed."""
    longest = max(plan.prompt_tokens + plan.output_tokens, 2 * plan.burst_tokens[1])
    if config.max_model_len < longest:
        raise UserError(
            f"max_model_len={config.max_model_len} must be at least {longest}: bench sends requests that long"
        )
    runner = build_runner(config, adapters, seed=seed, progress=progress)
    try:
        yield from _rows(runner, list(adapters), plan, np.random.default_rng(seed), progress)
    finally:
        runner.close()


def _rows(
    runner: Runner, adapters: list[str], plan: BenchPlan, rng: np.random.Generator, progress: Progress
) -> Iterator[dict[str, Any]]:
    for names in ([], adapters) if adapters else ([],):
        for batch in plan.batches:
            if batch <= runner.blueprint.config.max_num_seqs:
                progress(f"decode, batch {batch}, {min(batch, len(names))} adapters")
                yield _decode_row(runner, plan, names, batch, rng)
        progress(f"burst, {len(names)} adapters")
        yield _burst_row(runner, plan, names, rng)


def _decode_row(
    runner: Runner, plan: BenchPlan, names: list[str], batch: int, rng: np.random.Generator
) -> dict[str, Any]:
    """Time a steady batch; it runs twice on one engine, so that adapters are resident and nothing is compiled in the second."""
    runner.builder.clear()
    engine = Engine(runner.blueprint, runner)
    used: list[str | None] = [names[row % len(names)] if names else None for row in range(batch)]
    generations: list[Generation] = []
    for outputs in (2, plan.output_tokens):
        generations = [_add(engine, plan.prompt_tokens, outputs, name, rng) for name in used]
        engine.drain()
    times_s = [_tpot_s(generation) for generation in generations]
    return _row(runner, "decode", used) | {
        "batch": batch,
        "tpot_ms": round(float(np.mean(times_s)) * 1e3, 4),
        "rps": None,
    }


def _burst_row(runner: Runner, plan: BenchPlan, names: list[str], rng: np.random.Generator) -> dict[str, Any]:
    runner.builder.clear()
    engine = Engine(runner.blueprint, runner)
    low, high = plan.burst_tokens
    count = plan.lora_requests if names else plan.base_requests
    used = [names[int(rng.integers(len(names)))] if names else None for _ in range(count)]
    began_s = engine.clock()
    generations = [
        _add(engine, int(rng.integers(low, high + 1)), int(rng.integers(low, high + 1)), name, rng)
        for name in used
    ]
    engine.drain()
    elapsed_s = engine.clock() - began_s
    tpot_ms = float(np.mean([_tpot_s(g) for g in generations if g.request.output_tokens > 1])) * 1e3
    return _row(runner, "burst", used) | {
        "batch": runner.blueprint.config.max_num_seqs,
        "tpot_ms": round(tpot_ms, 4),
        "rps": round(count / elapsed_s, 3),
        "requests": count,
        "output_tokens_per_s": round(sum(len(g.tokens) for g in generations) / elapsed_s, 1),
    }


def _add(
    engine: Engine, prompt_tokens: int, output_tokens: int, name: str | None, rng: np.random.Generator
) -> Generation:
    """Queue a request with a random prompt that shares nothing with another; its keys are made as in serving."""
    config = engine.blueprint.config
    prompt = rng.integers(0, engine.blueprint.model.vocab_size, prompt_tokens, dtype=np.int32)
    request = Request(
        request_id=int(rng.integers(2**31)),
        arrival_s=0.0,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        adapter=name,
        page_keys=keys_of_tokens(name, prompt, config.page_tokens) if config.prefix_caching else None,
    )
    return engine.add(request, prompt)


def _tpot_s(generation: Generation) -> float:
    assert generation.finish_s is not None and generation.first_token_s is not None
    return (generation.finish_s - generation.first_token_s) / (generation.request.output_tokens - 1)


def _row(runner: Runner, case: str, used: list[str | None]) -> dict[str, Any]:
    """Return what was served: distinct adapters, and their rank and targets where all have the same."""
    config = runner.blueprint.config
    specs = [runner.blueprint.adapters[name] for name in dict.fromkeys(used) if name is not None]
    ranks, targets = {spec.rank for spec in specs}, {spec.target_modules for spec in specs}
    return {
        "case": case,
        "adapters": len(specs),
        "rank": ranks.pop() if len(ranks) == 1 else None,
        "target_modules": list(targets.pop()) if len(targets) == 1 else None,
        "tp": config.tp,
        "lora_sharding": config.lora_sharding,
    }
