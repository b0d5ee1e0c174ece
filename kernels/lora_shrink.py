"""Batched LoRA shrink over the paged pool: project each token through its adapter's A.

    bridge[s, t, i] = Σ_{k in part s} x[t, k] · A[i, k]        i over the A rows of a group's modules, back to back

The sum over the parts `s` of `in` (split-K) is the expand's business, so no atomics and nothing to clear. Work is a list of (tile, block of
A rows) items, walked by a fixed grid up to a length read from device memory: one captured graph serves any adapters. Ranks are exact.
Idea of batching by segments: Punica, arXiv:2310.18547; of the paged pool: S-LoRA, arXiv:2311.03285.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.lora_check import (
    check,
    check_bridge,
    check_items,
    check_launch,
    check_matrix,
    check_pool,
    check_tiles,
)
from kernels.lora_launch import ExpandTuning, ShrinkTuning
from kernels.lora_plan import GROUPS, ROW_ALIGN_BYTES


@triton.jit
def sum_ranks(record, FIRST: tl.constexpr, LAST: tl.constexpr):
    """Sum the ranks of modules [FIRST, LAST) of a tile record."""
    total = tl.full((), 0, tl.int32)
    for module in tl.static_range(FIRST, LAST):
        total += tl.load(record + 4 + module)
    return total


@triton.jit
def row_offsets(entries, index, live, UNIT: tl.constexpr):
    """Offsets in the pool, in elements, of rows `index` of a row table; 64-bit, as a pool can hold more than 2**31 elements."""
    return tl.load(entries + index, mask=live, other=0).to(tl.int64) * UNIT


@triton.jit
def wait_for_predecessor(PDL: tl.constexpr):
    """Wait until the kernel ahead in the stream has ended and its writes are visible; then let the one behind us start its own prologue.

    In this order a kernel that starts early can rely on everything up to the last kernel but one.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def shrink_row(
    token, a_first, rows_of_group, low, k_first, pool, table, out, bridge_width,
    IN: tl.constexpr, SPLITS: tl.constexpr, SPLIT_K: tl.constexpr, RANK_BLOCK: tl.constexpr, ROW_K: tl.constexpr,
    UNIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token (decode with an adapter of its own): A in registers by 16-byte loads, fp32 multiply and sum.

    No shared memory on the way in and no chain of matrix instructions; 16 x ROW_K elements are in flight at once.
    """
    EVEN: tl.constexpr = SPLIT_K % ROW_K == 0 and SPLIT_K * SPLITS == IN
    k = tl.arange(0, ROW_K)
    for sub in tl.range(low, tl.minimum(low + RANK_BLOCK, rows_of_group), 16, num_stages=1):
        index = sub + tl.arange(0, 16)
        live = index < rows_of_group
        a_rows = pool + row_offsets(table + a_first, index, live, UNIT)
        h = tl.zeros([16], tl.float32)
        for chunk in tl.static_range(0, SPLIT_K, ROW_K):
            column = k_first + chunk + k
            if EVEN:
                a = tl.load(a_rows[:, None] + column[None, :], mask=live[:, None], other=0.0)
                wait_for_predecessor(PDL)
                x = tl.load(token + column)
            else:
                inside = (chunk + k < SPLIT_K) & (column < IN)
                a = tl.load(
                    a_rows[:, None] + column[None, :], mask=live[:, None] & inside[None, :], other=0.0
                )
                wait_for_predecessor(PDL)
                x = tl.load(token + column, mask=inside, other=0.0)
            h += tl.sum(a.to(tl.float32) * x.to(tl.float32)[None, :], axis=1)
        tl.store(out + index, h, mask=index < bridge_width)


@triton.jit
def shrink_tile(
    tokens, stride_x, row_count, a_first, rows_of_group, low, k_first, pool, table, out, stride_bridge, bridge_width,
    IN: tl.constexpr, SPLITS: tl.constexpr, SPLIT_K: tl.constexpr, TILE_TOKENS: tl.constexpr, RANK_BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, UNIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Several tokens: x tile · A blockᵀ, both by cp.async through shared memory, STAGES steps in flight.

    Neither operand is cast, so none sits in registers when this becomes wgmma (see the ptxas 12.8 note in lora_expand.py).
    """
    EVEN: tl.constexpr = SPLIT_K % BLOCK_K == 0 and SPLIT_K * SPLITS == IN
    t = tl.arange(0, TILE_TOKENS)
    k = tl.arange(0, BLOCK_K)
    in_tile = (t < row_count)[:, None]
    index = low + tl.arange(0, RANK_BLOCK)
    live = index < rows_of_group
    a_rows = pool + row_offsets(table + a_first, index, live, UNIT)
    x_rows = tokens + t.to(tl.int64) * stride_x
    h = tl.zeros([TILE_TOKENS, RANK_BLOCK], tl.float32)
    wait_for_predecessor(PDL)
    for chunk in tl.range(0, SPLIT_K, BLOCK_K, num_stages=STAGES):
        column = k_first + chunk + k
        if EVEN:
            x = tl.load(x_rows[:, None] + column[None, :], mask=in_tile, other=0.0)
            a = tl.load(a_rows[:, None] + column[None, :], mask=live[:, None], other=0.0)
        else:
            inside = ((chunk + k < SPLIT_K) & (column < IN))[None, :]
            x = tl.load(x_rows[:, None] + column[None, :], mask=in_tile & inside, other=0.0)
            a = tl.load(a_rows[:, None] + column[None, :], mask=live[:, None] & inside, other=0.0)
        h = tl.dot(x, tl.trans(a), h, input_precision="ieee")
    keep = in_tile & (index < bridge_width)[None, :]
    tl.store(out + t[:, None] * stride_bridge + index[None, :], h, mask=keep)


@triton.jit(do_not_specialize=["layer"])
def lora_shrink_kernel(
    x, pool, table, tiles, items, num_items, bridge, stride_x, stride_plane, stride_bridge, bridge_width, item_capacity, layer,
    GROUP: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, IN: tl.constexpr, SPLITS: tl.constexpr, SPLIT_K: tl.constexpr,
    TILE_TOKENS: tl.constexpr, RANK_BLOCK: tl.constexpr, ROW_K: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    UNIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # Up to wait_for_predecessor() only what was written before the kernel ahead of us started is read: tiles, items and
    # the pool. These loads, and the first piece of A, so overlap that kernel's tail. Every program waits, also one without
    # work, so that the order is kept for the kernels behind us.
    total = tl.load(num_items + GROUP) * SPLITS
    for number in tl.range(tl.program_id(0), total, tl.num_programs(0), num_stages=1):
        work = tl.full((), 0, tl.int32) + number  # a plain int in the interpreter
        split = (work % SPLITS).to(tl.int64)
        k_first = (work % SPLITS) * SPLIT_K
        item = items + (GROUP * item_capacity + work // SPLITS) * 2
        record = tiles + tl.load(item) * 16
        low = tl.load(item + 1) * RANK_BLOCK  # of the group's A rows
        table_unit = tl.load(record).to(tl.int64)
        row_start = tl.load(record + 1).to(tl.int64)
        row_count = tl.load(record + 2)
        before = sum_ranks(record, 0, FIRST)
        rows_of_group = sum_ranks(record, FIRST, LAST)
        all_ranks = before + rows_of_group + sum_ranks(record, LAST, 7)
        a_first = table_unit * 32 + layer * 2 * all_ranks + before
        tokens = x + row_start * stride_x
        out = bridge + split * stride_plane + row_start * stride_bridge
        if row_count == 1:
            shrink_row(
                tokens, a_first, rows_of_group, low, k_first, pool, table, out, bridge_width,
                IN, SPLITS, SPLIT_K, RANK_BLOCK, ROW_K, UNIT, PDL,
            )  # fmt: skip
        else:
            shrink_tile(
                tokens, stride_x, row_count, a_first, rows_of_group, low, k_first, pool, table, out, stride_bridge,
                bridge_width, IN, SPLITS, SPLIT_K, TILE_TOKENS, RANK_BLOCK, BLOCK_K, STAGES, UNIT, PDL,
            )  # fmt: skip
    wait_for_predecessor(PDL)


def lora_shrink(
    x: torch.Tensor,
    pool: torch.Tensor,
    tiles: torch.Tensor,
    num_tiles: torch.Tensor,
    shrink_items: torch.Tensor,
    num_shrink_items: torch.Tensor,
    bridge: torch.Tensor,
    *,
    group: int,
    layer: int,
    tile_tokens: int,
    splits: int,
    num_programs: int,
    tuning: ShrinkTuning | None = None,
) -> torch.Tensor:
    """Write the partial products x · Aᵀ of one group of modules to `bridge`, and return it.

    x: [T, in], rows contiguous. pool: [num_pages, page_elems] of x's dtype (bf16, fp16, fp32). tiles: int32 [capacity, 16], num_tiles: int32 [1].
    shrink_items: int32 [4, capacity, 2], num_shrink_items: int32 [4], cut by `plan_lora` with the same tile_tokens and rank block.
    bridge: fp32 [>= splits, >= T, width], width at least the group's Σ rank, a multiple of 16. Rows of no tile are left as they are; so
    are columns past the last rank block of a tile, and those between Σ rank and the end of that block are zero.
    group: 0 qkv, 1 o, 2 gate_up, 3 down. layer: index in the adapters' row tables. splits: parts of `in`, each with its own plane.
    num_programs: size of the fixed grid.
    With tuning.pdl the kernel may start before the one ahead of it in the stream has ended: that one must not write tiles, items or adapter rows.
    Raises ValueError on a shape, dtype, stride or device that does not fit.
    """
    tuning = tuning or ShrinkTuning()
    check_pool(pool, x.device)
    check_matrix("x", x, pool.dtype, x.device)
    check_tiles(tiles, num_tiles, x.device)
    check_items(shrink_items, num_shrink_items, x.device)
    check_bridge(bridge, x.shape[0], splits, x.device)
    check_launch(group, layer, tile_tokens, num_programs)
    in_features = x.shape[1]
    unit = ROW_ALIGN_BYTES // pool.element_size()
    check(
        in_features * pool.element_size() <= pool.shape[1] * pool.element_size(),
        f"x has {in_features} columns, more than a page of pool",
    )
    # A part is a whole number of 16-byte pieces, and of matrix steps when that divides evenly.
    split_k = triton.cdiv(triton.cdiv(in_features, splits), 16) * 16
    block_k = min(tuning.block_k, max(16, triton.next_power_of_2(split_k)))
    row_k = min(tuning.row_k, max(16, triton.next_power_of_2(split_k)))
    first, last = GROUPS[group]
    lora_shrink_kernel[(num_programs,)](
        x, pool, pool.view(torch.int32), tiles, shrink_items, num_shrink_items, bridge,
        x.stride(0), bridge.stride(0), bridge.stride(1), bridge.shape[2], shrink_items.shape[1], layer,
        GROUP=group, FIRST=first, LAST=last, IN=in_features, SPLITS=splits, SPLIT_K=split_k, TILE_TOKENS=tile_tokens,
        RANK_BLOCK=tuning.rank_block, ROW_K=row_k, BLOCK_K=block_k, STAGES=tuning.num_stages, UNIT=unit,
        **launch_options(x, tuning),
    )  # fmt: skip
    return bridge


def launch_options(x: torch.Tensor, tuning: ShrinkTuning | ExpandTuning) -> dict:
    """Return the options of a Triton launch; PDL only on a GPU that has it (sm_90 on), never in the interpreter."""
    options = {"num_warps": tuning.num_warps, "num_stages": 1, "PDL": False}
    if not x.is_cuda:
        return options
    if tuning.max_registers:
        options["maxnreg"] = tuning.max_registers
    if tuning.pdl and torch.cuda.get_device_capability(x.device) >= (9, 0):
        options |= {"PDL": True, "launch_pdl": True}
    return options
