"""Predicted against measured for Llama-2-7B on vLLM 0.5.0: fixed lengths, one rate for all adapters, windows of 300 s or a number of prompts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from engine.adapter import AdapterSpec
from engine.config import ServingConfig
from engine.errors import UserError
from sim.vllm_data import Row, number, part, read_lines
from sim.vllm_predict import client_metrics, serve
from sim.vllm_profile import VllmProfile
from sim.vllm_setup import VllmSetup
from sim.vllm_validate import RunOutcome, VllmComparison, map_runs, outcome_json
from sim.vllm_workload import arrivals
from traces import Trace
from traces.columns import TraceColumns

# Metric -> where a run has it, and what makes seconds of it.
MEASURED: dict[str, tuple[str, float]] = {
    "throughput_rps": ("req_per_s", 1.0),
    "output_tokens_per_s": ("output_tok_s", 1.0),
    "tpot_mean_s": ("tpot_mean_ms", 1e-3),
    "itl_mean_s": ("itl_mean_ms", 1e-3),
    "ttft_mean_s": ("ttft_mean_ms", 1e-3),
    "ttft_p50_s": ("ttft_median_ms", 1e-3),
}
STARVED_SHARE = 0.95


def validate_v0(
    path: Path,
    profile: VllmProfile,
    *,
    keep: Callable[[Row], bool] = lambda _: True,
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> dict[str, Any]:
    """Predict every run of the file; return the JSON object of `sim validate`. Levels: starved, unstarved by what was measured."""
    runs = [(place, row) for place, row in read_lines(path) if keep(row)]
    if not runs:
        raise UserError(f"{path}: holds no run")
    outcomes = []
    for outcome in map_runs(partial(compare_v0, profile=profile), runs, workers):
        outcomes.append(outcome)
        progress(len(outcomes), len(runs))
    return outcome_json(outcomes)


def compare_v0(item: tuple[str, Row], *, profile: VllmProfile) -> RunOutcome:
    """Predict one run and compare."""
    place, row = item
    started = row.get("status") == "ok"
    config = ServingConfig(
        model=profile.model.name,
        gpu=profile.gpu,
        max_num_seqs=min(4096, int(number(row, "max_num_seqs", place))),
        max_num_batched_tokens=profile.max_num_batched_tokens,
        max_model_len=profile.model.max_position_embeddings,
        max_adapters=int(number(row, "max_loras", place)),
        max_adapter_rank=int(number(row, "max_lora_rank", place)),
        page_tokens=profile.block_tokens,
        prefix_caching=False,
    )
    trace, window_s = _stream(row, place)
    adapters = {name: AdapterSpec(name=name, rank=rank or 8) for name, rank in trace.adapters.items()}
    setup = VllmSetup(config=config, profile=profile, adapters=adapters)
    starts = setup.why_not() is None
    comparisons: list[VllmComparison] = []
    starved = predicted = None
    if started and starts:
        result = serve(setup, trace, until_s=window_s, adapters=adapters)
        metrics = client_metrics(result, window_s or result.duration_s, profile.client_s, config.max_num_seqs)
        sent = number(row, "per_adapter_rate", place) * number(row, "n_adapters", place)
        starved = number(part(row, "measured", place), "req_per_s", place) < STARVED_SHARE * sent
        predicted = metrics["throughput_rps"] < STARVED_SHARE * sent
        comparisons = [
            VllmComparison(
                run=str(row.get("run")),
                metric=metric,
                load_level="starved" if starved else "unstarved",
                measured=number(part(row, "measured", place), name, place) * scale,
                predicted=metrics[metric],
            )
            for metric, (name, scale) in MEASURED.items()
        ]
    return RunOutcome(
        name=str(row.get("run")),
        started=started,
        predicted_start=starts,
        starved=starved,
        predicted_starved=predicted,
        comparisons=tuple(comparisons),
    )


def _stream(row: Row, place: str) -> tuple[Trace, float | None]:
    """Return the requests, all alike, and when the run is over: at the window's end, or with the last of its prompts (None)."""
    count, rate = int(number(row, "n_adapters", place)), number(row, "per_adapter_rate", place)
    window = row.get("window_s")
    wanted = None if window else int(number(row, "num_prompts", place))
    horizon_s = float(window) if window else 2 * number(row, "num_prompts", place) / (rate * count)
    sent = list(arrivals([rate] * count, horizon_s))[:wanted]
    columns = TraceColumns(
        ids=tuple(range(len(sent))),
        arrival_s=np.array([at_s for at_s, _ in sent]),
        prompt_tokens=np.full(len(sent), int(number(row, "prompt_len", place))),
        output_tokens=np.full(len(sent), int(number(row, "output_len", place))),
        adapter_index=np.array([adapter for _, adapter in sent], dtype=np.int64),
        adapter_names=tuple(f"a{index}" for index in range(count)),
        adapter_ranks=(int(number(row, "adapter_rank", place)),) * count,
    )
    return Trace.from_columns(columns, str(row.get("run"))), float(window) if window else None
