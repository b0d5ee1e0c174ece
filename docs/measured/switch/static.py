"""Merging an ordinary adapter out of the pool, as the engine does it: how long it takes, and that it is exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from docs.measured.switch.run import Run, ops_of
from engine.layout import AdapterLayout, adapter_layout, page_geometry
from engine.model_shape import MODULES, ModelShape
from engine.static_merge import PackedAdapter, StaticMerge
from engine.weights import ModelWeights, random_weights
from kernels.graph_time import FLOPS_PER_S
from kernels.sgmm_bench import COPY_BYTES_PER_S

RANKS = (16, 64, 128)


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """A random adapter in pages of its own."""

    layout: AdapterLayout
    adapter: PackedAdapter

    @classmethod
    def draw(cls, shape: ModelShape, rank: int, run: Run) -> Packed:
        """Draw N(0, 0.02²), and write the row table."""
        geometry = page_geometry(shape, 1, 16, run.dtype.itemsize)
        layout = adapter_layout(shape, (rank,) * 7, geometry)
        pool = torch.empty(layout.num_pages, geometry.page_elems, dtype=run.dtype, device=run.device)
        pool.normal_(0.0, 0.02, generator=torch.Generator(run.device).manual_seed(rank))
        table = layout.table(np.arange(layout.num_pages))
        pool.view(-1).view(torch.int32)[: len(table)] = torch.from_numpy(table).to(run.device)
        return cls(layout=layout, adapter=PackedAdapter(pool=pool, table_unit=0, ranks=(rank,) * 7))

    def rows(self, layer: int, module: int, side: Any, length: int) -> torch.Tensor:
        """Return one factor, row by row from the layout."""
        elems = 128 // self.adapter.pool.element_size()
        units = self.layout.row_units[self.layout.rows(layer, module, side)]
        flat = self.adapter.pool.view(-1)
        return torch.stack([flat[int(unit) * elems : int(unit) * elems + length] for unit in units])


def measure_static(run: Run, shape: ModelShape) -> None:
    """Time merging, taking out, and the check of the update's norm, by rank."""
    weights = random_weights(shape, run.dtype, run.device, seed=0)
    merge = StaticMerge(weights, shape, ops_of(run))
    for rank in (4,) if run.tiny else RANKS:
        with run.guarded(f"{shape.name} static r={rank}"):
            _measure(run, shape, weights, merge, rank)
        run.free()


def _measure(run: Run, shape: ModelShape, weights: ModelWeights, merge: StaticMerge, rank: int) -> None:
    packed = Packed.draw(shape, rank, run)
    name = f"r{rank}"
    before = weights.layers[0].gate_up.clone()
    check_ms = run.wall_ms(lambda: merge.check(packed.adapter, name), 1, warm=1)
    error = _error(shape, weights, merge, packed)
    graph = run.capture(lambda: merge.merge_(packed.adapter, name, checked=True))
    merge_ms = run.ms(graph, 10)
    wall_ms = run.wall_ms(lambda: merge.merge_(packed.adapter, name, checked=True), 5)
    everything = merge.merged
    back_ms = run.ms(run.capture(lambda: merge._put_back(everything)), 10)
    merge.unmerge_()
    if not torch.equal(before, weights.layers[0].gate_up):
        raise ValueError("taking out left something behind")
    sizes = [out * inputs for out, inputs in shape.linear_shapes().values()]
    moved_s = shape.num_layers * 2 * sum(sizes) * run.dtype.itemsize / COPY_BYTES_PER_S
    bound_ms = 1e3 * max(moved_s, shape.num_layers * 2 * rank * sum(sizes) / FLOPS_PER_S)
    row = {"merge_ms": merge_ms, "wall_ms": wall_ms, "restore_ms": back_ms, "bound_ms": bound_ms}
    row |= {"merge_over_bound": merge_ms / bound_ms, "restore_over_bound": back_ms / moved_s / 1e3}
    rounded = {key: round(value, 4) for key, value in row.items()}
    run.add(
        "merge",
        {"model": shape.name, "rank": rank, **rounded, "check_ms": round(check_ms, 2), "rel_err": error},
    )


def _error(shape: ModelShape, weights: ModelWeights, merge: StaticMerge, packed: Packed) -> float:
    """Merge, and return the largest relative error of the first layer's o and down against W_0 + B·A in fp32."""
    matrices = {"o_proj": weights.layers[0].o, "down_proj": weights.layers[0].down}
    wanted = {}
    for module, matrix in matrices.items():
        out, inputs = shape.linear_shapes()[module]
        index = MODULES.index(module)
        a, b = packed.rows(0, index, "a", inputs), packed.rows(0, index, "b", out)
        wanted[module] = matrix.float() + b.float().T @ a.float()
    merge.merge_(packed.adapter, "check")
    errors = [
        ((matrix.float() - wanted[module]).norm() / wanted[module].norm()).item()
        for module, matrix in matrices.items()
    ]
    if not max(errors) < 5e-3:
        raise ValueError(f"merged weights are off by {max(errors):.2e}")
    return round(max(errors), 6)
