"""Reads the micro-measurements of ../shared/measured_vllm and fits a profile to them. `runs.jsonl` is not opened here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import exp, factorial
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import UserError
from engine.model_shape import load_model_shape
from sim.vllm_data import number, read_lines
from sim.vllm_fit import Observation, fit_steps
from sim.vllm_profile import GIB, VllmMemory, VllmProfile
from sim.vllm_steps import KernelGrid, StepFacts

Row = Mapping[str, Any]

MODEL, GPU, ENGINE = "llama-3.1-8b", "h100-64gb", "vllm 0.8.5 (V1)"
GPU_BYTES, UTILIZATION = 63.43 * GIB, 0.9  # README, section 2
RANKS = (8, 16, 32)
SWEEP_PROMPT, SWEEP_OUTPUT = 250, 231  # README, section 5
SWEEP_WEIGHT = 0.25  # what is told of a sweep is a mean over all its steps
BUSY_RUNNING = 8  # fewer, and the engine stands idle at times
LITTLE = 0.93  # running ÷ (tokens/s · ITL): below it preempted requests spend a part of their time waiting, and means say little of steps
LOADING_MOST = 0.05  # of the time: what loads cost beside their own time (the device waits, the host copies) is not known
ADMITTED_MOST = 12


def fit_micro(folder: Path) -> VllmProfile:
    """Fit the profile of Llama-3.1-8B under vLLM 0.8.5. Raises UserError naming file and line."""
    path = folder / "micro.jsonl"
    kinds: dict[str, list[tuple[str, Row]]] = {}
    for place, row in read_lines(path):
        kinds.setdefault(str(row.get("kind")), []).append((place, row))
    missing = [name for name in ("kv_capacity", "engine_step", "adapter_load") if name not in kinds]
    if missing:
        raise UserError(f"{path}: holds no line of kind {missing[0]!r}")
    model = load_model_shape(MODEL)
    sweeps = kinds.get("sweep_run_600s", [])
    observations = [
        *_capacity_steps(kinds["kv_capacity"]),
        *_engine_steps(kinds["engine_step"]),
        *_closed_loops(kinds.get("closed_loop_run", [])),
        *_sweeps(sweeps),
    ]
    fit = fit_steps(observations, {rank: KernelGrid(model=model, rank=rank) for rank in RANKS})
    memory, memory_error = fit_memory(kinds["kv_capacity"], model.kv_bytes_per_token())
    return VllmProfile(
        source=str(path),
        engine=ENGINE,
        model=model,
        gpu=GPU,
        tp=1,
        memory=memory,
        seconds=fit.seconds,
        load_s=_load_s(kinds["adapter_load"]),
        scan_s=_scan_s(sweeps),
        client_s=CLIENT_S,
        largest=dict(fit.largest) | {"tokens": 2048.0},
        errors=dict(fit.errors) | {"kv_tokens_worst": memory_error},
        provenance={
            "measured_by": "FerranAgulloLopez/GPULLMAdapterOptimization at bae36e2dad9615d851ff32d10a96633d21615647, Apache-2.0",
            "gpu_name": "NVIDIA H100 64 GB (inferred: the name was never logged)",
            "fitted_to": path.name,
            "command": "python -m sim calibrate --from vllm-measurements DIR",
        },
    )


# ---- memory ----


def fit_memory(rows: Sequence[tuple[str, Row]], kv_bytes_per_token: int) -> tuple[VllmMemory, float]:
    """Fit weights, slots and the rest to start-ups; return it with the worst relative error of the KV tokens."""
    known = [(place, row) for place, row in rows if row.get("weights_plus_slots_gib") is not None]
    slots = np.array([number(row, "max_loras", place) for place, row in known])
    ranks = np.array([number(row, "max_lora_rank", place) for place, row in known])
    held = np.array([number(row, "weights_plus_slots_gib", place) for place, row in known]) * GIB
    weights, slot, per_rank = _least_squares(
        np.column_stack([np.ones(len(slots)), slots, slots * ranks]), held
    )
    started = [(place, row) for place, row in known if row.get("kv_tokens") is not None]
    rest = [
        GPU_BYTES * UTILIZATION
        - number(row, "kv_tokens", place) * kv_bytes_per_token
        - number(row, "max_loras", place) * (slot + per_rank * number(row, "max_lora_rank", place))
        for place, row in started
    ]
    memory = VllmMemory(
        gpu_bytes=GPU_BYTES,
        weights_bytes=weights,
        base_bytes=float(np.mean(rest)),
        slot_bytes=slot,
        slot_bytes_per_rank=per_rank,
    )
    errors = [
        memory.kv_bytes(int(row["max_loras"]), int(row["max_lora_rank"]), UTILIZATION)
        / (row["kv_tokens"] * kv_bytes_per_token)
        - 1
        for _, row in started
    ]
    return memory, float(np.abs(errors).max())


def _least_squares(columns: np.ndarray[Any, Any], values: np.ndarray[Any, Any]) -> list[float]:
    found: list[float] = np.linalg.lstsq(columns, values, rcond=None)[0].tolist()
    return found


# ---- steps that were measured one by one ----


def _capacity_steps(rows: Iterable[tuple[str, Row]]) -> Iterable[Observation]:
    """One request of the base model at a time, right after start-up: by slots and rank."""
    for place, row in rows:
        if row.get("base_model_single_request_itl_ms") is None:
            continue
        slots, rank = int(number(row, "max_loras", place)), int(number(row, "max_lora_rank", place))
        yield Observation(
            name=f"kv_capacity {slots} {rank}",
            group="single",
            seconds=number(row, "base_model_single_request_itl_ms", place) * 1e-3,
            mix=((1.0, StepFacts(tokens=1, rows=1, kv_tokens=100, slots=slots, rank=rank)),),
        )


def _engine_steps(rows: Iterable[tuple[str, Row]]) -> Iterable[Observation]:
    """Steps by batched tokens and adapters, from engine logs of closed loops with 5-token prompts."""
    for place, row in rows:
        tokens, adapters = (
            number(row, "batched_tokens_mean", place),
            number(row, "distinct_adapters_mean", place),
        )
        source = str(row.get("source"))
        limit, output = number(row, "max_num_seqs", place), _output_of(source, place)
        if (
            tokens > limit
        ):  # rows + 5 · prompts = tokens and rows + prompts = the limit: rows that are about to end
            decodes = (5 * limit - tokens) / 4
            rows_now, kv_tokens = limit, decodes * (5 + output)
        else:
            rows_now, kv_tokens = tokens, tokens * (5 + output / 2)
        facts = StepFacts(
            tokens=tokens,
            rows=rows_now,
            kv_tokens=kv_tokens,
            adapters=adapters,
            slots=300 if row.get("enable_lora") else 0,  # README, section 5
        )
        name = f"engine_step {source} {tokens:g} {adapters:g}"
        yield Observation(
            name=name, group="steps", seconds=number(row, "step_median_ms", place) * 1e-3, mix=((1.0, facts),)
        )


def _closed_loops(rows: Iterable[tuple[str, Row]]) -> Iterable[Observation]:
    """Runs without LoRA: pure decodes by their median, pure prompts at a full budget of 2,048 tokens by their mean."""
    for place, row in rows:
        if row.get("enable_lora") is not False:
            continue
        source = str(row.get("source"))
        if "/input/" in source:
            facts = StepFacts(
                tokens=2048,
                rows=2048 / number(row, "mean_prompt_len", place),
                kv_tokens=2048,
                prompt_tokens=2048,
            )
            seconds = number(row, "step_mean_ms", place) * 1e-3
        else:
            limit, output = number(row, "max_num_seqs", place), number(row, "mean_output_len", place)
            facts = StepFacts(tokens=limit, rows=limit, kv_tokens=limit * (5 + output / 2))
            seconds = number(row, "itl_median_ms", place) * 1e-3
        yield Observation(name=f"closed_loop {source}", group="loops", seconds=seconds, mix=((1.0, facts),))


def _output_of(source: str, place: str) -> float:
    """Return the output length, which is part of a source's name: …__<prompt>_<output>[_<adapters>]."""
    try:
        return float(source.split("__")[-1].split("_")[1].split(" ")[0])
    except (IndexError, ValueError):
        raise UserError(f"{place}: source={source!r} must end in __<prompt>_<output>") from None


# ---- runs of ten minutes, by their means ----


def _sweeps(rows: Iterable[tuple[str, Row]]) -> Iterable[Observation]:
    """The mean step of a busy, steady run, as a mix of steps with 0, 1, 2, … prompts; loads and the scheduler's walk are taken off."""
    for place, row in rows:
        running, steps = number(row, "mean_running", place), number(row, "steps", place)
        period_s = number(row, "mean_step_period_ms", place) * 1e-3
        slots = int(number(row, "max_loras", place))
        tokens_per_s, itl_s = number(row, "output_tok_s", place), number(row, "itl_mean_ms", place) * 1e-3
        loading_s = number(row, "all_gpu_load_time_s", place) + DISK_S * number(row, "disk_loads", place)
        if "aggregated" in str(row.get("source")):
            continue  # never below 26 ms a step: it looks as if they ran without CUDA graphs
        if running <= BUSY_RUNNING or running < LITTLE * tokens_per_s * itl_s:
            continue
        if loading_s > LOADING_MOST * number(row, "duration_s", place):
            continue
        walk_s = max(0.0, number(row, "scheduler_mean_ms", place) * 1e-3 - SCHEDULED_S * running)
        yield Observation(
            name=f"sweep {row.get('source')} {slots} {row.get('n_adapters')} {row.get('per_adapter_rate')}",
            group="sweeps",
            seconds=period_s - loading_s / steps - walk_s,
            mix=tuple(
                _mix(
                    tokens_per_s * period_s,
                    number(row, "completed", place) / steps,
                    number(row, "mean_adapters_in_batch", place),
                    slots,
                )
            ),
            weight=SWEEP_WEIGHT,
        )


DISK_S = 0.0675  # an adapter from disk, rank 8 (`adapter_load`): in sweeps, unlike in the runs, each is read once while time runs
# Client, HTTP and tokenizer. Nothing in micro.jsonl tells it; this is our own vLLM 0.20.2 on another machine (../shared/facts/h200.md): a median
# TTFT of 27 ms where half a step (3.1 ms) and a step with the prompt (about 7.5 ms) are 10.6.
CLIENT_S = 0.0164
SCHEDULED_S = 1.9e-6  # the scheduler's own work a running request (closed loops: 1.7 to 2.1 µs), which is in every measured step


def _mix(rows_mean: float, arrivals: float, adapters: float, slots: int) -> Iterable[tuple[float, StepFacts]]:
    """Steps admit a Poisson number of prompts; how many run varies likewise (three points stand for it)."""
    spread = ((-1.225, 0.25), (0.0, 0.5), (1.225, 0.25))
    for admitted in range(ADMITTED_MOST):
        share = exp(-arrivals) * arrivals**admitted / factorial(admitted)
        if share < 1e-6:
            continue
        for away, part in spread:
            rows = max(1.0, rows_mean + away * rows_mean**0.5)
            tokens = min(2048.0, rows - admitted + SWEEP_PROMPT * admitted) if admitted else rows
            yield (
                share * part,
                StepFacts(
                    tokens=tokens,
                    rows=rows,
                    kv_tokens=rows * (SWEEP_PROMPT + SWEEP_OUTPUT / 2),
                    prompt_tokens=max(0.0, tokens - rows + admitted),
                    adapters=adapters,
                    slots=slots,
                ),
            )


# ---- loads and the scheduler ----


def _load_s(rows: Iterable[tuple[str, Row]]) -> float:
    """The mean over ranks of the median load from host memory into a slot: ranks hardly differ."""
    medians = [
        number(row, "median_ms", place) * 1e-3 for place, row in rows if row.get("where") == "cpu_to_gpu_slot"
    ]
    return float(np.mean(medians))


def _scan_s(rows: Iterable[tuple[str, Row]]) -> float:
    """The scheduler's time a waiting request, where the slots are what they wait for (at most 32, so that the walk goes through)."""
    found = [
        (
            number(row, "mean_waiting", place),
            number(row, "mean_running", place),
            number(row, "scheduler_mean_ms", place),
        )
        for place, row in rows
        if int(number(row, "max_loras", place)) <= 32 and number(row, "mean_waiting", place) > 100
    ]
    if not found:
        return 0.0
    waiting, running, scheduler_ms = np.array(found).T
    return _least_squares(np.column_stack([waiting, running]), scheduler_ms * 1e-3)[0]
