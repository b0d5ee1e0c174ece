"""How the memory of one GPU is divided. The engine sizes its pool by this plan, and the simulator counts the same pages.

Weights, activations and the runtime's own take are known before anything is allocated; what remains of the share that the configuration
allows is the pool.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from engine.config import ServingConfig
from engine.errors import UserError
from engine.graph_sizes import padded_tokens
from engine.json_files import read_json
from engine.layout import PageGeometry, page_geometry
from engine.model_shape import ModelShape

# CUDA context, cuBLAS and Triton workspaces, captured graphs: about 1 GB by what a replay had in use (docs/log.md), and room to spare.
RUNTIME_BYTES = 4 * 2**30
ATTENTION_PARTIAL_ROWS = 256  # most rows of partial results of the split-K attention in one step


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSpec:
    """A GPU by what it reaches: memory as CUDA reports it, bandwidths (link: to other GPUs of the host, one way) and bf16 matrix rate."""

    name: str
    memory_bytes: int
    memory_bandwidth_bytes_per_s: float
    bf16_flops_per_s: float
    host_bandwidth_bytes_per_s: float
    link_bandwidth_bytes_per_s: float


# What an H200 reaches of its datasheet's 4.8 TB/s, 989 TFLOP/s (dense bf16) and 64 GB/s of PCIe 5, measured 2026-11-21: copy 4,241 GB/s; 790 TFLOP/s;
# pinned host to device 55 GB/s. Other kinds are taken to reach the same parts of theirs.
_MEMORY, _MATRIX, _HOST = 4.241 / 4.8, 790 / 989, 55 / 64


def _of_datasheet(
    name: str, gigabytes: float, terabytes_per_s: float, teraflops: float, pcie_gb: float, link_gb: float
) -> GpuSpec:
    return GpuSpec(
        name=name,
        memory_bytes=int(gigabytes * 1e9),
        memory_bandwidth_bytes_per_s=terabytes_per_s * 1e12 * _MEMORY,
        bf16_flops_per_s=teraflops * 1e12 * _MATRIX,
        host_bandwidth_bytes_per_s=pcie_gb * 1e9 * _HOST,
        link_bandwidth_bytes_per_s=link_gb * 1e9,
    )


# Datasheets of NVIDIA (dense bf16, link one way: NVLink, or PCIe where there is none); memory a little below what CUDA reports.
GPUS: dict[str, GpuSpec] = {
    spec.name: spec
    for spec in (
        _of_datasheet("h200", 150.0, 4.8, 989, 64, 450),
        _of_datasheet("h100", 85.0, 3.35, 989, 64, 450),
        _of_datasheet("a100-80", 84.9, 2.039, 312, 32, 300),
        _of_datasheet("l40s", 47.6, 0.864, 362, 32, 32),
        _of_datasheet("a10g", 23.6, 0.6, 70, 32, 32),
        _of_datasheet("b200", 191.0, 8.0, 2250, 64, 900),
    )
}


def gpu_spec(name: str) -> GpuSpec:
    """Return a GPU of the catalogue, or the one that a JSON file describes. Raises UserError listing the known names, or naming the file."""
    if name.endswith(".json"):
        return parse_gpu(read_json(Path(name)), name)
    spec = GPUS.get(name.lower())
    if spec is None:
        known = ", ".join(sorted(GPUS))
        raise UserError(
            f"gpu {name!r} is not known; known: {known}; or a .json file of one (docs/calibration.md)"
        )
    return spec


def parse_gpu(data: Any, path: str) -> GpuSpec:
    """Check a GPU's JSON form. Raises UserError naming the file and the field."""
    names = [item.name for item in fields(GpuSpec)]
    if not isinstance(data, dict) or set(data) != set(names):
        raise UserError(f"{path}: a GPU must be an object of {', '.join(names)}")
    if not isinstance(data["name"], str) or not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", data["name"]):
        raise UserError(f"{path}: name={data['name']!r} must be of a-z, 0-9, - and _")
    for name in names[1:]:
        value = data[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise UserError(f"{path}: {name}={value!r} must be a number above 0")
    return GpuSpec(**(data | {"memory_bytes": int(data["memory_bytes"])}))


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes on one GPU.

    unused_bytes: outside the share that the configuration allows. merge_bytes: what merging keeps beside the weights. expert_bytes:
    dynamic adapters.
    """

    total_bytes: int
    weights_bytes: int
    activations_bytes: int
    runtime_bytes: int
    page_bytes: int
    num_pages: int
    unused_bytes: int
    merge_bytes: int = 0
    expert_bytes: int = 0

    @property
    def pool_bytes(self) -> int:
        return self.page_bytes * self.num_pages


def plan_memory(
    config: ServingConfig, model: ModelShape, merge_rank: int = 0, expert_bytes: int = 0
) -> MemoryPlan:
    """Divide one GPU's memory. Raises UserError when the weights leave no room for the pool, saying by how much.

    merge_rank: the largest rank that may be merged into the weights. expert_bytes: of dynamic adapters, with what their steps need.
    """
    gpu = gpu_spec(config.gpu)
    geometry = page_geometry(model, config.tp, config.page_tokens, config.itemsize_bytes)
    weights = model.weight_bytes(config.tp, config.itemsize_bytes)
    activations = activation_bytes(config, model)
    allowed = int(gpu.memory_bytes * config.gpu_memory_utilization)
    merging = 0 if config.merge == "never" else merge_bytes(config, model, merge_rank)
    room = allowed - weights - merging - expert_bytes - activations - RUNTIME_BYTES
    num_pages = config.num_pages if config.num_pages is not None else max(0, room) // geometry.page_bytes
    least = -(-config.max_model_len // config.page_tokens)
    if config.num_pages is not None and config.num_pages < least:
        raise UserError(
            f"num_pages={config.num_pages} must be at least {least}: one request of max_model_len={config.max_model_len} tokens"
        )
    if num_pages < least or num_pages * geometry.page_bytes > room:
        short = max(least, num_pages) * geometry.page_bytes - room
        beside = f"what merging keeps {_gb(merging)}, " if merging else ""
        beside += f"experts {_gb(expert_bytes)}, " if expert_bytes else ""
        raise UserError(
            f"{config.model} at tp={config.tp} does not fit {config.gpu}: weights {_gb(weights)}, {beside}activations {_gb(activations)}, "
            f"runtime {_gb(RUNTIME_BYTES)} and a pool of {max(least, num_pages)} pages need {_gb(short)} more than "
            f"{config.gpu_memory_utilization:g} of {_gb(gpu.memory_bytes)}"
        )
    return MemoryPlan(
        total_bytes=gpu.memory_bytes,
        weights_bytes=weights,
        activations_bytes=activations,
        runtime_bytes=RUNTIME_BYTES,
        page_bytes=geometry.page_bytes,
        num_pages=num_pages,
        merge_bytes=merging,
        expert_bytes=expert_bytes,
        unused_bytes=gpu.memory_bytes
        - weights
        - merging
        - expert_bytes
        - activations
        - RUNTIME_BYTES
        - num_pages * geometry.page_bytes,
    )


def merge_bytes(config: ServingConfig, model: ModelShape, rank: int) -> int:
    """Return the bytes of the pristine copy of all seven linears, of one adapter's factors as the merge reads them, and of the index that
    gathers those: 8 bytes for each 128 (engine/static_merge.py)."""
    linears = model.linear_shapes(config.tp).values()
    copy = model.num_layers * sum(out * inputs for out, inputs in linears) * config.itemsize_bytes
    factors = model.num_layers * rank * sum(out + inputs for out, inputs in linears) * config.itemsize_bytes
    return copy + factors + factors // 4


def activation_bytes(config: ServingConfig, model: ModelShape) -> int:
    """Return the bytes of a step's activations and static buffers on one GPU, at its most tokens."""
    tokens = padded_tokens(config.max_num_batched_tokens, config.graph_max_tokens)
    shapes = model.linear_shapes(config.tp)
    outs = sum(shapes[name][0] for name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"))
    ins = shapes["o_proj"][1] + shapes["down_proj"][1]
    row = (outs + ins + 5 * model.hidden_size) * config.itemsize_bytes
    logits = min(config.max_num_seqs, tokens) * model.vocab_size * (config.itemsize_bytes + 4)
    partials = ATTENTION_PARTIAL_ROWS * model.heads_per_rank(config.tp) * (model.head_dim + 1) * 4
    return tokens * row + logits + partials + lora_bridge_bytes(tokens)


def lora_bridge_bytes(tokens: int) -> int:
    """Return the bytes of LoRA's partial sums in steps of up to `tokens` tokens: parts of the input × rows × the ranks of a group, fp32.

    16 parts up to 1,024 tokens and 4 beyond are the most that kernels/lora_launch.py asks for.
    """
    return max(16 * min(tokens, 1024), 4 * tokens) * 3 * 256 * 4


def geometry_of(config: ServingConfig, model: ModelShape) -> PageGeometry:
    """Return the page of one GPU under a configuration."""
    return page_geometry(model, config.tp, config.page_tokens, config.itemsize_bytes)


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB"
