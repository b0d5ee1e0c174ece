"""A serving configuration: one value, with a JSON form that `plan` writes and the engine and the simulator take as it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from engine.errors import UserError
from engine.json_files import read_json
from engine.router_costs import RouterCosts

LoraSharding = Literal["replicated", "block_diagonal", "slora", "slora_published"]
Merge = Literal["never", "hot", "dynamic"]
Backend = Literal["triton", "reference"]
Dtype = Literal["bfloat16", "float16", "float32"]
SchedulerPolicy = Literal["fcfs", "clustered", "fair", "slo"]
AdapterEviction = Literal["lru", "gdsf"]
RouterPolicy = Literal["round_robin", "least_loaded", "adapter_affinity", "cost_aware"]
Placement = Literal["everywhere", "partitioned", "hot_replicated"]
Collectives = Literal["fast", "nccl"]

ITEMSIZE_BYTES: dict[str, int] = {"bfloat16": 2, "float16": 2, "float32": 4}
SCHEMA_VERSION = 1

_CHOICES: dict[str, tuple[Any, ...]] = {
    "lora_sharding": get_args(LoraSharding),
    "merge": get_args(Merge),
    "backend": get_args(Backend),
    "dtype": get_args(Dtype),
    "scheduler": get_args(SchedulerPolicy),
    "adapter_eviction": get_args(AdapterEviction),
    "router": get_args(RouterPolicy),
    "placement": get_args(Placement),
    "collectives": get_args(Collectives),
}
# Field -> (lowest, highest) of the integer fields; None is no bound.
_INTEGERS: dict[str, tuple[int, int | None]] = {
    "schema_version": (SCHEMA_VERSION, SCHEMA_VERSION),
    "tp": (1, 64),
    "replicas": (1, 4096),
    "max_num_seqs": (1, 4096),
    "max_num_batched_tokens": (1, 131072),
    "max_model_len": (1, None),
    "max_adapters_per_step": (1, None),
    "host_memory_bytes": (1, None),
    "page_tokens": (1, 1024),
    "num_pages": (1, None),
    "graph_max_tokens": (0, 8192),
    "adapter_pool_pages": (1, None),
    "max_adapter_rank": (1, 256),
    "max_adapters": (1, 1_000_000),
}
_OPTIONAL = {
    "max_adapters_per_step",
    "host_memory_bytes",
    "num_pages",
    "adapter_pool_pages",
    "max_adapter_rank",
    "max_adapters",
    "ttft_slo_s",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingConfig:
    """What to serve, on what, and how.

    model: a catalogue name or a path to a Hugging Face `config.json` (or its folder).
    gpu: a name of the GPU catalogue (`engine/budget.py`), or a .json file that describes one.
    tp, replicas: GPUs a replica, and replicas behind the router.
    max_num_batched_tokens: most tokens (decode rows and prefill chunks) of one step.
    max_adapters_per_step: most distinct adapters among the running requests; None is no limit.
    host_memory_bytes: bound of the pinned adapter store; None is no bound.
    num_pages: size of the pool in pages; None takes what `gpu_memory_utilization` leaves.
    graph_max_tokens: steps of at most so many tokens run as CUDA graphs.
    prefix_caching: keep the KV pages of prompts for later requests of the same adapter that start alike.
    adapter_eviction: which idle adapter goes first: lru, the least recently used, or gdsf, the least popular for its size, with ageing.
    adapter_pool_pages: pages fenced off for adapters, the rest for KV alone; None is one pool for both.
    ttft_slo_s: what the scheduler `slo` holds first tokens to; it turns away what would be later.
    adapter_weights: shares of the scheduler `fair` by adapter; one that is not named has 1.
    router_costs: what the router `cost_aware` prices requests by (engine/router_costs.py), as `python -m sim router-costs` writes it.
    placement: which replicas serve which adapters: everywhere, partitioned (one each), or hot_replicated (popular ones everywhere).
    adapter_popularity: traffic by adapter in any unit, for the placement; one that is not named has the mean.
    max_adapter_rank: largest rank that may be registered while serving; None is that of the adapters given at the start.
    max_adapters: most adapters on the GPU at a time while serving; None is those given at the start.
    merge: never; hot, one adapter merged into the weights for good; dynamic, whichever adapter most requests ask for (docs/switch.md).
    merge_adapter: the one that `hot` merges; None is the trace's most frequent one.
    merge_alpha, merge_beta: `dynamic` merges an adapter from this share of the unfinished requests on, and keeps it from that share on.
    collectives: how GPUs of one replica exchange: fast, by kernels that read each other's memory where that is faster, or all by nccl.

    Raises UserError naming field, value and bound.
    """

    schema_version: int = SCHEMA_VERSION
    model: str = "llama-3.1-8b"
    gpu: str = "h200"
    tp: int = 1
    replicas: int = 1
    lora_sharding: LoraSharding = "replicated"
    merge: Merge = "never"
    merge_adapter: str | None = None
    merge_alpha: float = 1.0
    merge_beta: float = 15 / 27
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 1024
    max_model_len: int = 8192
    gpu_memory_utilization: float = 0.9
    max_adapters_per_step: int | None = None
    host_memory_bytes: int | None = None
    scheduler: SchedulerPolicy = "fcfs"
    router: RouterPolicy = "least_loaded"
    router_costs: Mapping[str, float] | None = field(default=None, hash=False)
    placement: Placement = "everywhere"
    page_tokens: int = 16
    num_pages: int | None = None
    graph_max_tokens: int = 1024
    prefix_caching: bool = True
    adapter_eviction: AdapterEviction = "lru"
    adapter_pool_pages: int | None = None
    ttft_slo_s: float | None = None
    adapter_weights: Mapping[str, float] = field(default_factory=dict, hash=False)
    adapter_popularity: Mapping[str, float] = field(default_factory=dict, hash=False)
    max_adapter_rank: int | None = None
    max_adapters: int | None = None
    collectives: Collectives = "fast"
    backend: Backend = "triton"
    dtype: Dtype = "bfloat16"

    def __post_init__(self) -> None:
        for name, (low, high) in _INTEGERS.items():
            _check_integer(name, getattr(self, name), low, high)
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise UserError(f"config: {name}={value!r} must be one of {', '.join(choices)}")
        for name in ("model", "gpu"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise UserError(f"config: {name}={getattr(self, name)!r} must be a name")
        utilization = self.gpu_memory_utilization
        if (
            isinstance(utilization, bool)
            or not isinstance(utilization, (int, float))
            or not 0 < utilization <= 1
        ):
            raise UserError(f"config: gpu_memory_utilization={utilization!r} must be in (0, 1]")
        if not isinstance(self.prefix_caching, bool):
            raise UserError(f"config: prefix_caching={self.prefix_caching!r} must be true or false")
        if self.ttft_slo_s is not None and not _is_positive(self.ttft_slo_s):
            raise UserError(f"config: ttft_slo_s={self.ttft_slo_s!r} must be a number above 0")
        if self.scheduler == "slo" and self.ttft_slo_s is None:
            raise UserError("config: scheduler='slo' needs ttft_slo_s")
        if self.merge_adapter is not None and not (
            isinstance(self.merge_adapter, str) and self.merge_adapter
        ):
            raise UserError(f"config: merge_adapter={self.merge_adapter!r} must be a name")
        for name in ("merge_alpha", "merge_beta"):
            value = getattr(self, name)
            if not _is_positive(value) or value > 1:
                raise UserError(f"config: {name}={value!r} must be in (0, 1]")
        if self.router == "cost_aware" and self.router_costs is None:
            raise UserError(
                "config: router='cost_aware' needs router_costs; `python -m sim router-costs` writes them"
            )
        if self.router_costs is not None:
            RouterCosts.from_json(self.router_costs)
        for name in ("adapter_weights", "adapter_popularity"):
            _check_shares(name, getattr(self, name))
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise UserError(
                f"config: max_num_batched_tokens={self.max_num_batched_tokens} must be at least "
                f"max_num_seqs={self.max_num_seqs}, so that every running request can decode in every step"
            )

    @property
    def itemsize_bytes(self) -> int:
        return ITEMSIZE_BYTES[self.dtype]

    @property
    def exchanges_lora(self) -> bool:
        """Whether the GPUs of a replica exchange parts of what adapters compute."""
        return self.tp > 1 and self.lora_sharding in ("slora", "slora_published")

    @property
    def gpus(self) -> int:
        return self.tp * self.replicas

    def with_changes(self, **changes: Any) -> ServingConfig:
        """Return a copy with fields changed, validated again."""
        return replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form, every field present."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any, *, source: str = "config") -> ServingConfig:
        """Build from the JSON form. Raises UserError on unknown keys and bad values, naming `source`."""
        if not isinstance(data, dict):
            raise UserError(
                f"{source}: a serving configuration must be a JSON object, got {type(data).__name__}"
            )
        known = {item.name for item in fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise UserError(f"{source}: unknown key {unknown[0]!r}; known keys: {', '.join(sorted(known))}")
        try:
            return cls(**data)
        except UserError as error:
            raise UserError(f"{source}: {str(error).removeprefix('config: ')}") from None

    @classmethod
    def load(cls, path: Path) -> ServingConfig:
        """Read the JSON file `path`. A plan's recommendation file ({"config": …}) is accepted too."""
        data = read_json(path)
        if isinstance(data, dict) and isinstance(data.get("config"), dict):
            data = data["config"]
        return cls.from_json(data, source=str(path))


def _check_integer(name: str, value: Any, low: int, high: int | None) -> None:
    if value is None and name in _OPTIONAL:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"config: {name}={value!r} must be a whole number")
    if value < low or (high is not None and value > high):
        bound = f"at least {low}" if high is None else f"in {low}..{high}" if low != high else f"{low}"
        raise UserError(f"config: {name}={value} must be {bound}")


def _check_shares(name: str, shares: Any) -> None:
    if not isinstance(shares, Mapping):
        raise UserError(f"config: {name}={shares!r} must be an object of adapter: number")
    for adapter, share in shares.items():
        if not _is_positive(share):
            raise UserError(f"config: {name}[{adapter!r}]={share!r} must be a number above 0")


def _is_positive(value: Any) -> bool:
    return (
        isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    )
