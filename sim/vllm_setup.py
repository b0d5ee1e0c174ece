"""A vLLM server as the simulator sets it up: a serving configuration whose `max_adapters` are vLLM's slots, the memory that is left, its scheduler.

It stands where `engine.blueprint.Blueprint` stands for our engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from engine.adapter import AdapterSpec
from engine.budget import MemoryPlan
from engine.config import ServingConfig
from engine.errors import UserError
from engine.vllm_scheduler import VllmLimits, VllmScheduler
from sim.vllm_costs import VllmCosts, slot_bytes_by_shape
from sim.vllm_profile import VllmMemory, VllmProfile

RANKS = (
    1,
    8,
    16,
    32,
    64,
    128,
    256,
    320,
    512,
)  # that `max_lora_rank` may be (vLLM 0.33; 0.8.5: 8 to 320 of these)


@dataclass(frozen=True, kw_only=True)
class VllmSetup:
    """One configuration on one profile. max_open: requests that the client keeps open at most."""

    config: ServingConfig
    profile: VllmProfile
    adapters: Mapping[str, AdapterSpec]
    max_open: int | None = None

    host_capacity_bytes = None  # every adapter is in host memory (`max_cpu_loras` = all of them)

    @property
    def max_loras(self) -> int:
        return self.config.max_adapters or 0

    @property
    def max_lora_rank(self) -> int:
        return self.config.max_adapter_rank or RANKS[0]

    def why_not(self) -> tuple[str, str] | None:
        """Return why vLLM would not start, as a code and a sentence; None where it would."""
        memory, config = self._memory, self.config
        slots_gb = memory.slots_bytes(self.max_loras, self.max_lora_rank) / 1e9
        what = f"{self.max_loras} slots of rank {self.max_lora_rank} take {slots_gb:.1f} GB"
        if memory.weights_bytes + slots_gb * 1e9 > memory.gpu_bytes:
            return "cuda_oom", f"{what}: more than the GPU has beside the weights"
        if self.num_blocks < 1:
            return "no_kv_blocks", f"{what} and leave nothing for the KV cache"
        if self.kv_tokens < config.max_model_len:
            return (
                "kv_smaller_than_max_model_len",
                f"{what} and leave {self.kv_tokens:,} tokens of KV cache, less than max_model_len={config.max_model_len:,}",
            )
        return None

    def check(self) -> None:
        """Raise UserError where vLLM would not start, or does not take these adapters."""
        for name, spec in self.adapters.items():
            if spec.kind == "dynamic":
                raise UserError(f"adapter {name!r}: vLLM serves no adapters of kind 'dynamic'")
            if max(spec.module_ranks) > self.max_lora_rank:
                raise UserError(
                    f"adapter {name!r}: rank {spec.rank} exceeds max_lora_rank={self.max_lora_rank}"
                )
        if self.adapters and self.max_loras < 1:
            raise UserError("max_loras must be at least 1 where there are adapters")
        reason = self.why_not()
        if reason is not None:
            raise UserError(reason[1])

    @cached_property
    def _memory(self) -> VllmMemory:
        return memory_on(self.profile, self.config.tp)

    @property
    def kv_tokens(self) -> int:
        """Tokens of KV cache."""
        return self.num_blocks * self.profile.block_tokens

    @cached_property
    def num_blocks(self) -> int:
        left = self._memory.kv_bytes(self.max_loras, self.max_lora_rank, self.config.gpu_memory_utilization)
        return max(0, int(left // self._block_bytes))

    @property
    def _block_bytes(self) -> int:
        return self.profile.model.kv_bytes_per_token(self.config.tp) * self.profile.block_tokens

    @cached_property
    def memory(self) -> MemoryPlan:
        """Bytes on one GPU, as the planner shows them; slots count as activations do: they are there whatever happens."""
        memory, kv = self._memory, self.num_blocks * self._block_bytes
        slots = round(memory.slots_bytes(self.max_loras, self.max_lora_rank))
        weights, rest = round(memory.weights_bytes), round(memory.base_bytes - memory.weights_bytes)
        return MemoryPlan(
            total_bytes=round(memory.gpu_bytes),
            weights_bytes=weights,
            activations_bytes=slots,
            runtime_bytes=max(0, rest),
            page_bytes=self._block_bytes,
            num_pages=max(1, self.num_blocks),
            unused_bytes=round(memory.gpu_bytes) - weights - slots - max(0, rest) - kv,
        )

    def costs(self) -> VllmCosts:
        """Return what steps cost under this configuration."""
        return vllm_costs(self.profile, self.config)

    def new_scheduler(self) -> VllmScheduler:
        """Return a fresh scheduler with an empty KV cache."""
        config = self.config
        limits = VllmLimits(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=config.max_model_len,
            max_loras=self.max_loras,
            block_tokens=self.profile.block_tokens,
            chunked=self.profile.chunked,
            max_open=self.max_open,
        )
        return VllmScheduler(limits, self.num_blocks, dict.fromkeys(self.adapters, 1))

    def new_host_cache(self) -> Any:
        """Host memory holds all adapters."""
        raise NotImplementedError("vLLM's adapters are all in host memory")


def vllm_costs(profile: VllmProfile, config: ServingConfig) -> VllmCosts:
    """Return what steps cost under a configuration."""
    return VllmCosts(
        profile, max_loras=config.max_adapters or 0, max_lora_rank=config.max_adapter_rank or 8, tp=config.tp
    )


def memory_on(profile: VllmProfile, tp: int) -> VllmMemory:
    """Return the memory of one of `tp` GPUs: as measured, or, on another number of them, with weights and slots cut as vLLM cuts them."""
    memory = profile.memory
    if tp == profile.tp:
        return memory
    weights = profile.model.weight_bytes(tp) / profile.model.weight_bytes(profile.tp) * memory.weights_bytes
    here, there = slot_bytes_by_shape(profile, tp), slot_bytes_by_shape(profile, profile.tp)
    return VllmMemory(
        gpu_bytes=memory.gpu_bytes,
        weights_bytes=weights,
        base_bytes=memory.base_bytes - memory.weights_bytes + weights,
        slot_bytes=memory.slot_bytes,
        slot_bytes_per_rank=memory.slot_bytes_per_rank * here[1] / there[1],
    )


def rank_step(rank: int) -> int:
    """Return the least `max_lora_rank` that vLLM takes for adapters of this rank. Raises UserError beyond the largest."""
    for step in RANKS:
        if rank <= step:
            return step
    raise UserError(f"rank {rank} is more than vLLM serves: {RANKS[-1]}")
