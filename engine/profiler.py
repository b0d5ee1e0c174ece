"""`python -m engine profile`: measures operators, whole steps, transfers and the host on the GPU, over a designed grid of shapes.

The grid covers what steps of real traffic look like, corner by corner and at random between; no trace is replayed here, since replays are what the
fitted costs are judged by.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from engine.adapter import AdapterSpec
from engine.budget import gpu_spec
from engine.build import Progress, build_runner
from engine.config import ServingConfig
from engine.engine import Engine
from engine.model_shape import ModelShape
from engine.operator_profile import profile_operators
from engine.provenance import provenance
from engine.requests import Request
from engine.runner import Runner
from engine.step import StepShape
from engine.step_profile import MadeUpStep, StepBench

ATTENTION_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
SCHEMA_VERSION = 1
MOST_KV_TOKENS = 8000  # of a made-up decode row
LARGE_TOKENS = 512  # steps above it are few in a grid
CLOCK_TOKENS = (128, 256, 512, 1024)  # of the steps whose slowing down is watched
CLOCK_DECODES = (0, 1, 2, 3, 5, 8)  # decode steps between two of them, at the largest size
COOLING_STEPS, WATCHED_S = 160, 1.0  # after decode steps alone, for so long


def profile_adapters() -> dict[str, AdapterSpec]:
    """Return the adapters that the grid draws from: 200 of rank 16 on all linears, and fewer of other ranks and targets."""
    groups: dict[str, tuple[int, int, tuple[str, ...] | None]] = {
        "r16": (16, 200, None),
        "r8": (8, 32, None),
        "r32": (32, 24, None),
        "r64": (64, 32, None),
        "r128": (128, 12, None),
    }
    groups |= {"qkvo8": (8, 256, ATTENTION_TARGETS), "qkvo64": (64, 16, ATTENTION_TARGETS)}
    specs = {}
    for group, (rank, count, targets) in groups.items():
        for number in range(count):
            name = f"{group}-{number}"
            options: dict[str, Any] = {} if targets is None else {"target_modules": targets}
            specs[name] = AdapterSpec(name=name, rank=rank, **options)
    return specs


def profile(
    config: ServingConfig, *, quick: bool, progress: Progress, shape: ModelShape | None = None
) -> dict[str, Any]:
    """Measure everything; return the profile as JSON data. `quick` thins every grid, to try the tool."""
    adapters = profile_adapters()
    runner = build_runner(config, adapters, progress=progress, register=False, shape=shape)
    bench = StepBench(runner)
    progress("whole steps")
    steps = _profile_steps(bench, config, quick=quick, progress=progress)
    progress("lora")
    operators: dict[str, list[dict[str, Any]]] = defaultdict(list)
    operators["lora"] = _profile_lora(bench, quick=quick)
    for operator, row in profile_operators(runner, quick=quick):
        if not operators[operator]:
            progress(operator)
        operators[operator].append(row | {"us": round(row["us"], 3)})
    progress("the clock under load")
    clock = _profile_clock(bench, config, quick=quick)
    progress("host")
    host = _profile_host(runner)
    return {
        "schema_version": SCHEMA_VERSION,
        "gpu": gpu_spec(config.gpu).name,
        "gpu_spec": asdict(gpu_spec(config.gpu)),
        "model": config.model,
        "dtype": config.dtype,
        "page_tokens": config.page_tokens,
        "graph_max_tokens": config.graph_max_tokens,
        "max_num_seqs": config.max_num_seqs,
        **provenance(),
        "operators": dict(operators),
        "steps": steps,
        "clock": clock,
        "host": host,
    }


# ---- whole steps ----


def _profile_steps(
    bench: StepBench, config: ServingConfig, *, quick: bool, progress: Progress
) -> list[dict[str, Any]]:
    rows = []
    grid = list(step_grid(config, count=24 if quick else 320, seed=7))
    for number, wanted in enumerate(grid, start=1):
        if not _fits(bench, wanted):
            continue
        shape, us = bench.measure_us(wanted)
        rows.append({"shape": shape.to_json(), "gpu_us": round(us, 1)})
        if number % 50 == 0:
            progress(f"step {number} of {len(grid)}")
    return rows


def _fits(bench: StepBench, wanted: MadeUpStep) -> bool:
    """Return whether a step's KV fits the pool, and its longest sequence the page table."""
    lens = [kv + 1 for kv, _ in wanted.decodes] + [start + length for start, length, _ in wanted.chunks]
    page_tokens = bench.runner.blueprint.config.page_tokens
    return (
        sum(tokens + page_tokens for tokens in lens) <= bench.kv_capacity_tokens
        and max(lens) <= bench.runner.blueprint.config.max_model_len
    )


def step_grid(config: ServingConfig, *, count: int, seed: int) -> Iterator[MadeUpStep]:
    """Yield corners, then `count` random steps: decode rows log-uniform, KV lengths from equal to skewed, adapters from none to all."""
    yield from _corners(config.max_num_seqs)
    rng = np.random.default_rng(seed)
    for number in range(count):
        kinds = _adapter_group(rng)
        rows = round(math.exp(rng.uniform(0, math.log(config.max_num_seqs))))
        if number % 2 == 0:
            yield MadeUpStep(decodes=_random_decodes(rng, rows, kinds))
            continue
        rows = 0 if rng.random() < 0.15 else rows
        budget = config.max_num_batched_tokens - rows
        chunks = _random_chunks(
            rng, min(budget, int(math.exp(rng.uniform(math.log(4), math.log(budget))))), kinds, config, rows
        )
        yield MadeUpStep(decodes=_random_decodes(rng, rows, kinds), chunks=chunks)


def _corners(max_num_seqs: int) -> Iterator[MadeUpStep]:
    for rows in sorted(
        {rows for rows in (1, 2, 4, 8, 16, 32, 64, 128) if rows < max_num_seqs} | {max_num_seqs}
    ):
        for kv in (128, 1024):
            yield MadeUpStep(decodes=((kv, None),) * rows)
        for name in ("r16", "qkvo8", "r64"):
            count = {"r16": 200, "qkvo8": 256, "r64": 32}[name]
            yield MadeUpStep(decodes=tuple((256, f"{name}-{row % count}") for row in range(rows)))
            yield MadeUpStep(decodes=((256, f"{name}-0"),) * rows)


def _adapter_group(rng: np.random.Generator) -> list[str | None]:
    """Return the adapters that one step draws from: none, one, or some of one group or of several."""
    groups = {"r16": 200, "r8": 32, "r32": 24, "r64": 32, "r128": 12, "qkvo8": 256, "qkvo64": 16}
    kind = rng.random()
    if kind < 0.15:
        return [None]
    several = rng.choice(list(groups), size=int(rng.integers(1, 5)), replace=False).tolist()
    picked = ["r16"] if kind < 0.55 else several
    names: list[str | None] = [f"{group}-{number}" for group in picked for number in range(groups[group])]
    size = round(math.exp(rng.uniform(0, math.log(len(names)))))
    chosen = [names[index] for index in rng.choice(len(names), size=size, replace=False)]
    return [*chosen, None] if rng.random() < 0.2 else chosen


def _random_decodes(
    rng: np.random.Generator, rows: int, names: list[str | None]
) -> tuple[tuple[int, str | None], ...]:
    median, spread = math.exp(rng.uniform(math.log(32), math.log(2048))), rng.uniform(0, 1.2)
    kv = np.clip(median * rng.lognormal(0, spread, rows), 8, MOST_KV_TOKENS).astype(int)
    return tuple((int(tokens), names[int(rng.integers(len(names)))]) for tokens in kv)


def _random_chunks(
    rng: np.random.Generator, tokens: int, names: list[str | None], config: ServingConfig, rows: int
) -> tuple[tuple[int, int, str | None], ...]:
    """Cut `tokens` into one to eight chunks, the first perhaps far into a long prompt."""
    count = min(int(rng.integers(1, 9)) if rng.random() < 0.5 else 1, tokens, config.max_num_seqs - rows)
    if count < 1:
        return ()
    cuts = (
        np.sort(rng.choice(tokens - 1, size=count - 1, replace=False) + 1)
        if count > 1
        else np.array([], dtype=int)
    )
    lengths = np.diff([0, *cuts.tolist(), tokens])
    starts = [int(math.exp(rng.uniform(0, math.log(6000)))) if rng.random() < 0.4 else 0] + [0] * (count - 1)
    return tuple(
        (start, int(length), names[int(rng.integers(len(names)))])
        for start, length in zip(starts, lengths, strict=True)
    )


# ---- LoRA alone ----


def _profile_lora(bench: StepBench, *, quick: bool) -> list[dict[str, Any]]:
    """Time one layer's shrink and expand by tokens, distinct adapters and rank."""
    counts = {"r8": 32, "r16": 200, "r32": 24, "r64": 32, "r128": 12, "qkvo8": 256, "qkvo64": 16}
    ranks = {"r8": 8, "r16": 16, "r32": 32, "r64": 64, "r128": 128, "qkvo8": 8, "qkvo64": 64}
    config = bench.runner.blueprint.config
    layers = bench.runner.blueprint.model.num_layers
    rows = []
    for group, available in counts.items():
        cases = [
            (tokens, adapters)
            for tokens in (1, 4, 8, 16, 32, 64, 128, 256)
            for adapters in (1, 4, 16, 32, 64, 128, 200)
        ]
        cases = [
            (tokens, adapters)
            for tokens, adapters in cases
            if adapters <= min(tokens, available) and tokens <= config.max_num_seqs
        ]
        for tokens, adapters in cases[:: 6 if quick else 1]:
            wanted = MadeUpStep(decodes=tuple((64, f"{group}-{row % adapters}") for row in range(tokens)))
            rows.append(_lora_row(bench, wanted, group, ranks[group], layers))
        for tokens in (64, 256, 512, 600, 768, 1000)[:: 2 if quick else 1]:
            for adapters in (1, 4, 16):
                if tokens > config.max_num_batched_tokens or adapters > min(available, config.max_num_seqs):
                    continue
                chunks = tuple((0, tokens // adapters, f"{group}-{number}") for number in range(adapters))
                rows.append(_lora_row(bench, MadeUpStep(chunks=chunks), group, ranks[group], layers))
    drawn = step_grid(config, count=20 if quick else 240, seed=11)
    more = step_grid(config, count=0 if quick else 600, seed=12)
    large = (wanted for wanted in more if wanted.tokens > LARGE_TOKENS)
    for wanted in itertools.chain(drawn, large):
        if any(name is not None for *_, name in (*wanted.decodes, *wanted.chunks)) and _fits(bench, wanted):
            rows.append(_lora_row(bench, wanted, "mixed", 0, layers))
    return rows


def _lora_row(bench: StepBench, wanted: MadeUpStep, group: str, rank: int, layers: int) -> dict[str, Any]:
    shape, us, tile_tokens = bench.measure_lora_us(wanted)
    return {
        "tp": 1,
        "tokens": shape.tokens,
        "tile_tokens": tile_tokens,
        "adapters": shape.lora_adapters,
        "rank": rank,
        "targets": "qkvo" if group.startswith("qkvo") else "mixed" if group == "mixed" else "all",
        "bytes": shape.lora_bytes // layers,
        "single_bytes": shape.lora_single_bytes // layers,
        "token_bytes": shape.lora_token_bytes // layers,
        "us": round(us, 3),
    }


# ---- the clock ----


def _profile_clock(bench: StepBench, config: ServingConfig, *, quick: bool) -> list[dict[str, Any]]:
    """Run a step with a prompt again and again, from when the GPU has only decoded for a while, alone and with decode steps between: how it slows
    down as power is averaged."""
    rows = []
    decodes = ((256, None),) * min(32, config.max_num_seqs)
    cooling = MadeUpStep(decodes=decodes)
    most = min(config.max_num_batched_tokens, config.graph_max_tokens)
    prompts = {
        tokens: MadeUpStep(decodes=decodes, chunks=((0, tokens - len(decodes), None),))
        for tokens in CLOCK_TOKENS
        if len(decodes) < tokens <= most
    }
    prompts = {tokens: prompt for tokens, prompt in prompts.items() if _fits(bench, prompt)}
    for tokens, prompt in prompts.items():
        for between in CLOCK_DECODES if tokens == max(prompts) else (0,):
            rounds_us = 4500 * (1 + between) + 18 * tokens  # about what it takes on an H200
            rounds = 3 if quick else round(WATCHED_S * 1e6 / rounds_us)
            bench.series_us(cooling, 2 if quick else COOLING_STEPS)
            times = bench.series_us(prompt, rounds, cooling, between)
            rows.append({"tokens": tokens, "decodes": between, "us": [round(us, 1) for us in times]})
    return rows


# ---- the host ----


def _profile_host(runner: Runner) -> list[dict[str, Any]]:
    """Serve bursts of base-model requests and take the host's time a turn, by decode rows and prefill chunks: medians."""
    samples: dict[tuple[int, int], list[float]] = defaultdict(list)
    config = runner.blueprint.config
    # Captured steps only: launching an eager step one kernel at a time is slower, and is hidden behind its many tokens.
    captured = max(config.max_num_seqs, min(config.max_num_batched_tokens, config.graph_max_tokens))
    plan = replace(runner.blueprint, config=config.with_changes(max_num_batched_tokens=captured))
    most = config.max_num_seqs
    for rows in sorted({min(rows, most) for rows in (1, 8, 32, 64, 128, 192, most)}):
        runner.builder.clear()
        engine = Engine(plan, runner)
        prompt = np.full(24, 11, dtype=np.int32)
        for number in range(rows):
            request = Request(
                request_id=number, arrival_s=0.0, prompt_tokens=24, output_tokens=24 + number % 7
            )
            engine.add(request, prompt)
        engine.drain()
        for step in engine.steps[2:]:
            shape: StepShape = step.shape
            samples[shape.decode_rows, shape.prefill_chunks].append(step.host_s * 1e6)
    return [
        {"rows": rows, "prefill_chunks": chunks, "us": round(float(np.median(times)), 1)}
        for (rows, chunks), times in sorted(samples.items())
        if len(times) >= 3
    ]
