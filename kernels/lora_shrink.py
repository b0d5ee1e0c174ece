"""Batched LoRA shrink over the paged pool: project each token through its adapter's A.

    bridge[s, t, i] = Σ_{k in part s} x[t, k] · A[i, k]        i over the A rows of a group's modules, back to back

The sum over the parts `s` of `in` (split-K) is the expand's business, so no atomics and nothing to clear. Work is a list of (tile, block of
A rows) items times the parts, walked by a fixed grid up to a length read from device memory: one captured graph serves any adapters. Ranks
are exact.

Idea of batching by segments: Punica, arXiv:2310.18547; of the paged pool: S-LoRA, arXiv:2311.03285.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.launch import let_successor_start, wait_for_predecessors
from kernels.lora_check import (
    check,
    check_bridge,
    check_headers,
    check_items,
    check_launch,
    check_matrix,
    check_pool,
)
from kernels.lora_launch import ExpandTuning, ShrinkTuning
from kernels.lora_plan import RANK_BLOCK, ROW_ALIGN_BYTES


@triton.jit
def row_offsets(entries, index, live, UNIT: tl.constexpr):
    """Offsets in the pool, in elements, of rows `index` of a row table; 64-bit, as a pool can hold more than 2**31 elements."""
    return tl.load(entries + index, mask=live, other=0).to(tl.int64) * UNIT


@triton.jit
def load_a(a_rows, live, column, IN: tl.constexpr, EVEN: tl.constexpr):
    """Load a block of A, zero where not live or past `in`."""
    if EVEN:
        return tl.load(a_rows[:, None] + column[None, :], mask=live[:, None], other=0.0)
    return tl.load(a_rows[:, None] + column[None, :], mask=live[:, None] & (column < IN)[None, :], other=0.0)


@triton.jit
def load_x(x_rows, in_tile, column, wanted, IN: tl.constexpr, EVEN: tl.constexpr):
    """Load a block of x, zero outside the tile or past `in`, or if not wanted."""
    if EVEN:
        return tl.load(x_rows[:, None] + column[None, :], mask=in_tile & wanted, other=0.0)
    return tl.load(
        x_rows[:, None] + column[None, :], mask=in_tile & wanted & (column < IN)[None, :], other=0.0
    )


@triton.jit
def shrink_small_tile(
    x_rows, in_tile, a_rows, live, k_first, k_count,
    IN: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Multiply a few rows of x by a block of A. A is nearly all the bytes, and no kernel writes it.

    So the first blocks of A are on their way (cp.async) when the loop's first turn waits for the kernels ahead; x is loaded a block ahead.
    """
    EVEN: tl.constexpr = IN % BLOCK_K == 0
    k = tl.arange(0, BLOCK_K)
    h = tl.zeros([x_rows.shape[0], a_rows.shape[0]], tl.float32)
    x = tl.zeros([x_rows.shape[0], BLOCK_K], x_rows.dtype.element_ty)
    for chunk in tl.range(0, k_count, BLOCK_K, num_stages=STAGES):
        column = k_first + chunk + k
        a = load_a(a_rows, live, column, IN, EVEN)
        if chunk == 0:
            wait_for_predecessors(PDL)
            x = load_x(x_rows, in_tile, column, chunk < k_count, IN, EVEN)
        next_x = load_x(x_rows, in_tile, column + BLOCK_K, chunk + BLOCK_K < k_count, IN, EVEN)
        h = tl.dot(x, tl.trans(a), h, input_precision="ieee")
        x = next_x
    return h


@triton.jit
def shrink_large_tile(
    x_rows, in_tile, a_rows, live, k_first, k_count,
    IN: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Multiply many rows of x, most of the bytes here, by a block of A: both by cp.async, STAGES blocks in flight."""
    EVEN: tl.constexpr = IN % BLOCK_K == 0
    k = tl.arange(0, BLOCK_K)
    h = tl.zeros([x_rows.shape[0], a_rows.shape[0]], tl.float32)
    wait_for_predecessors(PDL)
    for chunk in tl.range(0, k_count, BLOCK_K, num_stages=STAGES):
        column = k_first + chunk + k
        x = load_x(x_rows, in_tile, column, chunk < k_count, IN, EVEN)
        h = tl.dot(x, tl.trans(load_a(a_rows, live, column, IN, EVEN)), h, input_precision="ieee")
    return h


@triton.jit
def shrink_tile(
    tokens, stride_x, row_count, entries, live_rows, k_first, k_count, pool, out, stride_bridge,
    IN: tl.constexpr, TILE: tl.constexpr, RANK_BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    UNIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Write h of one item. TILE is below 64, so that products are mma.sync and not wgmma (see the ptxas 12.8 note in lora_expand.py)."""
    t = tl.arange(0, TILE)
    in_tile = (t < row_count)[:, None]
    index = tl.arange(0, RANK_BLOCK)
    live = index < live_rows
    a_rows = pool + row_offsets(entries, index, live, UNIT)
    x_rows = tokens + t.to(tl.int64) * stride_x
    if TILE == 16:
        h = shrink_small_tile(x_rows, in_tile, a_rows, live, k_first, k_count, IN, BLOCK_K, STAGES, PDL)
    else:
        h = shrink_large_tile(x_rows, in_tile, a_rows, live, k_first, k_count, IN, BLOCK_K, STAGES, PDL)
    tl.store(out + t[:, None] * stride_bridge + index[None, :], h, mask=in_tile & live[None, :])


@triton.jit(noinline=True)
def shrink_tile_apart(
    tokens, stride_x, row_count, entries, live_rows, k_first, k_count, pool, out, stride_bridge,
    IN: tl.constexpr, TILE: tl.constexpr, RANK_BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    UNIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`shrink_tile` as a function of its own: inlined side by side, the cases' addresses, hoisted out of the loop over items, spill."""
    shrink_tile(
        tokens, stride_x, row_count, entries, live_rows, k_first, k_count, pool, out, stride_bridge,
        IN, TILE, RANK_BLOCK, BLOCK_K, STAGES, UNIT, PDL,
    )  # fmt: skip


@triton.jit(do_not_specialize=["layer"])
def lora_shrink_kernel(
    x, pool, table, headers, items, bridge, stride_x, stride_plane, stride_bridge, layer,
    GROUP: tl.constexpr, IN: tl.constexpr, TILE_TOKENS: tl.constexpr, RANK_BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr, WIDE_BLOCK_K: tl.constexpr, LARGE_BLOCK_K: tl.constexpr, STAGES: tl.constexpr, UNIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # Before the wait only what no kernel of the step writes is read: headers, items and the pool.
    let_successor_start(PDL)
    header = headers + GROUP * 8
    first_item = tl.load(header)
    split_k = tl.multiple_of(tl.load(header + 2), 256)
    splits = tl.load(header + 3)
    total = tl.load(header + 1) * splits
    for number in tl.range(tl.program_id(0), total, tl.num_programs(0), num_stages=1):
        work = tl.full((), 0, tl.int32) + number  # a plain int in the interpreter
        split = work % splits
        item = items + (first_item + work // splits) * 4
        entry = tl.load(item + 1)
        entries = table + (tl.load(item).to(tl.int64) * 32 + (entry & 0xFFFF) + layer * (entry >> 16))
        row_start = tl.load(item + 2).to(tl.int64)
        sizes = tl.load(item + 3)
        row_count = sizes & 255
        live_rows = (sizes >> 8) & 255
        k_first = tl.multiple_of(split * split_k, 256)
        k_count = tl.minimum(split_k, IN - k_first)
        tokens = x + row_start * stride_x
        out = bridge + split.to(tl.int64) * stride_plane + row_start * stride_bridge + (sizes >> 16)
        if TILE_TOKENS == 16 and live_rows <= 16:  # two cases, inlined
            shrink_tile(
                tokens, stride_x, row_count, entries, live_rows, k_first, k_count, pool, out, stride_bridge,
                IN, 16, 16, BLOCK_K, STAGES, UNIT, PDL,
            )  # fmt: skip
        elif TILE_TOKENS == 16:
            shrink_tile(
                tokens, stride_x, row_count, entries, live_rows, k_first, k_count, pool, out, stride_bridge,
                IN, 16, RANK_BLOCK, WIDE_BLOCK_K, STAGES, UNIT, PDL,
            )  # fmt: skip
        elif row_count > 16:
            shrink_tile_apart(
                tokens, stride_x, row_count, entries, live_rows, k_first, k_count, pool, out, stride_bridge,
                IN, TILE_TOKENS, RANK_BLOCK, LARGE_BLOCK_K, STAGES, UNIT, PDL,
            )  # fmt: skip
        elif live_rows > 16:
            shrink_tile_apart(
                tokens, stride_x, row_count, entries, live_rows, k_first, k_count, pool, out, stride_bridge,
                IN, 16, RANK_BLOCK, WIDE_BLOCK_K, STAGES, UNIT, PDL,
            )  # fmt: skip
        else:
            shrink_tile_apart(
                tokens, stride_x, row_count, entries, live_rows, k_first, k_count, pool, out, stride_bridge,
                IN, 16, 16, BLOCK_K, STAGES, UNIT, PDL,
            )  # fmt: skip
    wait_for_predecessors(PDL)


def lora_shrink(
    x: torch.Tensor,
    pool: torch.Tensor,
    headers: torch.Tensor,
    items: torch.Tensor,
    bridge: torch.Tensor,
    *,
    group: int,
    layer: int,
    tile_tokens: int,
    num_programs: int,
    tuning: ShrinkTuning | None = None,
) -> torch.Tensor:
    """Write the partial products x · Aᵀ of one group of modules to `bridge`, and return it.

    x: [T, in], rows contiguous. pool: [num_pages, page_elems] of x's dtype (bf16, fp16, fp32). headers: int32 [4, 8] and
    items: int32 [capacity, 4], as cut by `plan_lora` with the same tile_tokens.
    bridge: fp32 [>= parts of the header, >= T, width], width at least the group's Σ rank. Only columns of A rows of rows of tiles are written.
    group: 0 qkv, 1 o, 2 gate_up, 3 down. layer: index in the adapters' row tables. num_programs: size of the fixed grid.
    With tuning.pdl the kernel may start before those ahead of it in the stream have ended: none of them may write headers, items or adapter rows.
    Raises ValueError on a shape, dtype, stride or device that does not fit.
    """
    tuning = tuning or ShrinkTuning()
    check_pool(pool, x.device)
    check_matrix("x", x, pool.dtype, x.device)
    check_headers(headers, x.device)
    check_items(items, x.device)
    check_bridge(bridge, x.shape[0], x.device)
    check_launch(group, layer, tile_tokens, num_programs)
    in_features = x.shape[1]
    check(in_features <= pool.shape[1], f"x has {in_features} columns, more than a page of pool")
    widest = max(16, triton.next_power_of_2(in_features))
    lora_shrink_kernel[(num_programs,)](
        x, pool, pool.view(torch.int32), headers, items, bridge, x.stride(0), bridge.stride(0), bridge.stride(1), layer,
        GROUP=group, IN=in_features, TILE_TOKENS=tile_tokens, RANK_BLOCK=RANK_BLOCK,
        BLOCK_K=min(tuning.block_k, widest), WIDE_BLOCK_K=min(tuning.wide_block_k, widest),
        LARGE_BLOCK_K=min(tuning.large_block_k, widest), STAGES=tuning.num_stages,
        UNIT=ROW_ALIGN_BYTES // pool.element_size(), **launch_options(x, tuning),
    )  # fmt: skip
    return bridge


def launch_options(x: torch.Tensor, tuning: ShrinkTuning | ExpandTuning) -> dict:
    """Return the options of a Triton launch; early start only on a GPU that has it (sm_90 on), never in the interpreter."""
    options = {"num_warps": tuning.num_warps, "num_stages": 1, "PDL": False}
    if not x.is_cuda:
        return options
    if tuning.max_registers:
        options["maxnreg"] = tuning.max_registers
    if tuning.pdl and torch.cuda.get_device_capability(x.device) >= (9, 0):
        options |= {"PDL": True, "launch_pdl": True}
    return options
