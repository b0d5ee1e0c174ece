"""The gated DOWN of the segmented gather matrix multiplication, written before it (kernels/sgmm.py), or only its gates.

    stage = concat_i[g_i · A_i of this token]; in place, behind it: the negative of what was there, the last token's

So that both operands of the product come from shared memory, and what is taken out in place is, bit for bit, what was put in. It reads k·r·in
elements of every weight and writes as many; in place, twice that. A panel (kernels/sgmm_panel.py) multiplies A as it passes through registers
and needs the signed gates alone: −(g · A) and (−g) · A round alike.
Source: LoRA-Switch, arXiv:2405.17741 (its concat[G_i · DOWN_i]).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.checks import check_tensor
from kernels.sgmm_launch import NUM_SMS
from kernels.sgmm_plan import RECORD_COLUMNS, SgmmPlan

STAGE_BLOCK = 2048  # elements of a row that a program takes at a time
STAGE_PROGRAMS = NUM_SMS * 8


@triton.jit
def address(record, like, COLUMN: tl.constexpr, EVEN: tl.constexpr):
    """Read an address out of a weight's record, as a pointer to elements like those of `like`."""
    pointer = tl.load(record + COLUMN).to(tl.pointer_type(like.dtype.element_ty))
    if EVEN:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def size(record, COLUMN: tl.constexpr, EVEN: tl.constexpr):
    """Read a size or stride out of a weight's record: below 2**31, and with EVEN a multiple of 16."""
    value = tl.load(record + COLUMN).to(tl.int32)
    if EVEN:
        value = tl.multiple_of(value, 16)
    return value


@triton.jit(do_not_specialize=["first_weight", "num_weights", "total_rows"])
def stage_down_kernel(
    like, records, route, gates, first_weight, num_weights, total_rows,
    TOP_K: tl.constexpr, IN_PLACE: tl.constexpr, EVEN: tl.constexpr, SEARCH: tl.constexpr, BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write each weight's gated DOWN, row by row; in place, what was there becomes the part to take out."""
    column = tl.arange(0, BLOCK)
    base = tl.load(records + first_weight.to(tl.int64) * COLUMNS + 12)
    candidate = tl.arange(0, SEARCH)
    starts = tl.load(
        records + (first_weight + candidate).to(tl.int64) * COLUMNS + 12,
        mask=candidate < num_weights,
        other=2**62,
    )
    for number in tl.range(tl.program_id(0), total_rows, tl.num_programs(0), num_stages=1):
        weight = first_weight + tl.sum((starts - base <= number).to(tl.int32)) - 1
        record = records + weight.to(tl.int64) * COLUMNS
        at = (number - (tl.load(record + 12) - base)).to(tl.int32)  # row of this weight's top_k * rank
        inp = size(record, 6, EVEN)
        rank = tl.load(record + 7).to(tl.int32)
        segment = at // rank
        expert = tl.maximum(tl.load(route + segment), 0).to(tl.int64)
        gate = tl.load(gates + segment)
        source = address(record, like, 3, EVEN)
        source += expert * tl.load(record + 11) + (at % rank).to(tl.int64) * inp
        stage = address(record, like, 4, EVEN) + at.to(tl.int64) * inp
        last = stage + (TOP_K * rank).to(tl.int64) * inp
        if EVEN:
            source, stage, last = (
                tl.multiple_of(source, 16), tl.multiple_of(stage, 16), tl.multiple_of(last, 16)
            )  # fmt: skip
        for first in tl.range(0, inp, BLOCK, num_stages=1):
            inside = first + column < inp
            a = tl.load(source + first + column, mask=inside, other=0.0)
            if IN_PLACE:
                old = tl.load(stage + first + column, mask=inside, other=0.0)
                tl.store(last + first + column, -old, mask=inside)
            tl.store(stage + first + column, (gate * a.to(tl.float32)).to(a.dtype), mask=inside)


@triton.jit(do_not_specialize=["first_weight", "num_weights"])
def keep_gates_kernel(
    kept, gates, first_weight, num_weights,
    TOP_K: tl.constexpr, IN_PLACE: tl.constexpr, WEIGHTS: tl.constexpr, CHOICES: tl.constexpr,
):  # fmt: skip
    """Write each weight's gates; in place, the negative of what was there behind them."""
    weight = tl.arange(0, WEIGHTS)[:, None]
    choice = tl.arange(0, CHOICES)[None, :]
    inside = (weight < num_weights) & (choice < TOP_K)
    at = kept + (first_weight + weight) * (2 * TOP_K if IN_PLACE else TOP_K) + choice
    if IN_PLACE:
        tl.store(at + TOP_K, -tl.load(at, mask=inside, other=0.0), mask=inside)
    new = tl.load(gates + choice + 0 * weight, mask=inside, other=0.0)
    tl.store(at, new, mask=inside)


def keep_gates_(plan: SgmmPlan, gates: torch.Tensor, *, weight: int | None = None) -> None:
    """Write this token's gates to the plan's; in place, keep the negative of what was there behind them. Arguments as of `stage_down_`."""
    check_tensor("gates", gates, shape=(plan.top_k,), dtypes=(torch.float32,), device=plan.records.device)
    first, count = (0, len(plan.weights)) if weight is None else (weight, 1)
    keep_gates_kernel[(1,)](
        plan.gates, gates, first, count, TOP_K=plan.top_k, IN_PLACE=plan.in_place,
        WEIGHTS=triton.next_power_of_2(count), CHOICES=triton.next_power_of_2(plan.top_k), num_warps=4,
    )  # fmt: skip


def stage_down_(
    plan: SgmmPlan, route: torch.Tensor, gates: torch.Tensor, *, weight: int | None = None
) -> None:
    """Write g_i · A_i of the routed experts to the plan's stage; in place, keep the negative of what was there behind it.

    route: [segments] int32, this token's experts first; gates: [k] fp32, 0 for an expert −1. weight: only this one's.
    Raises ValueError on shape, dtype or device mismatch.
    """
    check_route(plan, route)
    keep_gates_(plan, gates, weight=weight)
    first, count = (0, len(plan.weights)) if weight is None else (weight, 1)
    rows = sum(plan.top_k * item.rank for item in plan.weights[first : first + count])
    stage_down_kernel[(min(rows, STAGE_PROGRAMS),)](
        plan.stage, plan.records, route, gates, first, count, rows,
        TOP_K=plan.top_k, IN_PLACE=plan.in_place, EVEN=plan.fits(1, 16, 1), BLOCK=STAGE_BLOCK,
        SEARCH=triton.next_power_of_2(len(plan.weights)), COLUMNS=RECORD_COLUMNS, num_warps=4,
    )  # fmt: skip


def check_route(plan: SgmmPlan, route: torch.Tensor) -> None:
    """Raise ValueError unless `route` is one of this plan."""
    check_tensor("route", route, shape=(plan.segments,), dtypes=(torch.int32,), device=plan.records.device)
