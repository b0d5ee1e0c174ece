"""Shrink of unmerged experts: each token through the A of the experts that its router chose, read from device memory.

    bridge[s, u, t, i] = Σ_{c in part s of in} x[t, c] · A[e, i, c]      e = touched[tile of t, u], i over the rows of a group's linears

Nothing is known on the host but shapes, so one captured graph serves any route. Tokens of a tile share an expert's bytes: what its other
tokens make of it is computed too and meets a gate of zero in the expand. The sum over parts is the expand's business: no atomics. Ranks are
exact.

Batching by expert as in S-LoRA's and Punica's kernels by adapter (arXiv:2311.03285, arXiv:2310.18547); gates as in LoRA-Switch,
arXiv:2405.17741, equation of the unmerged form.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.checks import FLOAT_DTYPES, check_tensor
from kernels.expert_launch import ExpertLaunch
from kernels.launch import launch_options, let_successor_start, wait_for_predecessors

BLOCK_K = 128  # of one matrix step, 16 rows of A: 4 KB in bf16


@triton.jit
def _shrink_kernel(
    x, a, touched, bridge, tokens, x_stride, a_stride, plane_stride, slot_stride,
    IN: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, PART_PAD: tl.constexpr,
    TILE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, SETTLED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One tile of tokens, expert, block of A rows and part of `in`."""
    ROW_BLOCKS: tl.constexpr = (ROWS + BLOCK_R - 1) // BLOCK_R
    let_successor_start(PDL)
    work = tl.program_id(0)
    part = work % PARTS
    row_block = work // PARTS % ROW_BLOCKS
    slot = work // (PARTS * ROW_BLOCKS) % SLOTS
    tile = work // (PARTS * ROW_BLOCKS * SLOTS)
    if not SETTLED:
        wait_for_predecessors(PDL)
    expert = tl.load(touched + tile * SLOTS + slot)
    row = row_block * BLOCK_R + tl.arange(0, BLOCK_R)
    live = row < ROWS
    first = part * PART
    a_rows = a + tl.maximum(expert, 0).to(tl.int64) * a_stride + row * IN
    out = bridge + part.to(tl.int64) * plane_stride + slot.to(tl.int64) * slot_stride
    if expert >= 0:
        if TILE == 1:
            # All bytes at once: they are on their way before the kernels ahead have ended.
            column = first + tl.arange(0, PART_PAD)
            inside = column < tl.minimum(first + PART, IN)
            block = tl.load(
                a_rows[:, None] + column[None, :], mask=live[:, None] & inside[None, :], other=0.0
            )
            wait_for_predecessors(PDL)
            values = tl.load(x + tile.to(tl.int64) * x_stride + column, mask=inside, other=0.0)
            h = tl.sum(block.to(tl.float32) * values.to(tl.float32)[None, :], axis=1)
            tl.store(out + tile * ROWS + row, h, mask=live)
        else:
            wait_for_predecessors(PDL)
            token = tile * TILE + tl.arange(0, TILE)
            in_tile = token < tokens
            x_rows = x + token.to(tl.int64) * x_stride
            h = tl.zeros([TILE, BLOCK_R], tl.float32)
            for low in range(0, PART, BLOCK_K):
                column = first + low + tl.arange(0, BLOCK_K)
                inside = column < tl.minimum(first + PART, IN)
                values = tl.load(
                    x_rows[:, None] + column[None, :], mask=in_tile[:, None] & inside[None, :], other=0.0
                )
                block = tl.load(
                    a_rows[:, None] + column[None, :], mask=live[:, None] & inside[None, :], other=0.0
                )
                h = tl.dot(values, tl.trans(block), h, input_precision="ieee")
            tl.store(out + token[:, None] * ROWS + row[None, :], h, mask=in_tile[:, None] & live[None, :])
    wait_for_predecessors(PDL)


def expert_shrink(
    x: torch.Tensor,
    a: torch.Tensor,
    touched: torch.Tensor,
    bridge: torch.Tensor,
    *,
    launch: ExpertLaunch,
    settled: bool = False,
) -> torch.Tensor:
    """Write the partial products x · Aᵀ of one group's experts to `bridge`, and return it.

    x: [T, in] bf16, fp16 or fp32, rows contiguous. a: [N, rows, in], the group's linears' A back to back, any stride between experts.
    touched: [tiles, slots] int32 as `route_top_k` wrote it with launch.tile_tokens. bridge: fp32 [launch.parts(in), slots, T, rows]; where a
    slot has no expert it is left alone.
    It starts early (kernels/launch.py) and reads A meanwhile, so no kernel of the step may write A; settled: neither has one that may
    still run written `touched`, so that it is read ahead too (there is an ordinary kernel between, such as a matrix product's).
    Raises ValueError on shape, dtype, stride or device mismatch.
    """
    device = x.device
    check_tensor("x", x, shape=(None, None), dtypes=FLOAT_DTYPES, device=device, strided_rows=True)
    tokens, width = x.shape
    check_tensor("a", a, shape=(None, None, width), dtypes=(x.dtype,), device=device, strided_rows=True)
    rows, tile = a.shape[1], launch.tile_tokens
    tiles, parts = -(-tokens // tile), launch.parts(width)
    check_tensor("touched", touched, shape=(tiles, None), dtypes=(torch.int32,), device=device)
    slots = touched.shape[1]
    check_tensor("bridge", bridge, shape=(parts, slots, tokens, rows), dtypes=(torch.float32,), device=device)
    if tokens == 0:
        return bridge
    options = launch_options(device) if launch.pdl else {"PDL": False}
    grid = tiles * slots * -(-rows // launch.shrink_rows) * parts
    _shrink_kernel[(grid,)](
        x, a, touched, bridge, tokens, x.stride(0), a.stride(0), bridge.stride(0), bridge.stride(1),
        IN=width, ROWS=rows, SLOTS=slots, PARTS=parts, PART=launch.shrink_part, PART_PAD=triton.next_power_of_2(launch.shrink_part),
        TILE=tile, BLOCK_R=launch.shrink_rows, BLOCK_K=min(BLOCK_K, launch.shrink_part), SETTLED=settled, num_warps=4,
        num_stages=4, **options,
    )  # fmt: skip
    return bridge
