"""What one GPU's memory holds as more adapters stay resident: each takes pages that the KV cache no longer has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.adapter import AdapterSpec
from engine.blueprint import Blueprint, blueprint
from engine.config import ServingConfig

PARTS = {
    "weights": "base model weights",
    "activations": "activations",
    "runtime": "runtime and graphs",
    "adapters": "resident adapters",
    "kv": "left for KV cache",
    "unused": "outside the share allowed",
}
POINTS = 40
BEYOND = 1.25  # adapters are shown to so many times the number that fits


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryView:
    """Bytes on one GPU by number of resident adapters.

    rows: {"adapters", "part", "bytes", "fits"}, parts in the order of PARTS; what does not fit has no KV row. fit: most adapters
    beside which one request of the longest context can still run. adapter_bytes: of one. kv_token_bytes: of one token of context on this GPU.
    """

    rows: tuple[dict[str, Any], ...]
    fit: int
    adapter_bytes: int
    kv_token_bytes: float
    total_bytes: int
    pool_bytes: int

    def kv_tokens(self, adapters: int) -> int:
        """Return the tokens of context that fit beside so many adapters."""
        left = self.pool_bytes - adapters * self.adapter_bytes
        return max(0, int(left // self.kv_token_bytes))


def memory_view(config: ServingConfig, rank: int, most: int | None = None) -> MemoryView:
    """Divide a GPU's memory beside 0, 1, … resident adapters of a rank (dense LoRA on all seven linears), as engine and simulator count.

    most: show up to so many; None: a little beyond what fits. Raises UserError where the configuration cannot work.
    """
    plan = blueprint(config, {"one": AdapterSpec(name="one", rank=rank)})
    memory, pages = plan.memory, plan.footprints["one"].pages
    least = -(-config.max_model_len // config.page_tokens)
    fit = (memory.num_pages - least) // pages
    most = most or max(1, int(BEYOND * fit) + 1)
    step = max(1, most // POINTS)
    counts = sorted({*range(0, most + 1, step), most, min(fit, most)})
    return MemoryView(
        rows=tuple(row for count in counts for row in _rows(plan, count, pages, fit)),
        fit=fit,
        adapter_bytes=pages * memory.page_bytes,
        kv_token_bytes=memory.page_bytes / config.page_tokens,
        total_bytes=memory.total_bytes,
        pool_bytes=memory.pool_bytes,
    )


def fit_by_rank(config: ServingConfig, ranks: tuple[int, ...]) -> list[dict[str, Any]]:
    """Return how many adapters of each rank fit on one GPU, and the bytes of one."""
    views = {rank: memory_view(config, rank, 1) for rank in ranks}
    return [
        {"rank": rank, "fit": view.fit, "adapter_bytes": view.adapter_bytes} for rank, view in views.items()
    ]


def choice_rows(memory_per_gpu_bytes: Mapping[str, int]) -> list[dict[str, Any]]:
    """Return a plan's memory as rows in the order of PARTS; what is free of the pool is told apart from KV in use."""
    names = PARTS | {"kv": "KV cache in use", "free": "free pages"}
    order = ("weights", "activations", "runtime", "adapters", "kv", "free", "unused")
    total = memory_per_gpu_bytes["total"]
    return [
        {
            "part": names[part],
            "order": place,
            "bytes": memory_per_gpu_bytes[part],
            "share": memory_per_gpu_bytes[part] / total,
        }
        for place, part in enumerate(order)
        if part in memory_per_gpu_bytes
    ]


def _rows(plan: Blueprint, adapters: int, pages: int, fit: int) -> list[dict[str, Any]]:
    memory = plan.memory
    taken = adapters * pages * memory.page_bytes
    parts = {
        "weights": memory.weights_bytes,
        "activations": memory.activations_bytes,
        "runtime": memory.runtime_bytes,
        "adapters": min(taken, memory.pool_bytes),
        "kv": max(0, memory.pool_bytes - taken),
        "unused": memory.unused_bytes,
    }
    return [
        {
            "adapters": adapters,
            "part": PARTS[part],
            "order": place,
            "bytes": count,
            "fits": adapters <= fit,
        }
        for place, (part, count) in enumerate(parts.items())
    ]
