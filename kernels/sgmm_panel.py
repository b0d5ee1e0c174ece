"""The segmented gather matrix multiplication with DOWN at rest: a program keeps a panel of DOWN in shared memory and walks down the rows of W.

    DOWN   [inner, BLOCK_IN] stays in shared memory for a whole run of tiles
    UP     [BLOCK_K, BLOCK_OUT] pieces arrive through a ring of RING buffers, asynchronously
    W      the next tile is loaded into registers while this one is multiplied; it starts the sum, in fp32, and is stored from where it ended

What the kernels of kernels/sgmm.py lack is overlap, not L2: 104 timings of them (one H200, 2026-11-22: 13 tunings, inner dimensions 128 to 512,
two models) would need rates of L2 from 2.5 to 7.3 TB/s, while the fastest of each of the 8 forms take

    1.23 · (bytes of W at the copy rate) + 1.15 · (operations at 790 TFLOP/s)        within 1.7%

a sum, for a tile loads W, waits for its first factors, multiplies and stores in turn. Here the longer of the two should remain, and what runs
between products. L2 carries W and 2 · inner / BLOCK_IN bytes of UP for each element: Llama-3.1-8B at inner 256 and BLOCK_IN 256 28 GB, at 512
and 128 70 GB; tiles of 128x256 that load both factors 56 and 98 GB.

A thread of a wgmma holds pairs of columns, 8 apart. The panel's columns are laid so that its 8 of a group of 32 are neighbours in W: W moves
16 bytes a thread, straight between memory and accumulators, not through shared memory.

Written in Gluon, which leaves layouts, waits and barriers to us: Triton's pipeliner asks for a tile only after the one before it is stored,
unless it may have a third buffer, for which there is no room. For Hopper, two-byte types, blocks that fill every weight, and one rank.
Both operands come from shared memory, as in kernels/sgmm.py and for its reason.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

PART = gl.constexpr(64)  # rows of DOWN that pass through registers at a time


@gluon.constexpr_function
def accumulator_layout(block_out, block_in, num_warps):
    """Return where a wgmma leaves a tile: warps along rows first, 16 rows each, what is left along columns."""
    along = min(block_out // 16, num_warps)
    shape = [16, block_in * along // num_warps, 16]
    return gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[along, num_warps // along], instr_shape=shape
    )


@gluon.constexpr_function
def weight_layout(block_out, block_in, num_warps):
    """Return the same with `swap`ped columns: each thread's elements of a row are runs of 8."""
    along = min(block_out // 16, num_warps)
    width = block_in * along // num_warps
    rows = [[16 << bit, 0] for bit in range((block_out // 16).bit_length() - 1)]
    warps_along = along.bit_length() - 1
    columns = [[0, 32 << bit] for bit in range((width // 32).bit_length() - 1)]
    warp_columns = [[0, width << bit] for bit in range((num_warps // along).bit_length() - 1)]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [8, 0], *columns, *rows[warps_along:]],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=rows[:warps_along] + warp_columns,
        block_bases=[],
        shape=[block_out, block_in],
    )


@gluon.constexpr_function
def load_layout(width, num_warps):
    """Return rows of `width` elements in 16 bytes a thread."""
    threads = min(width // 8, 32)
    return gl.BlockedLayout([1, 8], [32 // threads, threads], [num_warps, 1], [1, 0])


@gluon.jit
def swap(x, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """Transpose each group of 32 columns as 4x4 pairs: between W's order and the accumulators'. It is its own inverse; no data moves."""
    x = gl.reshape(x, [ROWS, COLUMNS // 32, 4, 4, 2])
    x = gl.permute(x, [0, 1, 3, 2, 4])
    return gl.reshape(x, [ROWS, COLUMNS])


@gluon.jit
def request(first, rows, columns, ring, slot, wanted):
    """Begin to copy a piece of UP into the ring. What changes from tile to tile is `first` alone: the rest need not be added up again."""
    pointers = first + (rows[:, None] + columns[None, :])
    async_copy.async_copy_global_to_shared(ring.index(slot), pointers, mask=wanted)
    async_copy.commit_group()


@gluon.jit
def number_at(record, COLUMN: gl.constexpr):
    """Read a size or stride out of a weight's record: below 2**31, a multiple of 16."""
    return gl.multiple_of(gl.load(record + COLUMN).to(gl.int32), 16)


@gluon.jit
def address_at(record, like, COLUMN: gl.constexpr):
    """Read an address out of a weight's record."""
    return gl.multiple_of(gl.load(record + COLUMN).to(gl.pointer_type(like.dtype.element_ty)), 16)


@gluon.jit(do_not_specialize=["first_run", "num_runs"])
def sgmm_panel_kernel(
    like, records, runs, route, first_run, num_runs,
    SEGMENTS: gl.constexpr, RANK: gl.constexpr, BLOCK_OUT: gl.constexpr, BLOCK_IN: gl.constexpr, BLOCK_K: gl.constexpr,
    RING: gl.constexpr, OVERLAP: gl.constexpr, COLUMNS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Merge runs of tiles. runs: int32 [n, 4] (weight, row, column, tiles).

    Of a piece's buffer: its copy is asked for after a barrier that all threads reach with the product that last read it behind them. That is
    the one before (OVERLAP False, up to RING - 1 pieces ahead) or the one before that (True: a product is waited for after the next is begun).
    """
    DTYPE: gl.constexpr = like.dtype.element_ty
    CHUNKS: gl.constexpr = SEGMENTS * RANK // BLOCK_K
    AHEAD: gl.constexpr = RING - 2 if OVERLAP else RING - 1
    ROWS: gl.constexpr = PART if BLOCK_K > PART else BLOCK_K
    SUM: gl.constexpr = accumulator_layout(BLOCK_OUT, BLOCK_IN, num_warps)
    W: gl.constexpr = weight_layout(BLOCK_OUT, BLOCK_IN, num_warps)
    UP: gl.constexpr = load_layout(BLOCK_OUT, num_warps)
    DOWN: gl.constexpr = load_layout(BLOCK_IN, num_warps)
    SHARED: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    ring = gl.allocate_shared_memory(DTYPE, [RING, BLOCK_K, BLOCK_OUT], SHARED)
    panel = gl.allocate_shared_memory(DTYPE, [CHUNKS, BLOCK_K, BLOCK_IN], SHARED)
    w_row = gl.arange(0, BLOCK_OUT, gl.SliceLayout(1, W)).to(gl.int64)
    w_column = gl.arange(0, BLOCK_IN, gl.SliceLayout(0, W))
    up_row = gl.arange(0, BLOCK_K, gl.SliceLayout(1, UP))
    up_column = gl.arange(0, BLOCK_OUT, gl.SliceLayout(0, UP))
    down_row = gl.arange(0, ROWS, gl.SliceLayout(1, DOWN))
    down_column = gl.arange(0, BLOCK_IN, gl.SliceLayout(0, DOWN))
    for number in range(gl.program_id(0), num_runs, gl.num_programs(0)):
        run = runs + (first_run + number) * 4
        record = records + gl.load(run).to(gl.int64) * COLUMNS
        row_first = gl.multiple_of(gl.load(run + 1), 16)
        column_first = gl.multiple_of(gl.load(run + 2), 16)
        count = gl.load(run + 3)
        out = number_at(record, 5)
        inp = number_at(record, 6)
        target_stride = number_at(record, 8)
        source_stride = number_at(record, 9)
        up_stride = gl.multiple_of(gl.load(record + 10), 16)
        target = address_at(record, like, 0) + (row_first.to(gl.int64) * target_stride + column_first)
        source = address_at(record, like, 1) + (row_first.to(gl.int64) * source_stride + column_first)
        down = address_at(record, like, 4) + column_first
        up = address_at(record, like, 2) + row_first
        ups = ()  # where each piece begins
        up_rows = ()  # and its rows: those of one expert, or of several
        for chunk in gl.static_range(CHUNKS):
            if RANK % BLOCK_K == 0:
                expert = gl.maximum(gl.load(route + chunk * BLOCK_K // RANK), 0).to(gl.int64)
                more = (up + (expert * up_stride + chunk * BLOCK_K % RANK * out),)
                more_rows = (up_row * out,)
            else:
                rank = chunk * BLOCK_K + up_row
                experts = gl.maximum(gl.load(route + rank // RANK), 0).to(gl.int64)
                more = (up,)
                more_rows = (experts * up_stride + rank % RANK * out,)
            ups = ups + more  # type: ignore[assignment]
            up_rows = up_rows + more_rows  # type: ignore[assignment]
        async_copy.wait_group(0)  # copies that were not wanted write zeros
        gl.thread_barrier()  # and all threads have waited for the last run's products
        for step in gl.static_range(AHEAD):
            first = ups[step % CHUNKS] + step // CHUNKS * BLOCK_OUT
            request(first, up_rows[step % CHUNKS], up_column, ring, step, step // CHUNKS < count)
        old = gl.load(
            (source + w_row * source_stride)[:, None] + w_column[None, :], eviction_policy="evict_first"
        )
        for chunk in gl.static_range(CHUNKS):
            for low in gl.static_range(0, BLOCK_K, ROWS):
                part = down + (chunk * BLOCK_K + low + down_row)[:, None] * inp + down_column[None, :]
                panel.index(chunk).slice(low, ROWS, dim=0).store(swap(gl.load(part), ROWS, BLOCK_IN))
        fence_async_shared()
        slot = gl.to_tensor(0)
        free = gl.to_tensor(AHEAD)
        for turn in range(0, count):
            update = gl.convert_layout(swap(old.to(gl.float32), BLOCK_OUT, BLOCK_IN), SUM)
            for chunk in gl.static_range(CHUNKS):
                async_copy.wait_group(AHEAD - 1)
                gl.thread_barrier()
                product = warpgroup_mma(
                    ring.index(slot).permute([1, 0]), panel.index(chunk), update, is_async=True
                )
                later = turn + (chunk + AHEAD) // CHUNKS
                first = ups[(chunk + AHEAD) % CHUNKS] + later * BLOCK_OUT
                request(first, up_rows[(chunk + AHEAD) % CHUNKS], up_column, ring, free, later < count)
                if chunk == 0:
                    following = source + ((turn + 1) * BLOCK_OUT).to(gl.int64) * source_stride
                    old = gl.load(
                        (following + w_row * source_stride)[:, None] + w_column[None, :],
                        mask=turn + 1 < count,
                        eviction_policy="evict_first",
                    )
                slot = gl.where(slot == RING - 1, 0, slot + 1)
                free = gl.where(free == RING - 1, 0, free + 1)
                update = warpgroup_mma_wait(1 if OVERLAP and chunk < CHUNKS - 1 else 0, deps=(product,))
            new = gl.convert_layout(swap(update.to(DTYPE), BLOCK_OUT, BLOCK_IN), W)
            here = target + (turn * BLOCK_OUT).to(gl.int64) * target_stride
            at = (here + w_row * target_stride)[:, None] + w_column[None, :]
            gl.store(at, new, eviction_policy="evict_first")
