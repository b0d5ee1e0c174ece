"""The operations of a dynamic adapter's decode paths, by backend: Triton kernels, or their plain PyTorch references."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from engine.config import Backend
from engine.ops import Op, Ops, ops_for
from kernels.sgmm_plan import SgmmPlan


class Merge(Protocol):
    """What merges the weights of a plan, all of them or one, as `kernels.sgmm.Sgmm`: `stage_` once a token, before."""

    def stage_(self, route: torch.Tensor, gates: torch.Tensor, *, weight: int | None = None) -> None: ...
    def merge_(self, route: torch.Tensor, *, weight: int | None = None) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SwitchOps:
    """One function an operation; the signatures are those of `kernels/`. merge_of makes a plan's merge."""

    base: Ops
    route_top_k: Op
    expert_shrink: Op
    expert_expand_: Op
    merge_of: Callable[[SgmmPlan], Merge]


def switch_ops_for(backend: Backend) -> SwitchOps:
    """Return the operations of a backend. The reference one launches no Triton kernel."""
    if backend == "reference":
        from kernels.expert_expand_ref import expert_expand_ as expand_ref
        from kernels.expert_shrink_ref import expert_shrink as shrink_ref
        from kernels.route_top_k_ref import route_top_k as route_ref
        from kernels.sgmm_ref import Sgmm as SgmmRef

        return SwitchOps(
            base=ops_for(backend),
            route_top_k=route_ref,
            expert_shrink=shrink_ref,
            expert_expand_=expand_ref,
            merge_of=SgmmRef,
        )
    from kernels.expert_expand import expert_expand_
    from kernels.expert_shrink import expert_shrink
    from kernels.route_top_k import route_top_k
    from kernels.sgmm import Sgmm

    return SwitchOps(
        base=ops_for(backend),
        route_top_k=route_top_k,
        expert_shrink=expert_shrink,
        expert_expand_=expert_expand_,
        merge_of=Sgmm,
    )
