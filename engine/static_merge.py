"""One ordinary adapter merged into the base weights, W = W_0 + (scale · B) · A, and taken out again: `merge=hot`.

The pristine copy is kept: taking out is copying back, so a merge leaves nothing behind. What is merged touches every request, so an
adapter whose update is too large against the weight it changes is refused before anything is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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

    def factors(
        self, layer: int, module: int, inputs: int, outputs: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return copies of A [rank, in] and Bᵀ [rank, out], the scale in B."""
        return (
            self._rows(a_row(self.ranks, layer, module), self.ranks[module], inputs),
            self._rows(b_row(self.ranks, layer, module), self.ranks[module], outputs),
        )

    def _rows(self, first: int, count: int, length: int) -> torch.Tensor:
        start = self.table_unit * ENTRIES_PER_UNIT + first
        entries = self.pool.view(-1).view(torch.int32)[start : start + count].long()
        unit = ROW_ALIGN_BYTES // self.pool.element_size()
        columns = torch.arange(length, device=self.pool.device)
        return self.pool.view(-1)[entries[:, None] * unit + columns]


class StaticMerge:
    """The base's weights, the pristine copy of those that adapters may change, and what is merged at present."""

    def __init__(self, weights: ModelWeights, shape: ModelShape, ops: SwitchOps) -> None:
        self._ops = ops
        self._linears = shape.linear_shapes()
        self._matrices = [group_weights(layer) for layer in weights.layers]
        self._pristine = [tuple(matrix.clone() for matrix in layer) for layer in self._matrices]
        self._norms = {key: source.float().norm() for key, _, source in self._views(range(len(MODULES)))}
        self.merged: frozenset[int] = frozenset()  # indices of the linears that hold an adapter

    @property
    def pristine_bytes(self) -> int:
        """Bytes of the copy."""
        return sum(copy.numel() * copy.element_size() for layer in self._pristine for copy in layer)

    def merge_(self, adapter: PackedAdapter, name: str) -> None:
        """Merge an adapter, in place of the one before. Raises UserError, with the weights untouched, where its update is too large."""
        targets = [module for module, rank in enumerate(adapter.ranks) if rank]
        items: list[SgmmWeight] = []
        ratios: list[torch.Tensor] = []
        for key, target, source in self._views(targets):
            outputs, inputs = target.shape
            a, b = adapter.factors(*key, inputs, outputs)
            ratios.append(update_norm(a, b) / self._norms[key])
            items.append(SgmmWeight(target=target, source=source, up=b[None], down=a[None]))
        worst = torch.stack(ratios).nan_to_num(nan=torch.inf).max().item()
        if not worst <= MAX_UPDATE_RATIO:
            raise UserError(
                f"adapter {name!r}: its update is {worst:.3g} times a weight that it changes, merged at most {MAX_UPDATE_RATIO:g}"
            )
        self._put_back(self.merged - set(targets))
        plan = plan_sgmm(items, 1, in_place=False, staged=False)
        route = torch.zeros(1, dtype=torch.int32, device=plan.records.device)
        self._ops.merge_of(plan)(route, None)
        self.merged = frozenset(targets)

    def unmerge_(self) -> None:
        """Take out what is merged: the base's bits, as they were."""
        self._put_back(self.merged)
        self.merged = frozenset()

    def _put_back(self, modules: frozenset[int]) -> None:
        for _, target, source in self._views(sorted(modules)):
            target.copy_(source)

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
