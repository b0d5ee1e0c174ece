"""The segmented gather matrix multiplication with DOWN at rest: a program keeps a panel of DOWN in shared memory and walks down the rows of W.

    DOWN   [inner, BLOCK_IN] stays in shared memory for a whole run of tiles; it is multiplied by the gates on its way there
    UP     [BLOCK_K, BLOCK_OUT] pieces arrive through a ring of RING buffers, asynchronously
    W      the next tile is loaded into registers while this one is multiplied; it starts the sum, in fp32, and is stored from where it ended
    PARTS  groups of warps that share a panel, with tiles and rings of their own: one loads and stores W while another one multiplies

What the kernels of kernels/sgmm.py lack is overlap, not L2: 104 timings of them (one H200, 2026-11-22: 13 tunings, inner dimensions 128 to 512,
two models) would need rates of L2 from 2.5 to 7.3 TB/s, while the fastest of each of the 8 forms take

    1.23 · (bytes of W at the copy rate) + 1.15 · (operations at 790 TFLOP/s)        within 1.7%

a sum, for a tile loads W, waits for its first factors, multiplies and stores in turn. Here the longer of the two remains, and what runs
between products: 1.31 times the bound at inner 128, 1.36 to 1.39 at 256, 1.38 at 512, 1.66 when that runs for long (one H200, 2026-11-22,
Llama-3.1-8B). L2 carries W and 2 · inner / BLOCK_IN bytes of UP for each element: at inner 256 and BLOCK_IN 256 28 GB, at 512 and 128 70 GB;
tiles of 128x256 that load both factors 56 and 98 GB.

A thread of a wgmma holds pairs of columns, 8 apart. The panel's columns are laid so that its 8 of a group of 32 are neighbours in W: W moves
16 bytes a thread, straight between memory and accumulators, not through shared memory. It is loaded and kept as pairs in int32: two-byte
numbers kept from one turn to the next become a register each, and what unpacks them stands before the store and waits for the load there.

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
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

PART_BYTES = gl.constexpr(256)  # of DOWN that pass through a thread's registers at a time


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
    """Return the same for pairs of columns, `swap`ped: each thread's of a row are runs of 4, and follow each other in the order of loads."""
    along = min(block_out // 16, num_warps)
    width = block_in // 2 * along // num_warps
    rows = [[16 << bit, 0] for bit in range((block_out // 16).bit_length() - 1)]
    warps_along = along.bit_length() - 1
    columns = [[0, 16 << bit] for bit in range((width // 16).bit_length() - 1)]
    warp_columns = [[0, width << bit] for bit in range((num_warps // along).bit_length() - 1)]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], *columns, [8, 0], *rows[warps_along:]],
        lane_bases=[[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]],
        warp_bases=rows[:warps_along] + warp_columns,
        block_bases=[],
        shape=[block_out, block_in // 2],
    )


@gluon.constexpr_function
def load_layout(width, num_warps):
    """Return rows of `width` elements in 16 bytes a thread."""
    threads = min(width // 8, 32)
    return gl.BlockedLayout([1, 8], [32 // threads, threads], [num_warps, 1], [1, 0])


@gluon.constexpr_function
def part_rows(block_in, num_warps):
    """Return how many rows of DOWN pass through registers at a time."""
    return PART_BYTES.value * 32 * num_warps // (2 * block_in)


@gluon.jit
def swap(x, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """Transpose each group of 32 columns as 4x4 pairs: between W's order and the accumulators'. It is its own inverse; no data moves."""
    x = gl.reshape(x, [ROWS, COLUMNS // 32, 4, 4, 2])
    x = gl.permute(x, [0, 1, 3, 2, 4])
    return gl.reshape(x, [ROWS, COLUMNS])


@gluon.jit
def widen(pairs, like, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """Return two-byte floats in fp32. pairs: as they lie in int32, [ROWS, COLUMNS / 2]."""
    if like.dtype.element_ty == gl.bfloat16:
        low = (pairs << 16).to(gl.float32, bitcast=True)
        high = (pairs & -65536).to(gl.float32, bitcast=True)
    else:
        low = pairs.to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
        high = (pairs >> 16).to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
    return gl.reshape(gl.join(low, high), [ROWS, COLUMNS])


@gluon.jit
def narrow(x, like, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """Round fp32 to two-byte floats, in pairs: the inverse of `widen`."""
    low, high = gl.split(gl.reshape(x, [ROWS, COLUMNS // 2, 2]))
    kind: gl.constexpr = "bf16x2" if like.dtype.element_ty == gl.bfloat16 else "f16x2"
    asm: gl.constexpr = "cvt.rn." + kind + ".f32 $0, $1, $2;"
    return gl.inline_asm_elementwise(asm, "=r,f,f", [high, low], gl.int32, is_pure=True, pack=1)


@gluon.jit
def request(up, begin, below, rows, columns, ring, slot, wanted):
    """Begin to copy a piece of UP into the ring. begin: in units of 8 elements; what changes from tile to tile is `below` alone."""
    first = up + (begin.to(gl.int64) * 8 + below)
    pointers = first + (rows[:, None] + columns[None, :])
    async_copy.async_copy_global_to_shared(ring.index(slot), pointers, mask=wanted)
    async_copy.commit_group()


@gluon.jit
def load_down(down, route, gates, inp, stride, rows, columns, LOW: gl.constexpr, ROWS: gl.constexpr,
              RANK: gl.constexpr, GATED: gl.constexpr):  # fmt: skip
    """Load rows LOW and on of DOWN, each times its expert's gate, rounded as `stage_down_` does."""
    if RANK % ROWS == 0:
        expert = gl.maximum(gl.load(route + LOW // RANK), 0).to(gl.int64)
        at = down + (expert * stride + LOW % RANK * inp)
        a = gl.load(at + ((rows * inp)[:, None] + columns[None, :]))
        if GATED:
            a = (gl.load(gates + LOW // RANK) * a.to(gl.float32)).to(a.dtype)
    else:
        rank = LOW + rows
        experts = gl.maximum(gl.load(route + rank // RANK), 0).to(gl.int64)
        a = gl.load(down + ((experts * stride + rank % RANK * inp)[:, None] + columns[None, :]))
        if GATED:
            a = (gl.load(gates + rank // RANK)[:, None] * a.to(gl.float32)).to(a.dtype)
    return a


@gluon.jit
def number_at(record, COLUMN: gl.constexpr):
    """Read a size or stride out of a weight's record: below 2**31, a multiple of 16."""
    return gl.multiple_of(gl.load(record + COLUMN).to(gl.int32), 16)


@gluon.jit
def address_at(record, like, COLUMN: gl.constexpr):
    """Read an address out of a weight's record."""
    return gl.multiple_of(gl.load(record + COLUMN).to(gl.pointer_type(like.dtype.element_ty)), 16)


@gluon.jit
def pairs_at(record, like, COLUMN: gl.constexpr):
    """Read an address out of a weight's record, as one of pairs of elements like those of `like`."""
    return gl.multiple_of(gl.load(record + COLUMN).to(gl.pointer_type(gl.int32)), 16)


@gluon.jit
def gather(meet, phase, PARTS: gl.constexpr):
    """Wait for all threads of all parts; return the barrier's next phase."""
    gl.thread_barrier()
    if PARTS > 1:
        mbarrier.arrive(meet, count=1)
        mbarrier.wait(meet, phase)
    return phase ^ 1


@gluon.jit
def walk(
    like, records, runs, route, gates, first_run, num_runs, ring, panel, meet,
    PART: gl.constexpr, PARTS: gl.constexpr, SEGMENTS: gl.constexpr, RANK: gl.constexpr, BLOCK_OUT: gl.constexpr,
    BLOCK_IN: gl.constexpr, BLOCK_K: gl.constexpr, RING: gl.constexpr, OVERLAP: gl.constexpr, GATED: gl.constexpr,
    COLUMNS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Merge runs of tiles; of several parts, every PARTS-th tile of each.

    Of a piece's buffer: its copy is asked for after a barrier that all threads reach with the product that last read it behind them. That is
    the one before (OVERLAP False, up to RING - 1 pieces ahead) or the one before that (True: a product is waited for after the next is begun).
    """
    CHUNKS: gl.constexpr = SEGMENTS * RANK // BLOCK_K
    AHEAD: gl.constexpr = RING - 2 if OVERLAP else RING - 1
    FITTING: gl.constexpr = part_rows(BLOCK_IN, WARPS)
    ROWS: gl.constexpr = FITTING if BLOCK_K > FITTING else BLOCK_K
    TOGETHER: gl.constexpr = FITTING // ROWS
    PIECES: gl.constexpr = SEGMENTS * RANK // ROWS
    MINE: gl.constexpr = (PIECES - PART + PARTS - 1) // PARTS
    STEP: gl.constexpr = PARTS * BLOCK_OUT  # rows from one tile to the next
    SUM: gl.constexpr = accumulator_layout(BLOCK_OUT, BLOCK_IN, WARPS)
    W: gl.constexpr = weight_layout(BLOCK_OUT, BLOCK_IN, WARPS)
    UP: gl.constexpr = load_layout(BLOCK_OUT, WARPS)
    DOWN: gl.constexpr = load_layout(BLOCK_IN, WARPS)
    w_row = gl.arange(0, BLOCK_OUT, gl.SliceLayout(1, W)).to(gl.int64)
    w_pair = gl.arange(0, BLOCK_IN // 2, gl.SliceLayout(0, W))
    up_row = gl.arange(0, BLOCK_K, gl.SliceLayout(1, UP))
    up_column = gl.arange(0, BLOCK_OUT, gl.SliceLayout(0, UP))
    down_row = gl.arange(0, ROWS, gl.SliceLayout(1, DOWN))
    down_column = gl.arange(0, BLOCK_IN, gl.SliceLayout(0, DOWN))
    phase = gl.to_tensor(0)
    for number in range(gl.program_id(0), num_runs, gl.num_programs(0)):
        run = runs + (first_run + number) * 4
        weight = gl.load(run).to(gl.int64)
        record = records + weight * COLUMNS
        row_first = gl.multiple_of(gl.load(run + 1), 16) + PART * BLOCK_OUT
        column_first = gl.multiple_of(gl.load(run + 2), 16)
        count = (gl.load(run + 3) + (PARTS - 1 - PART)) // PARTS
        out = number_at(record, 5)
        inp = number_at(record, 6)
        target_stride = gl.multiple_of(number_at(record, 8) // 2, 4)
        source_stride = gl.multiple_of(number_at(record, 9) // 2, 4)
        up_stride = gl.multiple_of(gl.load(record + 10), 16)
        down_stride = gl.multiple_of(gl.load(record + 11), 16)
        pair_first = gl.multiple_of(column_first // 2, 4)
        target = pairs_at(record, like, 0) + (row_first.to(gl.int64) * target_stride + pair_first)
        source = pairs_at(record, like, 1) + (row_first.to(gl.int64) * source_stride + pair_first)
        down = address_at(record, like, 3) + column_first
        up = address_at(record, like, 2) + row_first
        ups = ()  # where each piece begins, in units of 8 elements: 32 bits are enough
        up_rows = ()  # and its rows: those of one expert, or of several
        for chunk in gl.static_range(CHUNKS):
            if RANK % BLOCK_K == 0:
                expert = gl.maximum(gl.load(route + chunk * BLOCK_K // RANK), 0).to(gl.int64)
                more = (((expert * up_stride + chunk * BLOCK_K % RANK * out) // 8).to(gl.int32),)
                more_rows = (up_row * out,)
            else:
                rank = chunk * BLOCK_K + up_row
                experts = gl.maximum(gl.load(route + rank // RANK), 0).to(gl.int64)
                more = (gl.to_tensor(0),)
                more_rows = (experts * up_stride + rank % RANK * out,)
            ups = ups + more  # type: ignore[assignment]
            up_rows = up_rows + more_rows  # type: ignore[assignment]
        async_copy.wait_group(0)  # copies that were not wanted write zeros
        gl.thread_barrier()  # and this part's threads have waited for the last run's products
        for step in gl.static_range(AHEAD):
            below = step // CHUNKS * STEP
            wanted = step // CHUNKS < count
            request(up, ups[step % CHUNKS], below, up_rows[step % CHUNKS], up_column, ring, step, wanted)
        read = source + w_row * source_stride
        write = target + w_row * target_stride
        old = gl.load(read[:, None] + w_pair[None, :], mask=count > 0, eviction_policy="evict_first")
        for group in gl.static_range(0, MINE, TOGETHER):
            loaded = ()
            for index in gl.static_range(group, group + TOGETHER):
                if index < MINE:
                    part = load_down(
                        down, route, gates + weight * SEGMENTS, inp, down_stride, down_row, down_column,
                        (index * PARTS + PART) * ROWS, ROWS, RANK, GATED,
                    )  # fmt: skip
                    more = (part,)
                    loaded = loaded + more  # type: ignore[assignment]
            if group == 0:
                phase = gather(meet, phase, PARTS)  # nobody reads the last panel any more
            for index in gl.static_range(group, group + TOGETHER):
                if index < MINE:
                    chunk_of = panel.index((index * PARTS + PART) * ROWS // BLOCK_K)
                    place = chunk_of.slice((index * PARTS + PART) * ROWS % BLOCK_K, ROWS, dim=0)
                    place.store(swap(loaded[index - group], ROWS, BLOCK_IN))
        if MINE == 0:
            phase = gather(meet, phase, PARTS)
        fence_async_shared()
        phase = gather(meet, phase, PARTS)
        slot = gl.to_tensor(0)
        free = gl.to_tensor(AHEAD)
        for turn in range(0, count):
            update = gl.convert_layout(swap(widen(old, like, BLOCK_OUT, BLOCK_IN), BLOCK_OUT, BLOCK_IN), SUM)
            for chunk in gl.static_range(CHUNKS):
                async_copy.wait_group(AHEAD - 1)
                gl.thread_barrier()
                product = warpgroup_mma(
                    ring.index(slot).permute([1, 0]), panel.index(chunk), update, is_async=True
                )
                later = turn + (chunk + AHEAD) // CHUNKS
                request(
                    up, ups[(chunk + AHEAD) % CHUNKS], later * STEP, up_rows[(chunk + AHEAD) % CHUNKS], up_column,
                    ring, free, later < count,
                )  # fmt: skip
                if chunk == 0:
                    read += source_stride.to(gl.int64) * STEP
                    at = read[:, None] + w_pair[None, :]
                    old = gl.load(at, mask=turn + 1 < count, eviction_policy="evict_first")
                slot = gl.where(slot == RING - 1, 0, slot + 1)
                free = gl.where(free == RING - 1, 0, free + 1)
                update = warpgroup_mma_wait(1 if OVERLAP and chunk < CHUNKS - 1 else 0, deps=(product,))
            new = gl.convert_layout(narrow(swap(update, BLOCK_OUT, BLOCK_IN), like, BLOCK_OUT, BLOCK_IN), W)
            gl.store(write[:, None] + w_pair[None, :], new, eviction_policy="evict_first")
            write += target_stride.to(gl.int64) * STEP


@gluon.jit(do_not_specialize=["first_run", "num_runs"])
def sgmm_panel_kernel(
    like, records, runs, route, gates, first_run, num_runs,
    SEGMENTS: gl.constexpr, RANK: gl.constexpr, BLOCK_OUT: gl.constexpr, BLOCK_IN: gl.constexpr, BLOCK_K: gl.constexpr,
    RING: gl.constexpr, OVERLAP: gl.constexpr, PARTS: gl.constexpr, GATED: gl.constexpr, COLUMNS: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """Merge runs of tiles. runs: int32 [n, 4] (weight, row, column, tiles); gates: fp32 [weights, SEGMENTS].

    PARTS: 1, or 2 groups of num_warps that share the panel and take tiles in turn, each with a ring and a pace of its own.
    """
    DTYPE: gl.constexpr = like.dtype.element_ty
    CHUNKS: gl.constexpr = SEGMENTS * RANK // BLOCK_K
    SHARED: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    panel = gl.allocate_shared_memory(DTYPE, [CHUNKS, BLOCK_K, BLOCK_IN], SHARED)
    ring = gl.allocate_shared_memory(DTYPE, [RING, BLOCK_K, BLOCK_OUT], SHARED)
    if PARTS == 1:
        walk(
            like, records, runs, route, gates, first_run, num_runs, ring, panel, ring, 0, PARTS, SEGMENTS, RANK,
            BLOCK_OUT, BLOCK_IN, BLOCK_K, RING, OVERLAP, GATED, COLUMNS, num_warps,
        )  # fmt: skip
    else:
        meet = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(meet, count=PARTS)
        ring_1 = gl.allocate_shared_memory(DTYPE, [RING, BLOCK_K, BLOCK_OUT], SHARED)
        gl.warp_specialize([
            (walk, (like, records, runs, route, gates, first_run, num_runs, ring, panel, meet, 0, PARTS, SEGMENTS, RANK,
                    BLOCK_OUT, BLOCK_IN, BLOCK_K, RING, OVERLAP, GATED, COLUMNS, num_warps)),
            (walk, (like, records, runs, route, gates, first_run, num_runs, ring_1, panel, meet, 1, PARTS, SEGMENTS, RANK,
                    BLOCK_OUT, BLOCK_IN, BLOCK_K, RING, OVERLAP, GATED, COLUMNS, num_warps)),
        ], [num_warps], [256])  # fmt: skip
