"""What it costs to change which adapter the weights hold: `merge='dynamic'`.

A merge reads the pristine copy and writes the weights, W = W_0 + B·A; taking out copies them back. The bound is those bytes at the memory's copy
rate, or the product's operations where they take longer. Where a GPU was measured, `profiles/merge.<gpu>.json` says by how much the bound
is missed; elsewhere the bound itself is taken, and said to be one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.adapter import AdapterSpec
from engine.blueprint import Blueprint
from engine.budget import GpuSpec, gpu_spec
from engine.config import ServingConfig
from engine.errors import UserError
from engine.model_shape import MODULES, ModelShape
from sim.profile import PROFILES

BOUND = "bound, not measured"


@dataclass(frozen=True, slots=True)
class SwitchBound:
    """Bytes and operations of a merge, or of taking one out (operations 0)."""

    moved_bytes: int
    operations: int

    def seconds(self, gpu: GpuSpec) -> float:
        """Return the least time on a GPU."""
        return max(
            self.moved_bytes / gpu.memory_bandwidth_bytes_per_s, self.operations / gpu.bf16_flops_per_s
        )


def switch_bound(model: ModelShape, ranks: tuple[int, ...], itemsize: int, *, merges: bool) -> SwitchBound:
    """Return what a switch to or from an adapter of these seven ranks cannot avoid."""
    linears = model.linear_shapes()
    sizes = [linears[module][0] * linears[module][1] for module in MODULES]
    targets = [(size, rank) for size, rank in zip(sizes, ranks, strict=True) if rank]
    moved = model.num_layers * sum(2 * size * itemsize for size, _ in targets)
    operations = model.num_layers * sum(2 * size * rank for size, rank in targets)
    return SwitchBound(moved, operations if merges else 0)


class MergeSwitches:
    """Seconds of switches on a plan's GPU. provenance: what they rest on."""

    def __init__(self, plan: Blueprint, rows: list[dict[str, Any]], provenance: str) -> None:
        self._plan = plan
        self._gpu = gpu_spec(plan.config.gpu)
        self._over_bound = {
            merges: {int(row["rank"]): float(row[key]) for row in rows}
            for merges, key in ((True, "merge_over_bound"), (False, "restore_over_bound"))
        }
        self.provenance = provenance

    def between(self, before: str | None, after: str | None) -> float:
        """Return the GPU time of a switch from one adapter (None: none) to another."""
        if after is not None:
            return self._seconds(self._plan.adapters[after], merges=True)
        return 0.0 if before is None else self._seconds(self._plan.adapters[before], merges=False)

    def _seconds(self, adapter: AdapterSpec, *, merges: bool) -> float:
        plan, ranks = self._plan, adapter.module_ranks
        bound = switch_bound(plan.model, ranks, plan.config.itemsize_bytes, merges=merges)
        measured = self._over_bound[merges]
        if not measured:
            return bound.seconds(self._gpu)
        nearest = min(measured, key=lambda rank: (abs(rank - max(ranks)), rank))
        return bound.seconds(self._gpu) * measured[nearest]


def switch_provenance(config: ServingConfig, folder: Path = PROFILES) -> str:
    """Say what switch costs on a configuration's GPU rest on."""
    path = folder / f"merge.{config.gpu.lower()}.json"
    return f"measured ({path.name})" if path.is_file() else BOUND


def switches_of(plan: Blueprint, folder: Path = PROFILES) -> MergeSwitches | None:
    """Return the switch costs of a plan that merges as requests come, else None. Raises UserError where the measured file is none."""
    if plan.config.merge != "dynamic":
        return None
    path = folder / f"merge.{plan.config.gpu.lower()}.json"
    provenance = switch_provenance(plan.config, folder)
    if provenance == BOUND:
        return MergeSwitches(plan, [], BOUND)
    try:
        return MergeSwitches(plan, json.loads(path.read_text(encoding="utf-8"))["rows"], provenance)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not switch costs: {error!r}") from None
