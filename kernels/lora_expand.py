"""Batched LoRA expand over the paged pool: add each token's low-rank update to the base matmul's output, in place.

    y[t, columns of m] += scale[slot(t), m] · Σ_r h[t, r] · B_m[r, :]        h = Σ_s bridge[s]

B is stored transposed, a row holding one rank's `out` elements, so that reading it is coalesced. Work is (tile, block of columns), blocks
never crossing modules; a fixed grid walks it up to a count read from device memory, and modules that are no target cost one load.

Tiles have at most 32 rows, so products are mma.sync: ptxas 12.8 (in Triton 3.6) miscompiles a software-pipelined wgmma whose A operand is in
registers, cast from fp32 (triton issue 9433), which h is.
Source: Punica's expand, arXiv:2310.18547.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from kernels.launch import let_successor_start, wait_for_predecessors
from kernels.lora_check import (
    check,
    check_bridge,
    check_headers,
    check_launch,
    check_matrix,
    check_pool,
    check_tiles,
)
from kernels.lora_launch import ExpandTuning
from kernels.lora_plan import GROUPS, ROW_ALIGN_BYTES, bridge_width
from kernels.lora_shrink import launch_options, row_offsets


@triton.jit
def sum_ranks(record, FIRST: tl.constexpr, LAST: tl.constexpr):
    """Sum the ranks of modules [FIRST, LAST) of a tile record."""
    total = tl.full((), 0, tl.int32)
    for module in tl.static_range(FIRST, LAST):
        total += tl.load(record + 4 + module)
    return total


@triton.jit
def locate(
    work, tiles, item_n, layer, FIRST: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr
):
    """Find an item: its tile's record, module and rank, the module's columns of h, row table entries, width and columns of y, and the
    item's first column."""
    blocks_0 = (W0 + item_n - 1) // item_n
    blocks_1 = (W1 + item_n - 1) // item_n
    blocks = blocks_0 + blocks_1 + (W2 + item_n - 1) // item_n
    record = tiles + work // blocks * 16
    block = work % blocks
    in_1 = (block >= blocks_0).to(tl.int32)  # in the group's second module or a later one
    in_2 = (block >= blocks_0 + blocks_1).to(tl.int32)  # in its third
    module = FIRST + in_1 + in_2
    rank = tl.load(record + 4 + module)
    h_first = tl.full((), 0, tl.int32)
    if W1 > 0:
        h_first += in_1 * tl.load(record + 4 + FIRST)
    if W2 > 0:
        h_first += in_2 * tl.load(record + 5 + FIRST)
    entry = tl.load(record).to(tl.int64) * 32 + layer * tl.load(record + 11) + tl.load(record + 12)
    entry += sum_ranks(record, 0, FIRST) + h_first
    width = W0 + in_1 * (W1 - W0) + in_2 * (W2 - W1)
    y_first = in_1 * W0 + in_2 * W1
    n_first = tl.multiple_of((block - in_1 * blocks_0 - in_2 * blocks_1) * item_n, 256)
    return record, module, rank, h_first, entry, width, y_first, n_first


@triton.jit
def load_b(b_rows, live, column, width, EVEN: tl.constexpr):
    """Load a block of B rows, zero where not live or past the module's width."""
    if EVEN:
        return tl.load(b_rows[:, None] + column[None, :], mask=live[:, None], other=0.0)
    return tl.load(
        b_rows[:, None] + column[None, :], mask=live[:, None] & (column < width)[None, :], other=0.0
    )


@triton.jit
def load_y(y_rows, in_tile, column, width, EVEN: tl.constexpr):
    """Load a block of y, zero outside the tile or past the module's width."""
    if EVEN:
        return tl.load(y_rows[:, None] + column[None, :], mask=in_tile, other=0.0)
    return tl.load(y_rows[:, None] + column[None, :], mask=in_tile & (column < width)[None, :], other=0.0)


@triton.jit
def store_y(y_rows, in_tile, column, width, value, EVEN: tl.constexpr):
    """Store a block of y where `load_y` loads."""
    if EVEN:
        tl.store(y_rows[:, None] + column[None, :], value, mask=in_tile)
    else:
        tl.store(y_rows[:, None] + column[None, :], value, mask=in_tile & (column < width)[None, :])


@triton.jit
def sum_planes(bridge, stride_plane, splits, at, keep, live):
    """Sum the bridge's planes at a matrix of offsets, four at a time, and put zero in the columns that are not live.

    `keep` must not vary within 4 columns: then these are 16-byte loads.
    """
    h = tl.zeros(at.shape, tl.float32)
    for first in tl.range(0, splits, 4, num_stages=1):
        for ahead in tl.static_range(4):
            plane = first + ahead
            h += tl.load(bridge + plane * stride_plane + at, mask=keep & (plane < splits), other=0.0)
    return tl.where(live[None, :], h, 0.0)


@triton.jit
def sum_planes_of_row(bridge, stride_plane, splits, column, keep):
    """Sum the bridge's planes at a vector of columns of one row: one load for eight planes, so that none waits for another."""
    h = tl.zeros([column.shape[0]], tl.float32)
    for first in tl.range(0, splits, 8, num_stages=1):
        plane = (first + tl.arange(0, 8))[:, None]
        parts = tl.load(
            bridge + plane * stride_plane + column[None, :], mask=(plane < splits) & keep[None, :], other=0.0
        )
        h += tl.sum(parts, axis=0)
    return h


@triton.jit(noinline=True)
def expand_row(
    y, bridge, stride_plane, splits, entries, pool, scale, rank, h_first, n_first, n_count, width,
    UNIT: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Add h · B to one row: a thread takes 8 columns of every row of B, a block of 8 ranks ahead, so nothing passes through shared memory."""
    n = n_first + tl.arange(0, 1024)
    limit = tl.minimum(n_first + n_count, width)
    if EVEN:
        limit = tl.multiple_of(limit, 256)
    inside = n < limit
    r = tl.arange(0, 8)
    b_rows = pool + row_offsets(entries, r, r < rank, UNIT)
    b = tl.load(b_rows[:, None] + n[None, :], mask=(r < rank)[:, None] & inside[None, :], other=0.0)
    b_rows = pool + row_offsets(entries, 8 + r, 8 + r < rank, UNIT)
    update = tl.zeros([1024], tl.float32)
    wait_for_predecessors(PDL)
    base = tl.load(y + n, mask=inside, other=0.0)
    for low in tl.range(0, rank, 8, num_stages=1):
        later = low + 8 + r
        next_b = tl.load(
            b_rows[:, None] + n[None, :], mask=(later < rank)[:, None] & inside[None, :], other=0.0
        )
        b_rows = pool + row_offsets(entries, later + 8, later + 8 < rank, UNIT)
        h = sum_planes_of_row(bridge, stride_plane, splits, h_first + low + r, low + r < rank)
        update += tl.sum(b.to(tl.float32) * h[:, None], axis=0)
        b = next_b
    tl.store(y + n, (base.to(tl.float32) + scale * update).to(base.dtype), mask=inside)


@triton.jit
def expand_small_tile(
    y_rows, in_tile, bridge, stride_plane, splits, h_at, keep, live, scale, b_rows, n_first, n_count, width,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Add h · B to a few rows. B is nearly all the bytes, and no kernel writes it.

    So the first blocks of B are on their way (cp.async) when the loop's first turn waits for the kernels ahead; y is loaded a block ahead.
    """
    column = tl.arange(0, BLOCK_N)
    h = tl.zeros(h_at.shape, b_rows.dtype.element_ty)
    base = tl.zeros([h_at.shape[0], BLOCK_N], y_rows.dtype.element_ty)
    for sub in tl.range(0, n_count, BLOCK_N, num_stages=STAGES):
        n = n_first + sub + column
        b = load_b(b_rows, live, n, width, EVEN)
        if sub == 0:
            wait_for_predecessors(PDL)
            h = (scale * sum_planes(bridge, stride_plane, splits, h_at, keep, live)).to(h.dtype)
            base = load_y(y_rows, in_tile, n, width, EVEN)
        next_base = load_y(y_rows, in_tile & (sub + BLOCK_N < n_count), n + BLOCK_N, width, EVEN)
        out = base.to(tl.float32) + tl.dot(h, b, input_precision="ieee")
        store_y(y_rows, in_tile, n, width, out.to(base.dtype), EVEN)
        base = next_base


@triton.jit
def expand_large_tile(
    y_rows, in_tile, bridge, stride_plane, splits, h_at, keep, live, scale, b_rows, n_first, n_count, width,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Add h · B to many rows, which are most of the bytes here; y is loaded a block ahead."""
    column = tl.arange(0, BLOCK_N)
    wait_for_predecessors(PDL)
    h = (scale * sum_planes(bridge, stride_plane, splits, h_at, keep, live)).to(b_rows.dtype.element_ty)
    base = load_y(y_rows, in_tile, n_first + column, width, EVEN)
    for sub in tl.range(0, n_count, BLOCK_N, num_stages=STAGES):
        n = n_first + sub + column
        b = load_b(b_rows, live, n, width, EVEN)
        next_base = load_y(y_rows, in_tile & (sub + BLOCK_N < n_count), n + BLOCK_N, width, EVEN)
        out = base.to(tl.float32) + tl.dot(h, b, input_precision="ieee")
        store_y(y_rows, in_tile, n, width, out.to(base.dtype), EVEN)
        base = next_base


@triton.jit
def expand_high_rank(
    y_rows, in_tile, bridge, stride_plane, splits, h_at, column, width_of_bridge, skip, end, scale, entries, pool, n_first, n_count,
    width, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, UNIT: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Add h · B where the rank takes several blocks: those of one block of columns after the other, h summed anew for each."""
    RANK_BLOCK: tl.constexpr = h_at.shape[1]
    c = tl.arange(0, RANK_BLOCK)
    wait_for_predecessors(PDL)
    for sub in tl.range(0, n_count, BLOCK_N, num_stages=1):
        n = n_first + sub + tl.arange(0, BLOCK_N)
        base = load_y(y_rows, in_tile, n, width, EVEN)
        out = base.to(tl.float32)
        for low in tl.range(0, end, RANK_BLOCK, num_stages=STAGES):
            live = (low + c >= skip) & (low + c < end)
            b = load_b(pool + row_offsets(entries, low + c - skip, live, UNIT), live, n, width, EVEN)
            keep = in_tile & (low + column < width_of_bridge)[None, :]
            h = scale * sum_planes(bridge + low, stride_plane, splits, h_at, keep, live)
            out = tl.dot(h.to(b.dtype), b, out, input_precision="ieee")
        store_y(y_rows, in_tile, n, width, out.to(base.dtype), EVEN)


@triton.jit
def expand_tile(
    y, stride_y, bridge, stride_plane, stride_bridge, width_of_bridge, splits, row_count, entries, pool, scale, rank, h_first, n_first,
    n_count, width,
    TILE: tl.constexpr, RANK_BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, UNIT: tl.constexpr,
    EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Expand one item.

    Columns of h are read from the multiple of 4 at or before the module's first, so that the loads are 16 bytes wide whatever the ranks
    are; `skip` of them belong to the module before.
    """
    skip = h_first % 4
    end = skip + rank
    t = tl.arange(0, TILE)
    c = tl.arange(0, RANK_BLOCK)
    column = (h_first // 4) * 4 + c
    in_tile = (t < row_count)[:, None]
    h_at = t[:, None] * stride_bridge + column[None, :]
    y_rows = y + t.to(tl.int64) * stride_y
    if end > RANK_BLOCK:
        expand_high_rank(
            y_rows, in_tile, bridge, stride_plane, splits, h_at, column, width_of_bridge, skip, end, scale, entries, pool, n_first,
            n_count, width, 64, 2, UNIT, EVEN, PDL,
        )  # fmt: skip
    else:
        live = (c >= skip) & (c < end)
        b_rows = pool + row_offsets(entries, c - skip, live, UNIT)
        keep = in_tile & (column < width_of_bridge)[None, :]
        if TILE == 16:
            expand_small_tile(
                y_rows, in_tile, bridge, stride_plane, splits, h_at, keep, live, scale, b_rows, n_first, n_count, width,
                BLOCK_N, STAGES, EVEN, PDL,
            )  # fmt: skip
        else:
            expand_large_tile(
                y_rows, in_tile, bridge, stride_plane, splits, h_at, keep, live, scale, b_rows, n_first, n_count, width,
                BLOCK_N, STAGES, EVEN, PDL,
            )  # fmt: skip


@triton.jit(noinline=True)
def expand_tile_apart(
    y, stride_y, bridge, stride_plane, stride_bridge, width_of_bridge, splits, row_count, entries, pool, scale, rank, h_first, n_first,
    n_count, width,
    TILE: tl.constexpr, RANK_BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, UNIT: tl.constexpr,
    EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`expand_tile` as a function of its own: inlined side by side, the cases' addresses, hoisted out of the loop over items, spill."""
    expand_tile(
        y, stride_y, bridge, stride_plane, stride_bridge, width_of_bridge, splits, row_count, entries, pool, scale, rank, h_first,
        n_first, n_count, width, TILE, RANK_BLOCK, BLOCK_N, STAGES, UNIT, EVEN, PDL,
    )  # fmt: skip


@triton.jit(do_not_specialize=["layer"])
def lora_expand_kernel(
    y, bridge, scales, pool, table, tiles, num_tiles, headers, stride_y, stride_plane, stride_bridge, width_of_bridge, stride_scales, layer,
    GROUP: tl.constexpr, FIRST: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, TILE_TOKENS: tl.constexpr,
    STAGES: tl.constexpr, UNIT: tl.constexpr, PDL: tl.constexpr, ROW_PATH: tl.constexpr, SUMMED: tl.constexpr,
    HIGH_RANKS: tl.constexpr,
):  # fmt: skip
    # HIGH_RANKS: ranks above 64 may come. Their case twice as fast in small tiles (one row of rank 128, a layer: 33 us against 63), the others' 5 %
    # slower, as registers are shared (one H200, 2026-11-22).
    EVEN: tl.constexpr = W0 % 256 == 0 and W1 % 256 == 0 and W2 % 256 == 0
    let_successor_start(PDL)
    splits = tl.load(headers + GROUP * 8 + 3)
    if SUMMED:
        splits = tl.full((), 1, tl.int32)
    item_n = tl.multiple_of(tl.load(headers + GROUP * 8 + 4), 256)
    blocks = (W0 + item_n - 1) // item_n + (W1 + item_n - 1) // item_n + (W2 + item_n - 1) // item_n
    total = tl.load(num_tiles) * blocks
    for number in tl.range(tl.program_id(0), total, tl.num_programs(0), num_stages=1):
        work = tl.full((), 0, tl.int32) + number  # a plain int in the interpreter
        record, module, rank, h_first, entry, width, y_first, n_first = locate(
            work, tiles, item_n, layer, FIRST, W0, W1, W2
        )
        if rank > 0:
            row_start = tl.load(record + 1).to(tl.int64)
            row_count = tl.load(record + 2)
            scale = tl.load(scales + tl.load(record + 3) * stride_scales + module)
            h = bridge + row_start * stride_bridge
            y_rows = y + (row_start * stride_y + y_first)
            n_count = tl.minimum(item_n, width - n_first)
            one_block = h_first % 4 + rank <= 16
            if TILE_TOKENS == 16 and one_block:  # two cases, inlined
                expand_tile(
                    y_rows, stride_y, h, stride_plane, stride_bridge, width_of_bridge, splits, row_count, table + entry, pool, scale,
                    rank, h_first, n_first, n_count, width, 16, 16, 256, STAGES, UNIT, EVEN, PDL,
                )  # fmt: skip
            elif TILE_TOKENS == 16 and HIGH_RANKS and h_first % 4 + rank > 64:
                expand_tile_apart(
                    y_rows, stride_y, h, stride_plane, stride_bridge, width_of_bridge, splits, row_count, table + entry, pool, scale,
                    rank, h_first, n_first, n_count, width, 16, 128, 64, STAGES, UNIT, EVEN, PDL,
                )  # fmt: skip
            elif TILE_TOKENS == 16:
                expand_tile(
                    y_rows, stride_y, h, stride_plane, stride_bridge, width_of_bridge, splits, row_count, table + entry, pool, scale,
                    rank, h_first, n_first, n_count, width, 16, 64, 128, STAGES, UNIT, EVEN, PDL,
                )  # fmt: skip
            elif ROW_PATH and row_count == 1 and rank <= 16:
                expand_row(
                    y_rows, h, stride_plane, splits, table + entry, pool, scale, rank, h_first, n_first, n_count, width, UNIT, EVEN, PDL
                )  # fmt: skip
            elif row_count <= 16 and one_block:
                expand_tile_apart(
                    y_rows, stride_y, h, stride_plane, stride_bridge, width_of_bridge, splits, row_count, table + entry, pool, scale,
                    rank, h_first, n_first, n_count, width, 16, 16, 256, STAGES, UNIT, EVEN, PDL,
                )  # fmt: skip
            elif row_count <= 16 and h_first % 4 + rank > 64:
                expand_tile_apart(
                    y_rows, stride_y, h, stride_plane, stride_bridge, width_of_bridge, splits, row_count, table + entry, pool, scale,
                    rank, h_first, n_first, n_count, width, 16, 128, 64, STAGES, UNIT, EVEN, PDL,
                )  # fmt: skip
            elif row_count <= 16:
                expand_tile_apart(
                    y_rows, stride_y, h, stride_plane, stride_bridge, width_of_bridge, splits, row_count, table + entry, pool, scale,
                    rank, h_first, n_first, n_count, width, 16, 64, 128, STAGES, UNIT, EVEN, PDL,
                )  # fmt: skip
            elif one_block:
                expand_tile_apart(
                    y_rows, stride_y, h, stride_plane, stride_bridge, width_of_bridge, splits, row_count, table + entry, pool, scale,
                    rank, h_first, n_first, n_count, width, TILE_TOKENS, 16, 128, STAGES, UNIT, EVEN, PDL,
                )  # fmt: skip
            elif h_first % 4 + rank > 64:
                expand_tile_apart(
                    y_rows, stride_y, h, stride_plane, stride_bridge, width_of_bridge, splits, row_count, table + entry, pool, scale,
                    rank, h_first, n_first, n_count, width, TILE_TOKENS, 128, 64, STAGES, UNIT, EVEN, PDL,
                )  # fmt: skip
            else:
                expand_tile_apart(
                    y_rows, stride_y, h, stride_plane, stride_bridge, width_of_bridge, splits, row_count, table + entry, pool, scale,
                    rank, h_first, n_first, n_count, width, TILE_TOKENS, 64, 64, STAGES, UNIT, EVEN, PDL,
                )  # fmt: skip
    wait_for_predecessors(PDL)


def lora_expand_(
    y: torch.Tensor,
    bridge: torch.Tensor,
    scales: torch.Tensor,
    pool: torch.Tensor,
    tiles: torch.Tensor,
    num_tiles: torch.Tensor,
    headers: torch.Tensor,
    *,
    group: int,
    layer: int,
    widths: Sequence[int],
    tile_tokens: int,
    num_programs: int,
    tuning: ExpandTuning | None = None,
    summed: bool = False,
) -> torch.Tensor:
    """Add the LoRA update of one group of modules to `y` in place, and return it.

    y: [T, Σ widths] of the pool's dtype, rows contiguous, the modules' outputs side by side. bridge: fp32 [>= parts, >= T, width], what
    `lora_shrink` wrote with the same lists. scales: fp32 [max_slots, 7]. tiles: int32 [capacity, 16], num_tiles: int32 [1], headers:
    int32 [4, 8], as cut by `plan_lora` with the same tile_tokens. pool, layer, num_programs, tuning.pdl: as in `lora_shrink`.
    summed: the bridge's first plane already is h. widths: `out` of the group's modules, in order.
    Rows of no tile and modules of rank 0 keep their bits.
    Raises ValueError on a shape, dtype, stride or device that does not fit.
    """
    tuning = tuning or ExpandTuning()
    check_pool(pool, y.device)
    check_launch(group, layer, tile_tokens, num_programs)
    first, last = GROUPS[group]
    check(
        len(widths) == last - first and min(widths) > 0,
        f"widths(={tuple(widths)}) must name the {last - first} modules of group {group}",
    )
    check_matrix("y", y, pool.dtype, y.device, columns=sum(widths))
    check_bridge(bridge, y.shape[0], y.device)
    check_matrix("scales", scales, torch.float32, y.device, columns=7)
    check_tiles(tiles, num_tiles, y.device)
    check_headers(headers, y.device)
    w0, w1, w2 = (*widths, 0, 0)[:3]
    lora_expand_kernel[(num_programs,)](
        y, bridge, scales, pool, pool.view(torch.int32), tiles, num_tiles, headers,
        y.stride(0), bridge.stride(0), bridge.stride(1), bridge.shape[2], scales.stride(0), layer,
        GROUP=group, FIRST=first, W0=w0, W1=w1, W2=w2, TILE_TOKENS=tile_tokens, STAGES=tuning.num_stages,
        UNIT=ROW_ALIGN_BYTES // pool.element_size(), ROW_PATH=tuning.row_path, SUMMED=summed,
        HIGH_RANKS=bridge.shape[2] > bridge_width(64), **launch_options(y, tuning),
    )  # fmt: skip
    return y
