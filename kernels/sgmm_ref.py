"""Plain PyTorch reference of `kernels.sgmm`, on the same plan; also the CPU backend's."""

from __future__ import annotations

import torch

from kernels.sgmm_plan import STAGE, SgmmPlan, SgmmWeight


def stage_down_(plan: SgmmPlan, route, gates, *, weight=None) -> None:
    """Write g_i · A_i of the routed experts to the stage; in place, the negative of what was there behind it. And the gates."""
    keep_gates_(plan, gates, weight=weight)
    for index in _which(plan, weight):
        stage, half = _stage_of(plan, index), plan.top_k * plan.weights[index].rank
        if plan.in_place:
            stage[half:] = -stage[:half]
        experts = plan.weights[index].down[route[: plan.top_k].clamp(min=0).long()]
        stage[:half] = (gates[:, None, None] * experts.float()).to(stage.dtype).flatten(0, 1)


def keep_gates_(plan: SgmmPlan, gates, *, weight=None) -> None:
    """Write this token's gates; in place, the negative of what was there behind them."""
    for index in _which(plan, weight):
        if plan.in_place:
            plan.gates[index, plan.top_k :] = -plan.gates[index, : plan.top_k]
        plan.gates[index, : plan.top_k] = gates


def merge_(plan: SgmmPlan, route, *, weight=None) -> None:
    """Write W = source + UP · DOWN, in fp32 and rounded once."""
    for index in _which(plan, weight):
        item = plan.weights[index]
        up = _ups_of(item, route).float()
        down = _stage_of(plan, index).float() if plan.staged else item.down[0].float()
        item.target.copy_((item.source.float() + up.T @ down).to(item.target.dtype))


class Sgmm:
    """The two as methods, as of `kernels.sgmm.Sgmm`."""

    def __init__(self, plan: SgmmPlan) -> None:
        self.plan = plan

    def stage_(self, route, gates, *, weight=None) -> None:
        """Write the stage and the gates."""
        stage_down_(self.plan, route, gates, weight=weight)

    def merge_(self, route, *, weight=None) -> None:
        """Write W."""
        merge_(self.plan, route, weight=weight)


def _ups_of(item: SgmmWeight, route: torch.Tensor) -> torch.Tensor:
    return item.up[route.clamp(min=0).long()].flatten(0, 1)


def _which(plan: SgmmPlan, weight: int | None) -> range:
    return range(len(plan.weights)) if weight is None else range(weight, weight + 1)


def _stage_of(plan: SgmmPlan, index: int) -> torch.Tensor:
    """Return a weight's stage [segments · r, in], a view."""
    item = plan.weights[index]
    start = (int(plan.records[index, STAGE]) - plan.stage.data_ptr()) // plan.stage.element_size()
    shape = plan.segments * item.rank, item.target.shape[1]
    return plan.stage[start : start + shape[0] * shape[1]].view(shape)
