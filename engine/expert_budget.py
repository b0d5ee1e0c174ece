"""What dynamic adapters take on a GPU, told without torch: they are there from the start, in memory of their own beside the pool."""

from __future__ import annotations

from collections.abc import Mapping

from engine.adapter import AdapterSpec
from engine.config import ServingConfig
from engine.errors import UserError
from engine.graph_sizes import padded_tokens
from engine.model_shape import GROUPS, MODULES, ModelShape
from engine.residency import AdapterFootprint

MAX_DYNAMIC = 8
"""Most dynamic adapters at a time: each adds its kernels to every step that has one of them."""


def expert_footprint(config: ServingConfig, model: ModelShape, spec: AdapterSpec) -> AdapterFootprint:
    """Return what a dynamic adapter is to the scheduler and the cost model: no pages, and the bytes of the experts that a token reads."""
    experts, top_k = spec.expert_counts
    each = expert_bytes(config, model, spec)
    return AdapterFootprint(pages=0, weight_bytes=top_k * each, copy_bytes=0, experts=(experts, top_k))


def expert_bytes(config: ServingConfig, model: ModelShape, spec: AdapterSpec) -> int:
    """Return the bytes of one expert's factors on all layers."""
    linears = model.linear_shapes(config.tp)
    rows = sum(sum(linears[module]) for module in MODULES if module in spec.target_modules)
    return model.num_layers * spec.rank * rows * config.itemsize_bytes


def dynamic_bytes(config: ServingConfig, model: ModelShape, adapters: Mapping[str, AdapterSpec]) -> int:
    """Return the bytes of all dynamic adapters' experts and routers, and of the partial sums of their largest step."""
    dynamic = [spec for spec in adapters.values() if spec.kind == "dynamic"]
    if not dynamic:
        return 0
    tokens = padded_tokens(config.max_num_batched_tokens, config.graph_max_tokens)
    total, bridge = 0, 0
    for spec in dynamic:
        experts, _ = spec.expert_counts
        total += experts * expert_bytes(config, model, spec)
        total += (
            model.num_layers * experts * model.intermediate_size * config.itemsize_bytes
        )  # routers, at most
        linears = max(sum(module in spec.target_modules for module in group) for group in GROUPS)
        # Up to 64 tokens `in` is cut into 4 parts, or 7 for one token (kernels/expert_launch.py); beyond it is whole.
        bridge = max(bridge, max(tokens, 4 * min(tokens, 64)) * experts * linears * spec.rank * 4)
    return total + bridge


def check_dynamic(config: ServingConfig, adapters: Mapping[str, AdapterSpec]) -> None:
    """Raise UserError where dynamic adapters cannot be served."""
    names = [name for name, spec in adapters.items() if spec.kind == "dynamic"]
    if names and config.tp > 1:
        raise UserError(f"adapter {names[0]!r}: kind 'dynamic' needs tp=1, not {config.tp}")
    if len(names) > MAX_DYNAMIC:
        raise UserError(
            f"{len(names)} adapters of kind 'dynamic', at most {MAX_DYNAMIC} are served at a time"
        )
