"""The same fit for Llama-2-7B on vLLM 0.5.0 (V0 engine, no chunked prefill), whose measurements are whole runs, not steps.

Every request is there from the start, so a run's median time between tokens is about a decode step of its mean batch, and its duration is those
steps and one for each prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import UserError
from engine.model_shape import load_model_shape
from sim.vllm_data import number, read_lines
from sim.vllm_fit import Observation, fit_steps
from sim.vllm_profile import VllmMemory, VllmProfile
from sim.vllm_steps import KernelGrid, StepFacts

Row = Mapping[str, Any]

MODEL, GPU, ENGINE = "llama-2-7b", "h100-64gb", "vllm 0.5.0 (V0)"
MICRO_FILE, RUNS_FILE = "llama2_v050_micro.jsonl", "llama2_v050_runs.jsonl"
UTILIZATION = 0.9
RANKS = (8, 16, 32, 64)
MAX_GRAPH_TOKENS = 256  # of V0's CUDA graphs, which are of decodes only
MAX_NUM_BATCHED_TOKENS = 4096  # without chunked prefill: the model's context


def fit_micro_v0(folder: Path) -> VllmProfile:
    """Fit the profile of Llama-2-7B under vLLM 0.5.0. Raises UserError naming file and line."""
    path = folder / MICRO_FILE
    rows = [(place, row) for place, row in read_lines(path) if row.get("model") == MODEL]
    closed = [
        (place, row)
        for place, row in rows
        if row.get("workload")
        == "mean"  # 250 tokens in, 231 out, as in the runs; the others hardly decode, or hardly end
        and row.get("status") == "ok"
        and row.get("itl_median_ms")
        and row.get("mean_running_all_samples")
    ]
    if not closed:
        raise UserError(f"{path}: holds no finished run of {MODEL}")
    model = load_model_shape(MODEL)
    grids = {rank: KernelGrid(model=model, rank=rank, max_graph_tokens=MAX_GRAPH_TOKENS) for rank in RANKS}
    fit = fit_steps([item for place, row in closed for item in _observed(place, row)], grids)
    return VllmProfile(
        source=str(path),
        engine=ENGINE,
        model=model,
        gpu=GPU,
        tp=1,
        memory=_memory(rows, model.kv_bytes_per_token()),
        seconds=fit.seconds,
        load_s=_load_s(rows),
        scan_s=0.0,
        client_s=0.0,
        chunked=False,
        max_graph_tokens=MAX_GRAPH_TOKENS,
        max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
        largest=fit.largest,
        errors=fit.errors,
        provenance={
            "measured_by": "FerranAgulloLopez/GPULLMAdapterOptimization at bae36e2dad9615d851ff32d10a96633d21615647, Apache-2.0",
            "gpu_name": "NVIDIA H100 64 GB (inferred: the name was never logged)",
            "fitted_to": path.name,
            "command": "python -m sim calibrate --from vllm-measurements DIR --model llama-2-7b",
        },
    )


def _observed(place: str, row: Row) -> Iterator[Observation]:
    """Yield a run's decode step, and its whole time as so many of them and so many steps of one prompt each."""
    completed, running = number(row, "completed", place), number(row, "mean_running_all_samples", place)
    prompt = number(row, "input_tokens", place) / completed
    output = number(row, "output_tokens", place) / completed
    decode_s = number(row, "itl_median_ms", place) * 1e-3
    slots, rank = int(row.get("max_loras") or 0), int(row.get("max_lora_rank") or RANKS[0])
    adapters = float(row.get("mean_adapters_in_batch") or 0.0)
    name = f"{row.get('kind')} {row.get('workload')} {row.get('name')}"
    context = prompt + output / 2
    decode = StepFacts(
        tokens=running, rows=running, kv_tokens=running * context, adapters=adapters, slots=slots, rank=rank
    )
    yield Observation(name=name, group="decodes", seconds=decode_s, mix=((1.0, decode),))
    steps = number(row, "output_tokens", place) / running
    loading_s = float(row.get("lora_load_time_s") or 0.0)
    again = number(row, "preemptions", place)
    prompts = completed + again
    tokens = (completed * prompt + again * context) / prompts
    lone = StepFacts(
        tokens=tokens,
        rows=1,
        kv_tokens=tokens,
        prompt_tokens=tokens,
        adapters=min(1.0, adapters),
        slots=slots,
        rank=rank,
    )
    yield Observation(
        name=name,
        group="runs",
        seconds=number(row, "duration_s", place) - loading_s,
        mix=((steps, decode), (prompts, lone)),
    )


def _memory(rows: Iterable[tuple[str, Row]], kv_bytes_per_token: int) -> VllmMemory:
    """Fit KV cache = room − slots · (fixed + per rank · rank) to start-ups; the room is all that is not a slot."""
    known = [(place, row) for place, row in rows if row.get("kv_tokens") and row.get("max_loras")]
    slots = np.array([number(row, "max_loras", place) for place, row in known])
    ranks = np.array([number(row, "max_lora_rank", place) for place, row in known])
    kv = np.array([number(row, "kv_tokens", place) for place, row in known]) * kv_bytes_per_token
    columns = np.column_stack([np.ones(len(kv)), -slots, -slots * ranks])
    room, slot, per_rank = np.linalg.lstsq(columns, kv, rcond=None)[0].tolist()
    weights = float(np.median([number(row, "weights_gb", place) for place, row in known])) * 2**30
    return VllmMemory(
        gpu_bytes=(room + weights) / UTILIZATION,
        weights_bytes=weights,
        base_bytes=weights,
        slot_bytes=max(0.0, slot),
        slot_bytes_per_rank=per_rank,
    )


def _load_s(rows: Iterable[tuple[str, Row]]) -> float:
    """The median load, from disk: V0 loads an adapter when its first request comes."""
    times = [
        number(row, "lora_load_time_s", place) / number(row, "lora_loads", place)
        for place, row in rows
        if (row.get("lora_loads") or 0) >= 8
    ]
    return float(np.median(times)) if times else 0.0
