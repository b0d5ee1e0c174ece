"""Merging a dynamic adapter's experts into the base weights, token by token: in place or from a pristine copy, all at once or one by one."""

from __future__ import annotations

import torch

from engine.expert_pools import ExpertPools
from engine.expert_route import ExpertRoute
from engine.switch_ops import SwitchOps
from engine.weights import LayerWeights, ModelWeights
from kernels.sgmm_plan import SgmmPlan, SgmmWeight, plan_sgmm


def group_weights(layer: LayerWeights) -> tuple[torch.Tensor, ...]:
    """Return a layer's four base matrices, by group."""
    return layer.qkv, layer.o, layer.gate_up, layer.down


class ExpertMerge:
    """What writes merged weights into the base's own tensors. It owns the pristine copy of those that experts change.

    in_place: add what this token has more than the last one (no copy would be needed, but `restore` then could not undo the drift).
    """

    def __init__(self, pools: ExpertPools, weights: ModelWeights, ops: SwitchOps, *, in_place: bool) -> None:
        self._pristine: list[tuple[torch.Tensor, torch.Tensor]] = []
        items: list[SgmmWeight] = []
        for layer, groups in zip(weights.layers, pools.layers, strict=True):
            for matrix, group in zip(group_weights(layer), groups, strict=True):
                if group is not None:
                    copy = matrix.clone()
                    self._pristine.append((matrix, copy))
                    items += group.sgmm_weights(matrix, matrix if in_place else copy)
        self.plan: SgmmPlan = plan_sgmm(items, pools.spec.top_k, in_place=in_place)
        self._merge = ops.merge_of(self.plan)

    def merge_(self, route: ExpertRoute, *, one_by_one: bool = False) -> None:
        """Merge the routed token's experts: in one launch, or in one for each weight."""
        segments = route.segments[: self.plan.segments]
        self._merge.stage_(segments, route.gates[0])
        if not one_by_one:
            self._merge.merge_(segments)
            return
        for index in range(len(self.plan.weights)):
            self._merge.merge_(segments, weight=index)

    def restore(self) -> None:
        """Put the pristine weights back, and forget what was merged."""
        for matrix, copy in self._pristine:
            matrix.copy_(copy)
        self.plan.stage.zero_()
        self.plan.gates.zero_()

    def drift(self, route: ExpertRoute) -> float:
        """Return ‖W − (W_0 + UP · DOWN)‖ / ‖W_0‖ over the adapted weights, in fp32: what merging in place has lost. Waits for the device."""
        lost = total = 0.0
        by_address = {matrix.data_ptr(): (matrix, copy) for matrix, copy in self._pristine}
        for item in self.plan.weights:
            pristine = _pristine_of(item, by_address)
            wanted = pristine.float()
            for expert, gate in zip(route.indices[0].tolist(), route.gates[0].tolist(), strict=True):
                wanted = wanted + gate * (item.up[expert].float().T @ item.down[expert].float())
            lost += (item.target.float() - wanted).square().sum().item()
            total += pristine.float().square().sum().item()
        return float((lost / total) ** 0.5)


def _pristine_of(item: SgmmWeight, by_address: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Return the pristine copy of one weight, which may be rows of a group's matrix."""
    for matrix, copy in by_address.values():
        offset = item.target.data_ptr() - matrix.data_ptr()
        if 0 <= offset < matrix.numel() * matrix.element_size():
            first = offset // (matrix.stride(0) * matrix.element_size())
            return copy[first : first + item.target.shape[0]]
    raise AssertionError("a weight of the plan that no pristine copy holds")
