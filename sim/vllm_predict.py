"""What the simulator says of one measured vLLM run: whether the server starts, and what its client would have measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np

from engine.adapter import AdapterSpec, adapters_of_trace
from engine.config import ServingConfig
from sim.result import SimResult
from sim.simulate import simulate
from sim.vllm_profile import VllmProfile
from sim.vllm_replica import VllmReplica
from sim.vllm_setup import VllmSetup
from traces import Trace

# Open connections that the client had ports for: Linux hands out 32,768 to 60,999 unless told otherwise. The README says "about 28,000".
CLIENT_PORTS = 28_232


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """infeasible: why the server does not start, else None. metrics: as the client and the server's gauges would have it; empty if infeasible."""

    infeasible: str | None
    metrics: dict[str, float]

    @property
    def starved(self) -> bool:
        """Whether fewer than 95 % of the requests that were sent are completed (README, section 4)."""
        return self.metrics.get("finished_fraction", 0.0) < 0.95


def serve(setup: VllmSetup, trace: Trace, *, until_s: float | None = None, **options: Any) -> SimResult:
    """Simulate a vLLM server on a trace."""
    return simulate(
        trace,
        setup.config,
        setup.costs(),
        plan=cast(Any, setup),
        replica=partial(VllmReplica, scan_s=setup.profile.scan_s),
        until_s=until_s,
        **options,
    )


def run_vllm(
    profile: VllmProfile, config: ServingConfig, trace: Trace, given: Mapping[str, AdapterSpec] | None
) -> SimResult:
    """Simulate a configuration on a trace to its end. Raises UserError where vLLM would not start."""
    adapters = adapters_of_trace(trace.adapters, given)
    setup = VllmSetup(config=config, profile=profile, adapters=adapters)
    setup.check()
    return serve(setup, trace, adapters=adapters)


def server_config(
    profile: VllmProfile, max_loras: int, max_lora_rank: int, *, max_num_seqs: int = 2048
) -> ServingConfig:
    """Return the configuration that all measured runs have, but for slots and rank (README, section 2)."""
    return ServingConfig(
        model=profile.model.name,
        gpu=profile.gpu,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max(profile.max_num_batched_tokens, max_num_seqs),
        max_model_len=profile.model.max_position_embeddings,
        gpu_memory_utilization=0.9,
        max_adapters=max_loras,
        max_adapter_rank=max_lora_rank,
        page_tokens=profile.block_tokens,
        prefix_caching=False,
    )


def predict(profile: VllmProfile, config: ServingConfig, trace: Trace, window_s: float) -> Prediction:
    """Predict a run of `window_s` seconds."""
    adapters = {name: AdapterSpec(name=name, rank=rank or 8) for name, rank in trace.adapters.items()}
    setup = VllmSetup(config=config, profile=profile, adapters=adapters, max_open=CLIENT_PORTS)
    reason = setup.why_not()
    if reason is not None:
        return Prediction(infeasible=reason[0], metrics={})
    result = serve(setup, trace, until_s=window_s, adapters=adapters)
    return Prediction(
        infeasible=None, metrics=client_metrics(result, window_s, profile.client_s, config.max_num_seqs)
    )


def client_metrics(
    result: SimResult, window_s: float, client_s: float, max_num_seqs: int
) -> dict[str, float]:
    """Return what the benchmark's client prints, of the requests that it saw completed within the window."""
    columns = result.columns
    done = np.isfinite(columns["finish_s"])
    arrival, first, finish = (columns[name][done] for name in ("arrival_s", "first_token_s", "finish_s"))
    prompts, outputs = columns["prompt_tokens"][done], columns["output_tokens"][done]
    ttft = first - arrival + client_s
    further = np.maximum(outputs - 1, 1)
    tpot = ((finish - first) / further)[outputs > 1]
    sent, completed = len(done), int(done.sum())
    ttft_mean = _mean(ttft)
    return {
        "throughput_rps": completed / window_s,
        "total_tokens_per_s": float(prompts.sum() + outputs.sum()) / window_s,
        "output_tokens_per_s": float(outputs.sum()) / window_s,
        "ttft_mean_s": ttft_mean,
        **{f"ttft_p{q}_s": _quantile(ttft, q) for q in (50, 99)},
        "tpot_mean_s": _mean(tpot),
        **{f"tpot_p{q}_s": _quantile(tpot, q) for q in (50, 99)},
        "itl_mean_s": float((finish - first).sum() / max(1, (outputs - 1).sum())),
        "running_mean": result.utilisation.sequences_mean * max_num_seqs,
        "ttft_mean_incl_unfinished_s": (np.nan_to_num(ttft_mean) * completed + (sent - completed) * window_s)
        / sent,
        "finished_fraction": completed / sent,
        "adapter_loads": float(result.adapter_loads),
        "preemptions": float(columns["preemptions"].sum()),
    }


def _mean(values: Any) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _quantile(values: Any, percent: float) -> float:
    return float(np.percentile(values, percent)) if len(values) else float("nan")
