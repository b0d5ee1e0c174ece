"""One ordinary adapter merged into the base weights, W = W_0 + (scale · B) · A, and taken out again: `merge='hot'` and `merge='dynamic'`.

The pristine copy is kept: taking out is copying back, so a merge leaves nothing behind. What is merged touches every request, so an
adapter whose update is too large against the weight it changes is refused before anything is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.errors import UserError
from engine.expert_merge import group_weights
from engine.model_shape import GROUPS, MODULES, ModelShape
from engine.switch_ops import SwitchOps
from engine.weights import ModelWeights
from kernels.lora_plan import ENTRIES_PER_UNIT, ROW_ALIGN_BYTES, a_row, b_row
from kernels.sgmm_plan import SgmmWeight, plan_sgmm

MAX_UPDATE_RATIO = 1.0
"""Largest ‖BA‖ / ‖W_0‖ of a linear. Trained adapters change weights by a few per cent; one that is as large as the weight is broken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedAdapter:
    """An adapter in the pool, as docs/design.md lays it out: where its row table is, and the ranks of the seven linears."""

    pool: torch.Tensor  # [num_pages, page_elems]
    table_unit: int
    ranks: tuple[int, ...]

    @property
    def units(self) -> torch.Tensor:
        """The pool as what row tables count in: [units, elements of 128 bytes]."""
        return self.pool.view(-1, ROW_ALIGN_BYTES // self.pool.element_size())

    def units_of(self, rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """Return where units lie in the pool: the `offsets`-th of these rows of the table."""
        start = self.table_unit * ENTRIES_PER_UNIT
        return self.pool.view(-1).view(torch.int32)[start:].index_select(0, rows) + offsets


@dataclass(frozen=True, slots=True, kw_only=True)
class _Merge:
    """How adapters of the same ranks are merged. rows, offsets: which units their factors are, in the order of the scratch. items: views of it."""

    rows: torch.Tensor
    offsets: torch.Tensor
    modules: tuple[int, ...]
    items: tuple[SgmmWeight, ...]
    run: Callable[[], None]


class StaticMerge:
    """The base's weights, the pristine copy of those that adapters may change, and what is merged at present.

    The factors of the adapter to be merged are gathered from the pool's pages into a scratch of its size; plans are made once for each choice of
    ranks.
    """

    def __init__(self, weights: ModelWeights, shape: ModelShape, ops: SwitchOps) -> None:
        self._ops = ops
        self._linears = shape.linear_shapes()
        self._layers = shape.num_layers
        self._matrices = [group_weights(layer) for layer in weights.layers]
        self._pristine = [tuple(matrix.clone() for matrix in layer) for layer in self._matrices]
        self._norms = {key: source.float().norm() for key, _, source in self._views(range(len(MODULES)))}
        self._scratch = self._matrices[0][0].new_empty(0)
        self._merges: dict[tuple[int, ...], _Merge] = {}
        self.merged: frozenset[int] = frozenset()  # indices of the linears that hold an adapter

    @property
    def pristine_bytes(self) -> int:
        """Bytes of the copy."""
        return sum(copy.numel() * copy.element_size() for layer in self._pristine for copy in layer)

    def prepare(self, ranks: tuple[int, ...]) -> None:
        """Make the plan for adapters of these ranks and run it with nothing merged: what is compiled is compiled now, and no bit changes."""
        merge = self._plan(ranks)
        self._scratch.zero_()
        merge.run()
        self._put_back(frozenset(merge.modules))  # −0 + 0 is +0

    def update_ratio(self, adapter: PackedAdapter) -> float:
        """Return the largest ‖BA‖ / ‖W_0‖ of a linear; infinite where the factors are not finite. Waits for the device."""
        merge = self._gather(adapter)
        norms = [self._norms[layer, module] for layer in range(self._layers) for module in merge.modules]
        ratios = [
            update_norm(item.down[0], item.up[0]) / norm
            for item, norm in zip(merge.items, norms, strict=True)
        ]
        return float(torch.stack(ratios).nan_to_num(nan=torch.inf).max().item())

    def check(self, adapter: PackedAdapter, name: str) -> None:
        """Raise UserError where an adapter's update is too large to be merged."""
        worst = self.update_ratio(adapter)
        if not worst <= MAX_UPDATE_RATIO:
            raise UserError(
                f"adapter {name!r}: its update is {worst:.3g} times a weight that it changes, merged at most {MAX_UPDATE_RATIO:g}"
            )

    def merge_(self, adapter: PackedAdapter, name: str, *, checked: bool = False) -> None:
        """Merge an adapter, in place of the one before. Raises UserError, with the weights untouched, where its update is too large.

        checked: `check` has been asked; then nothing waits for the device.
        """
        if not checked:
            self.check(adapter, name)
        merge = self._gather(adapter)
        self._put_back(self.merged - set(merge.modules))
        merge.run()
        self.merged = frozenset(merge.modules)

    def unmerge_(self) -> None:
        """Take out what is merged: the base's bits, as they were."""
        self._put_back(self.merged)
        self.merged = frozenset()

    def negate_(self, adapter: PackedAdapter) -> None:
        """Turn the sign of an adapter's B in the pool, in place: its rows then take the adapter out of weights that hold it."""
        rows, offsets = self._unit_rows(adapter.ranks, sides="b")
        at = adapter.units_of(rows, offsets)
        adapter.units.index_copy_(0, at.long(), -adapter.units.index_select(0, at))

    def _put_back(self, modules: frozenset[int]) -> None:
        for _, target, source in self._views(sorted(modules)):
            target.copy_(source)

    def _gather(self, adapter: PackedAdapter) -> _Merge:
        """Copy an adapter's factors from the pool into the scratch."""
        merge = self._merges.get(adapter.ranks)
        if merge is None:
            merge = self._plan(adapter.ranks)
        units = adapter.units
        out = self._scratch[: len(merge.rows) * units.shape[1]].view(-1, units.shape[1])
        torch.index_select(units, 0, adapter.units_of(merge.rows, merge.offsets), out=out)
        return merge

    def _plan(self, ranks: tuple[int, ...]) -> _Merge:
        rows, offsets = self._unit_rows(ranks, sides="ab")
        size = len(rows) * ROW_ALIGN_BYTES // self._scratch.element_size()
        if size > len(self._scratch):
            self._merges.clear()  # they point into the old one
            self._scratch = self._scratch.new_empty(size)
        modules = tuple(module for module, rank in enumerate(ranks) if rank)
        items, start = [], 0
        for (_, module), target, source in self._views(modules):
            outputs, inputs = target.shape
            rank = ranks[module]
            down = self._scratch[start : start + rank * inputs].view(1, rank, inputs)
            start += rank * inputs
            up = self._scratch[start : start + rank * outputs].view(1, rank, outputs)
            start += rank * outputs
            items.append(SgmmWeight(target=target, source=source, up=up, down=down))
        plan = plan_sgmm(items, 1, in_place=False, staged=False)
        route = torch.zeros(1, dtype=torch.int32, device=plan.records.device)
        sgmm = self._ops.merge_of(plan)
        merge = _Merge(
            rows=rows, offsets=offsets, modules=modules, items=tuple(items), run=lambda: sgmm.merge_(route)
        )
        self._merges[ranks] = merge
        return merge

    def _unit_rows(self, ranks: tuple[int, ...], *, sides: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return, for each 128 bytes of an adapter's factors, the row of its table and the place in that row: layer by layer, linear by linear,
        A before B. Raises ValueError where rows are no multiple of 128 bytes (`engine/merge_choice.py` refuses such models)."""
        itemsize, device = self._scratch.element_size(), self._scratch.device
        rows: list[np.ndarray] = []
        counts: list[np.ndarray] = []
        for layer in range(self._layers):
            for module, name in enumerate(MODULES):
                outputs, inputs = self._linears[name]
                firsts = {"a": (a_row, inputs), "b": (b_row, outputs)}
                for row_of, length in (firsts[side] for side in sides):
                    if length * itemsize % ROW_ALIGN_BYTES:
                        raise ValueError(f"rows of {name} are no multiple of {ROW_ALIGN_BYTES} bytes")
                    rows.append(row_of(ranks, layer, module) + np.arange(ranks[module], dtype=np.int32))
                    counts.append(np.full(ranks[module], length * itemsize // ROW_ALIGN_BYTES))
        each = np.concatenate(counts)
        whole = np.repeat(np.concatenate(rows), each).astype(np.int32)
        offsets = np.arange(len(whole)) - np.repeat(np.cumsum(each) - each, each)
        return torch.from_numpy(whole).to(device), torch.from_numpy(offsets.astype(np.int32)).to(device)

    def _views(self, modules: Sequence[int]) -> Iterator[tuple[tuple[int, int], torch.Tensor, torch.Tensor]]:
        """Yield ((layer, module), its rows of the base's matrix, of the pristine copy)."""
        for layer, (matrices, copies) in enumerate(zip(self._matrices, self._pristine, strict=True)):
            for module in modules:
                group = next(i for i, names in enumerate(GROUPS) if MODULES[module] in names)
                before = GROUPS[group][: GROUPS[group].index(MODULES[module])]
                first = sum(self._linears[name][0] for name in before)
                rows = slice(first, first + self._linears[MODULES[module]][0])
                yield (layer, module), matrices[group][rows], copies[group][rows]


def update_norm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return ‖BA‖ of A [r, in] and Bᵀ [r, out] without forming it: its square is Σ (A·Aᵀ) ∘ (Bᵀ·B)."""
    a, b = a.float(), b.float()
    return ((a @ a.T) * (b @ b.T)).sum().clamp(min=0).sqrt()
