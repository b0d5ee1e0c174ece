"""The part of a serving configuration that the scheduler obeys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from engine.config import AdapterEviction, SchedulerPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """Bounds and choices, as `ServingConfig` has them.

    hot_adapter: the one that is merged for good. fixed_adapters: dynamic ones, on the GPU for good in memory of their own. merge_thresholds: alpha
    and beta of the policy that merges as requests come; None: it does not.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    page_tokens: int
    max_adapters_per_step: int | None = None
    max_adapters: int | None = None
    policy: SchedulerPolicy = "fcfs"
    ttft_slo_s: float | None = None
    adapter_weights: Mapping[str, float] = field(default_factory=dict, hash=False)
    adapter_eviction: AdapterEviction = "lru"
    adapter_pool_pages: int | None = None
    prefix_caching: bool = True
    hot_adapter: str | None = None
    fixed_adapters: tuple[str, ...] = ()
    merge_thresholds: tuple[float, float] | None = None
