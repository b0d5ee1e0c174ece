"""Segmented gather matrix multiplication: a token's experts merged into every adapted weight of every layer, in one launch.

    in place:              W += UP · DOWN     UP = concat_i[B_i of this token, B_i of the last one]     inner dimension 2·k·r
                                              DOWN = concat_i[g_i · A_i of this token, −g_i · A_i of the last one]
    from a pristine copy:  W  = W_0 + UP · DOWN, this token's experts alone                             inner dimension k·r

Experts are gathered from their pools by the router's indices, read from device memory. A fixed grid walks the tiles of all weights through a
table of addresses, so the launch can be captured in a CUDA graph; with one weight's tiles it is the published "simple merge".

What must move is W read and written: 27.9 GB for Llama-3.1-8B, 6.6 ms at an H200's copy rate of 4.24 TB/s; 25.9 GB and 6.1 ms for
Llama-2-7B. Operations at 790 TFLOP/s, 8B: inner 128 2.3 ms, 256 4.5 ms, 512 9.0 ms. So only in place at r = 128, top-2, is bound by
arithmetic. The gated DOWN is written by a kernel of its own first (`stage_down_`: 0.64 to 2.6 GB, up to 0.6 ms), unless a panel gates it,
so that both operands of the product come from shared memory: ptxas 12.8 miscompiles a pipelined wgmma whose A operand was computed in
registers (kernels/lora_expand.py). And what is taken out in place is, bit for bit, what was put in.

Three kernels: any shape and rank; blocks that fill every weight, in one loop over all of a program's tiles; and kernels/sgmm_panel.py.

Source: LoRA-Switch, arXiv:2405.17741 (no code was published; table, tiles and the pristine form are ours).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from kernels.sgmm_launch import NUM_SMS, PLAIN, SgmmTuning, sgmm_tuning
from kernels.sgmm_panel import sgmm_panel_kernel
from kernels.sgmm_plan import RECORD_COLUMNS, SgmmPlan
from kernels.sgmm_stage import address, check_route, keep_gates_, size, stage_down_

LONGEST_RUN = 128  # tiles below each other for which a panel stays


@triton.jit
def load_block(pointers, rows, row_end, columns, column_end, EVEN: tl.constexpr):
    """Load a block, zero outside of the matrix."""
    if EVEN:
        return tl.load(pointers)
    return tl.load(pointers, mask=(rows < row_end)[:, None] & (columns < column_end)[None, :], other=0.0)


@triton.jit
def load_block_once(pointers, rows, row_end, columns, column_end, EVEN: tl.constexpr):
    """Load a block that nobody reads again: it should not push the factors out of L2."""
    if EVEN:
        return tl.load(pointers, eviction_policy="evict_first")
    return tl.load(
        pointers,
        mask=(rows < row_end)[:, None] & (columns < column_end)[None, :],
        other=0.0,
        eviction_policy="evict_first",
    )


@triton.jit
def load_experts(route, SEGMENTS: tl.constexpr):
    """Load the route once: a load inside the loop that another waits for would cost the pipeline half its depth. -1, whose gate is 0: any."""
    experts = (tl.maximum(tl.load(route), 0),)
    for segment in tl.static_range(1, SEGMENTS):
        more = (tl.maximum(tl.load(route + segment), 0),)
        experts = experts + more  # type: ignore[assignment]
    return experts


@triton.jit
def pick(experts, segment, SEGMENTS: tl.constexpr):
    """Return experts[segment]."""
    expert = experts[0]
    for other in tl.static_range(1, SEGMENTS):
        expert = tl.where(segment == other, experts[other], expert)
    return expert


@triton.jit(do_not_specialize=["first_tile", "num_tiles"])
def sgmm_kernel(
    like, records, tiles, route, first_tile, num_tiles,
    SEGMENTS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, BLOCK_OUT)
    column = tl.arange(0, BLOCK_IN)
    depth = tl.arange(0, BLOCK_K)
    experts = load_experts(route, SEGMENTS)
    for number in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        tile = tiles + (first_tile + number) * 4
        record = records + tl.load(tile).to(tl.int64) * COLUMNS
        row_first = tl.load(tile + 1)
        column_first = tl.load(tile + 2)
        out = size(record, 5, EVEN)
        inp = size(record, 6, EVEN)
        rank = size(record, 7, EVEN)
        if EVEN:
            row_first = tl.multiple_of(row_first, BLOCK_OUT)
            column_first = tl.multiple_of(column_first, BLOCK_IN)
        rows = row_first + row
        columns = column_first + column
        source_stride = size(record, 9, EVEN)
        source = address(record, like, 1, EVEN) + (row_first.to(tl.int64) * source_stride + column_first)
        old = load_block_once(
            source + (row[:, None] * source_stride + column[None, :]), rows, out, columns, inp, EVEN
        )
        up = address(record, like, 2, EVEN) + row_first
        up_stride = tl.load(record + 10)
        if EVEN:
            up_stride = tl.multiple_of(up_stride, 16)
        up_at = depth[:, None] * out + row[None, :]
        down = address(record, like, 4, EVEN) + column_first
        down_at = depth[:, None] * inp + column[None, :]
        steps = (rank + BLOCK_K - 1) // BLOCK_K  # of one expert
        update = tl.zeros([BLOCK_OUT, BLOCK_IN], tl.float32)
        for step in range(0, SEGMENTS * steps):
            segment = step // steps
            low = (step - segment * steps) * BLOCK_K
            expert = pick(experts, segment, SEGMENTS).to(tl.int64)
            ups = up + (expert * up_stride + low.to(tl.int64) * out)
            downs = down + (segment * rank + low).to(tl.int64) * inp
            u = load_block(ups + up_at, low + depth, rank, rows, out, EVEN)
            d = load_block(downs + down_at, low + depth, rank, columns, inp, EVEN)
            update = tl.dot(tl.trans(u), d, update, input_precision="ieee")
        new = (old.to(tl.float32) + update).to(old.dtype)
        target_stride = size(record, 8, EVEN)
        target = address(record, like, 0, EVEN) + (row_first.to(tl.int64) * target_stride + column_first)
        at = target + (row[:, None] * target_stride + column[None, :])
        if EVEN:
            tl.store(at, new, eviction_policy="evict_first")
        else:
            tl.store(at, new, mask=(rows < out)[:, None] & (columns < inp)[None, :])


@triton.jit
def tile_factors(records, tile, COLUMNS: tl.constexpr):
    """Return where a tile's factors are: row and column of W, addresses of UP and stage, their widths in units of 16, an expert's stride.

    In units: what a loop carries has lost what is known of its divisibility, and a product has it again.
    """
    record = records + tl.load(tile).to(tl.int64) * COLUMNS
    out = tl.load(record + 5).to(tl.int32) // 16
    inp = tl.load(record + 6).to(tl.int32) // 16
    return (
        tl.load(tile + 1),
        tl.load(tile + 2),
        tl.load(record + 2),
        tl.load(record + 4),
        out,
        inp,
        tl.load(record + 10),
    )


@triton.jit
def add_tile(like, records, tile, update, row, column, COLUMNS: tl.constexpr):
    """Write one tile of W: its source and the update."""
    record = records + tl.load(tile).to(tl.int64) * COLUMNS
    row_first = tl.load(tile + 1).to(tl.int64)
    column_first = tl.load(tile + 2)
    source_stride = size(record, 9, True)
    target_stride = size(record, 8, True)
    source = tl.multiple_of(address(record, like, 1, True) + (row_first * source_stride + column_first), 16)
    target = tl.multiple_of(address(record, like, 0, True) + (row_first * target_stride + column_first), 16)
    old = tl.load(source + (row[:, None] * source_stride + column[None, :]), eviction_policy="evict_first")
    new = (old.to(tl.float32) + update).to(old.dtype)
    tl.store(target + (row[:, None] * target_stride + column[None, :]), new, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["first_tile", "num_tiles"])
def sgmm_flat_kernel(
    like, records, tiles, route, first_tile, num_tiles,
    SEGMENTS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_K: tl.constexpr,
    RANK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The same as one loop over the matrix steps of all of a program's tiles, so that the next tile's factors load while this one ends.

    For blocks that fill every weight, and one rank.
    """
    STEPS: tl.constexpr = RANK // BLOCK_K
    TOTAL: tl.constexpr = SEGMENTS * STEPS
    row = tl.arange(0, BLOCK_OUT)
    column = tl.arange(0, BLOCK_IN)
    depth = tl.arange(0, BLOCK_K)
    experts = load_experts(route, SEGMENTS)
    tile = tiles + (first_tile + tl.program_id(0)) * 4
    row_first, column_first, up, down, out, inp, up_stride = tile_factors(records, tile, COLUMNS)
    ahead = tile
    step = tl.full((), 0, tl.int32)
    update = tl.zeros([BLOCK_OUT, BLOCK_IN], tl.float32)
    mine = (num_tiles - tl.program_id(0) + tl.num_programs(0) - 1) // tl.num_programs(0)
    done_tile = tile
    for turn in range(0, mine * TOTAL):
        segment = step // STEPS
        low = (step - segment * STEPS) * BLOCK_K
        expert = pick(experts, segment, SEGMENTS).to(tl.int64)
        width_out = out * 16
        width_in = inp * 16
        ups = up.to(tl.pointer_type(like.dtype.element_ty))
        ups = tl.multiple_of(ups + (expert * up_stride + low.to(tl.int64) * width_out + row_first), 16)
        downs = down.to(tl.pointer_type(like.dtype.element_ty))
        downs = tl.multiple_of(downs + ((segment * RANK + low).to(tl.int64) * width_in + column_first), 16)
        u = tl.load(ups + (depth[:, None] * width_out + row[None, :]))
        d = tl.load(downs + (depth[:, None] * width_in + column[None, :]))
        update = tl.dot(tl.trans(u), d, update, input_precision="ieee")
        last = step == TOTAL - 1
        # Unconditional: inside an `if`, the pipeliner would not load ahead of it.
        ahead = tl.where(last & (turn + 1 < mine * TOTAL), ahead + tl.num_programs(0) * 4, ahead)
        row_first, column_first, up, down, out, inp, up_stride = tile_factors(records, ahead, COLUMNS)
        step = tl.where(last, 0, step + 1)
        if last:
            add_tile(like, records, done_tile, update, row, column, COLUMNS)
            update = tl.zeros([BLOCK_OUT, BLOCK_IN], tl.float32)
            done_tile += tl.num_programs(0) * 4


class Sgmm:
    """A plan with its tiles, ready to be launched as often as one likes."""

    def __init__(self, plan: SgmmPlan, tuning: SgmmTuning | None = None) -> None:
        self.plan = plan
        self.rank = max(weight.rank for weight in plan.weights)
        self.inner = plan.segments * self.rank
        columns = math.gcd(*(weight.target.shape[1] for weight in plan.weights))
        self.tuning = tuning = tuning or sgmm_tuning(self.inner, columns)
        self.panel = tuning.panel and self._takes_panel(tuning)
        if tuning.panel and not self.panel:
            self.tuning = tuning = PLAIN
        self.block_k = min(tuning.block_k, max(16, triton.next_power_of_2(self.rank)))
        self.even = plan.fits(tuning.block_out, tuning.block_in, self.block_k)
        self.flat = tuning.flatten and self.even and self._one_rank()
        blocks, self.programs = (tuning.block_out, tuning.block_in), NUM_SMS * tuning.programs_per_sm
        if self.panel:
            self.block_k = tuning.panel_block_k(self.inner)
            self.overlap = tuning.overlap and self.inner > self.block_k
            self.tiles, self.starts = plan.runs(*blocks, self.programs, LONGEST_RUN)
        else:
            self.tiles, self.starts = plan.tiles(*blocks)

    def stage_(self, route: torch.Tensor, gates: torch.Tensor, *, weight: int | None = None) -> None:
        """Do what this merge needs of `stage_down_`, whose arguments these are: with a panel, keep the gates."""
        if self.panel:
            keep_gates_(self.plan, gates, weight=weight)
        else:
            stage_down_(self.plan, route, gates, weight=weight)

    def merge_(self, route: torch.Tensor, *, weight: int | None = None) -> None:
        """Write W = source + UP · DOWN of all weights in one launch, or of one weight; DOWN as `stage_` or `stage_down_` left it.

        route: [segments] int32, this token's k experts and, in place, the last one's. Raises ValueError on shape, dtype or device mismatch.
        """
        check_route(self.plan, route)
        first, end = self._range(weight)
        tuning = self.tuning
        options: dict[str, int] = {"num_warps": tuning.num_warps}
        if tuning.max_registers and route.is_cuda:
            options["maxnreg"] = tuning.max_registers
        grid = (min(end - first, self.programs),)
        arguments = (self.plan.stage, self.plan.records, self.tiles, route, first, end - first)
        blocks = {"BLOCK_OUT": tuning.block_out, "BLOCK_IN": tuning.block_in, "BLOCK_K": self.block_k}
        common = {"SEGMENTS": self.plan.segments, "COLUMNS": RECORD_COLUMNS, **blocks, **options}
        if self.panel:
            sgmm_panel_kernel[grid](
                *arguments[:4], self.plan.gates, *arguments[4:], RANK=self.rank, RING=tuning.num_stages,
                OVERLAP=self.overlap, PARTS=tuning.parts, GATED=self.plan.staged, **common,
            )  # fmt: skip
        elif self.flat:
            sgmm_flat_kernel[grid](*arguments, RANK=self.rank, num_stages=tuning.num_stages, **common)
        else:
            sgmm_kernel[grid](*arguments, EVEN=self.even, num_stages=tuning.num_stages, **common)

    def _range(self, weight: int | None) -> tuple[int, int]:
        """Return which tiles, or runs of them, a launch takes."""
        if weight is not None:
            return self.starts[weight], self.starts[weight + 1]
        return self.starts[-2] if self.panel else 0, self.starts[-1]

    def _one_rank(self) -> bool:
        return all(item.rank == self.rank for item in self.plan.weights)

    def _takes_panel(self, tuning: SgmmTuning) -> bool:
        """Return whether kernels/sgmm_panel.py can do it."""
        device = self.plan.stage.device
        return (
            tuning.panel_fits(self.inner)
            and self._one_rank()
            and self.plan.dtype.itemsize == 2
            and self.plan.fits(tuning.block_out, tuning.block_in, 1)
            and device.type == "cuda"
            and torch.cuda.get_device_capability(device)[0] == 9
        )


def sgmm_(plan: SgmmPlan, route: torch.Tensor, gates: torch.Tensor, tuning: SgmmTuning | None = None) -> None:
    """Stage and merge once; for more than one token keep an `Sgmm`. Arguments as of `stage_down_`."""
    merge = Sgmm(plan, tuning)
    merge.stage_(route, gates)
    merge.merge_(route)
