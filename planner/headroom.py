"""What breaks first: how much of each resource a configuration uses at its highest rate, and how much traffic is left in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any

from engine.adapter import AdapterSpec
from engine.blueprint import blueprint
from engine.budget import gpu_spec
from engine.config import ServingConfig
from engine.model_shape import ModelShape
from planner.probe import Probe
from traces import Trace

RANKS = (8, 16, 32, 64, 128)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resource:
    """A resource: the share of it that is used, 0 … 1; NaN where it has no bound. how: in a few words, by what it was told."""

    name: str
    used: float
    how: str

    @property
    def headroom(self) -> float:
        """How much more traffic until it is full, if its use grows with the traffic; infinite where nothing of it is used."""
        return 1 / self.used - 1 if self.used > 0 else inf

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form: what is not finite is null."""
        return {
            "name": self.name,
            "used": self.used if isfinite(self.used) else None,
            "headroom": self.headroom if isfinite(self.headroom) else None,
            "how": self.how,
        }


def resources(
    trace: Trace, config: ServingConfig, adapters: Mapping[str, AdapterSpec], probe: Probe, rate_rps: float
) -> list[Resource]:
    """Return the resources of a configuration at a rate that was simulated, the fullest first. Nothing where the simulator told no use."""
    use = probe.use
    if not use or not rate_rps:
        return []
    plan = blueprint(config, adapters)
    flops_share, bytes_share = _roofline(trace, config, plan.model, use, rate_rps)
    stored = sum(item.copy_bytes for item in plan.footprints.values()) * config.tp
    bound = config.host_memory_bytes
    found = [
        Resource(name="compute", used=flops_share, how="operations of all tokens over what the GPU reaches"),
        Resource(
            name="memory bandwidth",
            used=bytes_share,
            how="weights of every step and KV of every token read, over what the GPU reaches; adapters not counted",
        ),
        Resource(name="GPU time", used=use["step_share"], how="share of the time in which a step runs"),
        Resource(
            name="KV pages",
            used=min(1.0, use["kv_pages_max"] + use["adapter_pages_mean"]),
            how="most pages of KV at a time, and what adapters hold on average, of the pool",
        ),
        Resource(name="batch slots", used=use["sequences_max"], how="most running requests at a time"),
        Resource(name="PCIe", used=use["link_share"], how="share of the time in which adapters are copied"),
        Resource(
            name="adapter loads",
            used=_load_share(probe),
            how="mean wait for an adapter, of the mean time to the first token",
        ),
        Resource(
            name="host memory",
            used=stored / bound if bound else float("nan"),
            how=f"all adapters take {stored / 1e9:.1f} GB a replica" + ("" if bound else "; no bound is set"),
        ),
    ]
    return sorted(found, key=lambda item: -item.used if isfinite(item.used) else inf)


def first_to_break(found: list[Resource]) -> Resource | None:
    """Return the resource with the least headroom."""
    known = [item for item in found if isfinite(item.used)]
    return known[0] if known else None


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRoom:
    """How many adapters of a rank one replica's GPUs hold: in an empty pool, and beside the KV that is held at the highest rate."""

    rank: int
    alone: int
    beside_kv: int


def adapter_room(config: ServingConfig, probe: Probe | None) -> list[AdapterRoom]:
    """Return the room for adapters on all seven linears, by rank."""
    free = 1.0 if probe is None else 1 - probe.kv_pages_max
    bare = config.with_changes(merge="never", merge_adapter=None)
    found = []
    for rank in RANKS:
        plan = blueprint(bare, {"a": AdapterSpec(name="a", rank=rank)})
        pages, each = plan.memory.num_pages, plan.footprints["a"].pages
        found.append(AdapterRoom(rank=rank, alone=pages // each, beside_kv=int(pages * free) // each))
    return found


def _roofline(
    trace: Trace, config: ServingConfig, model: ModelShape, use: Mapping[str, float], rate_rps: float
) -> tuple[float, float]:
    """Return the shares of a GPU's operations and bytes a second, all GPUs alike."""
    prompts, outputs = trace.columns.prompt_tokens, trace.columns.output_tokens
    gpu = gpu_spec(config.gpu)
    weights = model.weight_bytes(1, config.itemsize_bytes)
    operations = 2 * weights / config.itemsize_bytes * float((prompts + outputs).mean())
    flops_per_s = operations * rate_rps / config.gpus
    contexts = outputs * (prompts + outputs / 2)
    kv = 2 * model.num_layers * model.num_kv_heads * model.head_dim * config.itemsize_bytes
    kv_per_s = float(contexts.mean()) * kv * rate_rps / config.gpus
    steps_per_s = use.get("steps", 0.0) / max(use["duration_s"], 1e-9) / config.replicas
    weights_per_s = steps_per_s * model.weight_bytes(config.tp, config.itemsize_bytes)
    return flops_per_s / gpu.bf16_flops_per_s, (kv_per_s + weights_per_s) / gpu.memory_bandwidth_bytes_per_s


def _load_share(probe: Probe) -> float:
    wait_s = probe.use.get("load_wait_mean_s", 0.0)
    ttft_s = float(probe.metrics.get("ttft_mean_s", float("nan")))
    return wait_s / ttft_s if isfinite(wait_s) and isfinite(ttft_s) and ttft_s > 0 else 0.0
