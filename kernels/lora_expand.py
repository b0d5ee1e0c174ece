"""Batched LoRA expand over the paged pool: add each token's low-rank update to the base matmul's output, in place.

    y[t, columns of m] += scale[slot(t), m] · Σ_r h[t, r] · B_m[r, :]        h = Σ_s bridge[s]

B is stored transposed, a row holding one rank's `out` elements, so that reading it is coalesced. Work is (tile, block of columns), blocks
never crossing modules; a fixed grid walks it up to a count read from device memory, and modules that are no target cost one load.

ptxas 12.8 (in Triton 3.6) miscompiles a software-pipelined wgmma whose A operand is in registers, cast from fp32 (triton issue 9433). Here A is
the fp32 bridge cast to the pool's dtype, exactly that case, so nothing is pipelined: num_stages=1 on the kernel and on every loop, each
wgmma is waited for before the next load, and loads in flight come from several programs an SM. Tiles of 16 and 32 tokens use mma.sync anyway.
Source: Punica's expand, arXiv:2310.18547.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from kernels.lora_check import check, check_bridge, check_launch, check_matrix, check_pool, check_tiles
from kernels.lora_launch import ExpandTuning
from kernels.lora_plan import GROUPS, ROW_ALIGN_BYTES
from kernels.lora_shrink import launch_options, row_offsets, sum_ranks, wait_for_predecessor


@triton.jit
def sum_planes_of_row(bridge, stride_plane, column, keep, SPLITS: tl.constexpr):
    """Sum the bridge's planes at a vector of columns of one row: one load for all planes, so that none waits for another."""
    PLANES: tl.constexpr = triton.next_power_of_2(SPLITS)
    plane = tl.arange(0, PLANES)[:, None]
    parts = tl.load(
        bridge + plane * stride_plane + column[None, :], mask=(plane < SPLITS) & keep[None, :], other=0.0
    )
    return tl.sum(parts, axis=0)


@triton.jit
def sum_planes_of_tile(bridge, stride_plane, offsets, keep, live, SPLITS: tl.constexpr):
    """Sum the bridge's planes at a matrix of offsets, and put zero in the columns that are not live.

    `keep` must not vary within 16 columns: then these are 16-byte loads. A loop, because all planes at once would need too many registers.
    """
    h = tl.load(bridge + offsets, mask=keep, other=0.0)
    for split in tl.range(1, SPLITS, num_stages=1):
        h += tl.load(bridge + split * stride_plane + offsets, mask=keep, other=0.0)
    return tl.where(live[None, :], h, 0.0)


@triton.jit
def load_b(b_rows, live, column, width, EVEN: tl.constexpr):
    """Load a block of B rows, zero where not live or past the module's width."""
    if EVEN:
        return tl.load(b_rows[:, None] + column[None, :], mask=live[:, None], other=0.0)
    return tl.load(
        b_rows[:, None] + column[None, :], mask=live[:, None] & (column < width)[None, :], other=0.0
    )


@triton.jit
def expand_row(
    y, bridge, stride_plane, entries, pool, scale, rank, n_first, width,
    SPLITS: tl.constexpr, ITEM_N: tl.constexpr, ROW_RANK: tl.constexpr, UNIT: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token: B in registers by 16-byte loads, fp32 multiply and sum.

    Row-table entries are fetched one block ahead. A second block of B in flight would cost 32 registers a thread: a program an SM less.
    """
    n = n_first + tl.arange(0, ITEM_N)
    r = tl.arange(0, ROW_RANK)
    b = load_b(pool + row_offsets(entries, r, r < rank, UNIT), r < rank, n, width, EVEN)
    next_rows = pool + row_offsets(entries, ROW_RANK + r, ROW_RANK + r < rank, UNIT)
    wait_for_predecessor(PDL)
    base = tl.load(y + n) if EVEN else tl.load(y + n, mask=n < width, other=0.0)
    update = tl.zeros([ITEM_N], tl.float32)
    for low in tl.range(0, rank, ROW_RANK, num_stages=1):
        h = sum_planes_of_row(bridge, stride_plane, low + r, low + r < rank, SPLITS)
        update += tl.sum(b.to(tl.float32) * h[:, None], axis=0)
        b = load_b(next_rows, low + ROW_RANK + r < rank, n, width, EVEN)
        later = low + 2 * ROW_RANK + r
        next_rows = pool + row_offsets(entries, later, later < rank, UNIT)
    out = (base.to(tl.float32) + scale * update).to(y.dtype.element_ty)
    if EVEN:
        tl.store(y + n, out)
    else:
        tl.store(y + n, out, mask=n < width)


@triton.jit
def expand_tile(
    y, stride_y, bridge, stride_plane, stride_bridge, bridge_width, row_count, entries, pool, scale, rank, h_first, n_first, width,
    SPLITS: tl.constexpr, TILE_TOKENS: tl.constexpr, ITEM_N: tl.constexpr, BLOCK_N: tl.constexpr, RANK_BLOCK: tl.constexpr,
    UNIT: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Several tokens: h (kept for all columns of the item when the rank fits one block) · B block.

    Columns of h are read from the multiple of 16 at or before the module's first, so that the loads are 16 bytes wide whatever the ranks
    are; `skip` of them belong to the module before.
    """
    skip = h_first % 16
    end = skip + rank
    t = tl.arange(0, TILE_TOKENS)
    c = tl.arange(0, RANK_BLOCK)
    column = (h_first // 16) * 16 + c
    in_tile = (t < row_count)[:, None]
    h_at = t[:, None] * stride_bridge + column[None, :]
    live = (c >= skip) & (c < end)
    rows = pool + row_offsets(entries, c - skip, live, UNIT)
    wait_for_predecessor(PDL)
    first_h = sum_planes_of_tile(
        bridge, stride_plane, h_at, in_tile & (column < bridge_width)[None, :], live, SPLITS
    )
    first_h = first_h.to(pool.dtype.element_ty)
    for sub in tl.range(0, ITEM_N, BLOCK_N, num_stages=1):
        n = n_first + sub + tl.arange(0, BLOCK_N)
        y_at = y + t.to(tl.int64)[:, None] * stride_y + n[None, :]
        keep = in_tile
        if not EVEN:
            keep = in_tile & (n < width)[None, :]
        base = tl.load(y_at, mask=keep, other=0.0)
        update = tl.dot(first_h, load_b(rows, live, n, width, EVEN), input_precision="ieee")
        for low in tl.range(RANK_BLOCK, end, RANK_BLOCK, num_stages=1):
            more = low + c < end
            more_rows = pool + row_offsets(entries, low + c - skip, more, UNIT)
            b = load_b(
                more_rows, more, n, width, EVEN
            )  # before the loop over planes: after it, Triton 3.6 makes this 2-byte loads
            wide = in_tile & (low + column < bridge_width)[None, :]
            h = sum_planes_of_tile(bridge + low, stride_plane, h_at, wide, more, SPLITS).to(
                pool.dtype.element_ty
            )
            update = tl.dot(h, b, update, input_precision="ieee")
        tl.store(y_at, (base.to(tl.float32) + scale * update).to(y.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["layer"])
def lora_expand_kernel(
    y, bridge, scales, pool, table, tiles, num_tiles, stride_y, stride_plane, stride_bridge, bridge_width, stride_scales, layer,
    FIRST: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, SPLITS: tl.constexpr, TILE_TOKENS: tl.constexpr,
    ITEM_N: tl.constexpr, BLOCK_N: tl.constexpr, ROW_RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, UNIT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    BLOCKS0: tl.constexpr = (W0 + ITEM_N - 1) // ITEM_N
    BLOCKS1: tl.constexpr = (W1 + ITEM_N - 1) // ITEM_N
    BLOCKS: tl.constexpr = BLOCKS0 + BLOCKS1 + (W2 + ITEM_N - 1) // ITEM_N
    EVEN: tl.constexpr = W0 % ITEM_N == 0 and W1 % ITEM_N == 0 and W2 % ITEM_N == 0
    total = tl.load(num_tiles) * BLOCKS
    for number in tl.range(tl.program_id(0), total, tl.num_programs(0), num_stages=1):
        work = tl.full((), 0, tl.int32) + number  # a plain int in the interpreter
        record = tiles + (work // BLOCKS) * 16
        block = work % BLOCKS
        in_1 = (block >= BLOCKS0).to(tl.int32)  # in the group's second module or a later one
        in_2 = (block >= BLOCKS0 + BLOCKS1).to(tl.int32)  # in its third
        module = FIRST + in_1 + in_2
        rank = tl.load(record + 4 + module)
        if rank > 0:
            width = W0 + in_1 * (W1 - W0) + in_2 * (W2 - W1)
            y_first = in_1 * W0 + in_2 * W1
            n_first = (block - in_1 * BLOCKS0 - in_2 * BLOCKS1) * ITEM_N
            table_unit = tl.load(record).to(tl.int64)
            row_start = tl.load(record + 1).to(tl.int64)
            row_count = tl.load(record + 2)
            scale = tl.load(scales + tl.load(record + 3) * stride_scales + module)
            h_first = tl.full((), 0, tl.int32)
            if W1 > 0:
                h_first += in_1 * tl.load(record + 4 + FIRST)
            if W2 > 0:
                h_first += in_2 * tl.load(record + 5 + FIRST)
            all_ranks = sum_ranks(record, 0, 7)
            entries = table + (
                table_unit * 32 + (layer * 2 + 1) * all_ranks + sum_ranks(record, 0, FIRST) + h_first
            )
            h = bridge + row_start * stride_bridge
            y_rows = y + (row_start * stride_y + y_first)
            if row_count == 1:
                expand_row(
                    y_rows, h + h_first, stride_plane, entries, pool, scale, rank, n_first, width,
                    SPLITS, ITEM_N, ROW_RANK, UNIT, EVEN, PDL,
                )  # fmt: skip
            else:
                expand_tile(
                    y_rows, stride_y, h, stride_plane, stride_bridge, bridge_width, row_count, entries, pool, scale, rank, h_first,
                    n_first, width, SPLITS, TILE_TOKENS, ITEM_N, BLOCK_N, RANK_BLOCK, UNIT, EVEN, PDL,
                )  # fmt: skip
    wait_for_predecessor(PDL)


def lora_expand_(
    y: torch.Tensor,
    bridge: torch.Tensor,
    scales: torch.Tensor,
    pool: torch.Tensor,
    tiles: torch.Tensor,
    num_tiles: torch.Tensor,
    *,
    group: int,
    layer: int,
    widths: Sequence[int],
    tile_tokens: int,
    splits: int,
    num_programs: int,
    tuning: ExpandTuning | None = None,
) -> torch.Tensor:
    """Add the LoRA update of one group of modules to `y` in place, and return it.

    y: [T, Σ widths] of the pool's dtype, rows contiguous, the modules' outputs side by side. bridge: fp32 [>= splits, >= T, width], what
    `lora_shrink` wrote with the same tiles and splits. scales: fp32 [max_slots, 7]. pool, tiles, num_tiles, layer, num_programs, tuning.pdl:
    as in `lora_shrink`. widths: `out` of the group's modules, in order. Rows of no tile and modules of rank 0 keep their bits.
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
    check_bridge(bridge, y.shape[0], splits, y.device)
    check_matrix("scales", scales, torch.float32, y.device, columns=7)
    check_tiles(tiles, num_tiles, y.device)
    w0, w1, w2 = (*widths, 0, 0)[:3]
    item_n = min(tuning.item_n, max(16, triton.next_power_of_2(max(widths))))
    lora_expand_kernel[(num_programs,)](
        y, bridge, scales, pool, pool.view(torch.int32), tiles, num_tiles,
        y.stride(0), bridge.stride(0), bridge.stride(1), bridge.shape[2], scales.stride(0), layer,
        FIRST=first, W0=w0, W1=w1, W2=w2, SPLITS=splits, TILE_TOKENS=tile_tokens, ITEM_N=item_n, BLOCK_N=min(tuning.block_n, item_n),
        ROW_RANK=tuning.row_rank, RANK_BLOCK=tuning.rank_block, UNIT=ROW_ALIGN_BYTES // pool.element_size(),
        **launch_options(y, tuning),
    )  # fmt: skip
    return y
