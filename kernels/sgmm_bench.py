"""Check and time the segmented gather matrix multiplication: every tuning, against its reference and against its bound."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from kernels import sgmm_ref
from kernels.compile_ahead import Job
from kernels.graph_time import FLOPS_PER_S, check_error, graph_us, relative_error, timed
from kernels.sgmm import Sgmm
from kernels.sgmm_launch import CANDIDATES, SgmmTuning
from kernels.sgmm_plan import SgmmPlan, SgmmWeight, plan_sgmm

COPY_BYTES_PER_S = 4.241e12  # H200, read and write counted (shared/facts/h200.md, 2026-11-21)
TOP_K = 2
SMALL_SHAPES = ((512, 768), (1024, 256))  # blocks of every tuning fill them
TINY_SHAPES = ((64, 128), (128, 64))  # for the interpreter


def bound_us(plan: SgmmPlan) -> float:
    """Return the time of a merge's bytes at the copy rate or of its operations, whichever is longer."""
    return max(plan.moved_bytes / COPY_BYTES_PER_S, plan.flops / FLOPS_PER_S) * 1e6


def small_plan(rank: int, *, in_place: bool, dtype: torch.dtype, device: str, seed: int = 0) -> SgmmPlan:
    """Return a plan over two small weights and four experts."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*size: int, std: float) -> torch.Tensor:
        return (torch.randn(*size, generator=generator, device=device) * std).to(dtype)

    items = []
    for out, inp in TINY_SHAPES if device == "cpu" else SMALL_SHAPES:
        target, source = draw(out, inp, std=1.0), draw(out, inp, std=1.0)
        up, down = draw(4, rank, out, std=0.2), draw(4, rank, inp, std=0.2)
        items.append(SgmmWeight(target=target, source=target if in_place else source, up=up, down=down))
    return plan_sgmm(items, TOP_K, in_place=in_place)


def check_sgmm(
    tuning: SgmmTuning | None,
    rank: int,
    in_place: bool,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
) -> float:
    """Merge two tokens' experts, one after the other, and return the relative error of W; raises WrongResultError where it is too large."""
    plan, plan_ref = (small_plan(rank, in_place=in_place, dtype=dtype, device=device) for _ in range(2))
    merge = Sgmm(plan, tuning)
    route = torch.zeros(plan.segments, dtype=torch.int32, device=device)
    for experts, values in (([3, 0], [0.7, 0.2]), ([1, 3], [0.5, 0.3])):
        if in_place:
            route[TOP_K:] = route[:TOP_K].clone()
        route[:TOP_K] = torch.tensor(experts, dtype=torch.int32, device=device)
        gates = torch.tensor(values, device=device)
        merge.stage_(route, gates)
        merge.merge_(route)
        sgmm_ref.stage_down_(plan_ref, route, gates)
        sgmm_ref.merge_(plan_ref, route)
    pairs = zip(plan.weights, plan_ref.weights, strict=True)
    error = max(relative_error(mine.target, ref.target) for mine, ref in pairs)
    return check_error(f"sgmm {tuning.name if tuning else ''} r={rank} in_place={in_place}", error)


def compile_jobs(ranks: Sequence[int], tunings: Sequence[SgmmTuning] = CANDIDATES) -> list[Job]:
    """Return jobs for `compile_ahead`: each compiles what one tuning launches."""
    return [
        (check_sgmm, (tuning, rank, form)) for tuning in tunings for rank in ranks for form in (False, True)
    ]


def sweep(
    plan: SgmmPlan,
    route: torch.Tensor,
    gates: torch.Tensor,
    *,
    replays: int = 6,
    tunings: Sequence[SgmmTuning] = CANDIDATES,
    failed: Callable[[str, Exception], object],
) -> list[dict[str, Any]]:
    """Time every tuning on a plan as large as a model: merging, and what it needs before; fastest first. One that fails is told and left out."""
    rows: list[dict[str, Any]] = []
    for tuning in tunings:
        try:
            merge = Sgmm(plan, tuning)
            if merge.tuning is not tuning:  # a panel that does not fit
                continue
            us = graph_us(partial(merge.merge_, route), replays)
            stage_us = graph_us(partial(merge.stage_, route, gates), replays)
        except Exception as error:  # the next one may run
            failed(tuning.name, error)
            continue
        rows.append({"tuning": tuning.name, "stage_us": round(stage_us, 1), **timed(us, bound_us(plan))})
        rows[-1]["ratio_with_stage"] = round((us + stage_us) / bound_us(plan), 3)
    return sorted(rows, key=lambda row: row["us"])
