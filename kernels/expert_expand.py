"""Expand of unmerged experts: add to the base product what the chosen experts make of each token, weighted by its gates, in place.

    y[t, columns of m] += Σ_u gate[t, e_u] Σ_r h[u, t, r of m] · B_m[e_u, r, :]        h = Σ_s bridge[s]

A program has a block of one linear's columns and goes over all experts of its tile of tokens, so no two programs add to the same place.
B is stored transposed, a row holding one rank's `out` elements.

Products have at most 32 rows, so they are mma.sync (the ptxas note of kernels/lora_expand.py).
Source: as of kernels/expert_shrink.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from kernels.checks import FLOAT_DTYPES, check_tensor
from kernels.expert_launch import ExpertLaunch
from kernels.launch import launch_options, let_successor_start, wait_for_predecessors

ROW_BLOCK = 128  # rows of B at a time for one token,
RANK_BLOCK = 64  # and ranks of one expert for a tile


@triton.jit
def _locate(
    block, BLOCK_N: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, Y0: tl.constexpr, Y1: tl.constexpr,
    Y2: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Find a block of columns: its linear's width, first column in it, first column of y, first row of h and element of an expert's B."""
    BLOCKS_0: tl.constexpr = (W0 + BLOCK_N - 1) // BLOCK_N
    BLOCKS_1: tl.constexpr = (W1 + BLOCK_N - 1) // BLOCK_N
    in_1 = (block >= BLOCKS_0).to(tl.int32)  # in the group's second target or a later one
    in_2 = (block >= BLOCKS_0 + BLOCKS_1).to(tl.int32)
    width = W0 + in_1 * (W1 - W0) + in_2 * (W2 - W1)
    n_first = (block - in_1 * BLOCKS_0 - in_2 * BLOCKS_1) * BLOCK_N
    y_first = Y0 + in_1 * (Y1 - Y0) + in_2 * (Y2 - Y1)
    b_first = (in_1 * W0 + in_2 * W1) * RANK
    return width, n_first, y_first, (in_1 + in_2) * RANK, b_first


@triton.jit
def _sum_planes(bridge, plane_stride, at, keep, PARTS: tl.constexpr):
    """Sum the bridge's planes at offsets."""
    h = tl.load(bridge + at, mask=keep, other=0.0)
    for part in tl.static_range(1, PARTS):
        h += tl.load(bridge + part * plane_stride + at, mask=keep, other=0.0)
    return h


@triton.jit
def _expand_token(
    y, bridge, b, dense, touched, plane_stride, slot_stride, b_stride, width, n_first, h_first,
    RANK: tl.constexpr, SLOTS: tl.constexpr, PARTS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Add all experts of one token: their rows of B follow each other, the first block of them loaded while the kernels ahead end."""
    n = n_first + tl.arange(0, BLOCK_N)
    inside = n < width
    row = tl.arange(0, BLOCK_Q)
    update = tl.zeros([BLOCK_N], tl.float32)
    for low in tl.range(0, SLOTS * RANK, BLOCK_Q, num_stages=1):
        slot = (low + row) // RANK
        r = (low + row) % RANK
        expert = tl.load(touched + slot, mask=slot < SLOTS, other=-1)
        live = expert >= 0
        rows = b + expert.to(tl.int64) * b_stride + r * width
        block = tl.load(rows[:, None] + n[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        if low == 0:
            wait_for_predecessors(PDL)
        h = _sum_planes(bridge, plane_stride, slot * slot_stride + h_first + r, live, PARTS)
        h *= tl.load(dense + expert, mask=live, other=0.0)
        update += tl.sum(block.to(tl.float32) * h[:, None], axis=0)
    base = tl.load(y + n, mask=inside, other=0.0)
    tl.store(y + n, (base.to(tl.float32) + update).to(base.dtype), mask=inside)


@triton.jit
def _expand_tile(
    y, y_stride, bridge, b, dense, touched, plane_stride, slot_stride, b_stride, token, tokens, width, n_first, h_first,
    N: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr, SLOTS: tl.constexpr, PARTS: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Add all experts of a tile of tokens, one block of ranks after the other."""
    RANK_BLOCKS: tl.constexpr = (RANK + BLOCK_R - 1) // BLOCK_R
    n = n_first + tl.arange(0, BLOCK_N)
    inside = n < width
    in_tile = token < tokens
    rank = tl.arange(0, BLOCK_R)
    wait_for_predecessors(PDL)
    update = tl.zeros([token.shape[0], BLOCK_N], tl.float32)
    for step in range(0, SLOTS * RANK_BLOCKS):
        slot = step // RANK_BLOCKS
        r = (step % RANK_BLOCKS) * BLOCK_R + rank
        expert = tl.load(touched + slot)
        live = (r < RANK) & (expert >= 0)
        e = tl.maximum(expert, 0)
        block = tl.load(
            b + e.to(tl.int64) * b_stride + r[:, None] * width + n[None, :],
            mask=live[:, None] & inside[None, :],
            other=0.0,
        )
        at = slot * slot_stride + token[:, None] * ROWS + (h_first + r)[None, :]
        gate = tl.load(dense + token * N + e, mask=in_tile, other=0.0)
        h = _sum_planes(bridge, plane_stride, at, in_tile[:, None] & live[None, :], PARTS)
        # Not 0 · h: another adapter's experts may have made an infinity of this token.
        h = tl.where(gate[:, None] != 0.0, h * gate[:, None], 0.0)
        update = tl.dot(h.to(block.dtype), block, update, input_precision="ieee")
    at = y + token.to(tl.int64)[:, None] * y_stride + n[None, :]
    mask = in_tile[:, None] & inside[None, :]
    base = tl.load(at, mask=mask, other=0.0)
    tl.store(at, (base.to(tl.float32) + update).to(base.dtype), mask=mask)


@triton.jit
def _expand_kernel(
    y, bridge, b, dense, touched, tokens, y_stride, plane_stride, slot_stride, b_stride,
    N: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr, SLOTS: tl.constexpr, PARTS: tl.constexpr,
    W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, Y0: tl.constexpr, Y1: tl.constexpr, Y2: tl.constexpr,
    TILE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, SETTLED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One tile of tokens and block of columns."""
    BLOCKS: tl.constexpr = (
        (W0 + BLOCK_N - 1) // BLOCK_N + (W1 + BLOCK_N - 1) // BLOCK_N + (W2 + BLOCK_N - 1) // BLOCK_N
    )
    let_successor_start(PDL)
    tile = tl.program_id(0) // BLOCKS
    width, n_first, y_first, h_first, b_first = _locate(
        tl.program_id(0) % BLOCKS, BLOCK_N, W0, W1, W2, Y0, Y1, Y2, RANK
    )
    width = tl.multiple_of(width, 16) if W0 % 16 == 0 and W1 % 16 == 0 and W2 % 16 == 0 else width
    if not SETTLED:
        wait_for_predecessors(PDL)
    if TILE == 1:
        _expand_token(
            y + tile.to(tl.int64) * y_stride + y_first, bridge + tile * ROWS, b + b_first, dense + tile * N, touched + tile * SLOTS,
            plane_stride, slot_stride, b_stride, width, n_first, h_first, RANK, SLOTS, PARTS, BLOCK_R, BLOCK_N, PDL,
        )  # fmt: skip
    else:
        token = tile * TILE + tl.arange(0, TILE)
        _expand_tile(
            y + y_first, y_stride, bridge, b + b_first, dense, touched + tile * SLOTS, plane_stride, slot_stride, b_stride, token,
            tokens, width, n_first, h_first, N, ROWS, RANK, SLOTS, PARTS, BLOCK_R, BLOCK_N, PDL,
        )  # fmt: skip
    wait_for_predecessors(PDL)


def expert_expand_(
    y: torch.Tensor,
    bridge: torch.Tensor,
    b: torch.Tensor,
    dense: torch.Tensor,
    touched: torch.Tensor,
    *,
    rank: int,
    widths: Sequence[int],
    targets: Sequence[bool],
    launch: ExpertLaunch,
    settled: bool = False,
) -> torch.Tensor:
    """Add the gated experts of one group of linears to `y` in place, and return it.

    y: [T, Σ widths] bf16, fp16 or fp32, the group's outputs side by side, rows contiguous. bridge: fp32 [parts, slots, T, rows], what
    `expert_shrink` wrote. b: [N, rank · Σ widths of the targets], y's dtype: for each target its Bᵀ [rank, width]. dense: [T, N] fp32 and
    touched: [tiles, slots] int32, what `route_top_k` wrote with launch.tile_tokens. widths: `out` of the group's one to three linears;
    targets: which of them have experts. settled: as of `expert_shrink`, of b and touched.
    Columns of other linears keep their bits. Raises ValueError on shape, dtype, stride or device mismatch.
    """
    device = y.device
    check_tensor("y", y, shape=(None, sum(widths)), dtypes=FLOAT_DTYPES, device=device, strided_rows=True)
    tokens, tile = len(y), launch.tile_tokens
    if len(widths) != len(targets) or not 1 <= len(widths) <= 3 or not any(targets):
        raise ValueError(
            f"targets(={tuple(targets)}) must say of each of 1 to 3 widths, and of one at least, that it is"
        )
    adapted = [
        (w, sum(widths[:i])) for i, (w, is_one) in enumerate(zip(widths, targets, strict=True)) if is_one
    ]
    columns = rank * sum(width for width, _ in adapted)
    check_tensor("b", b, shape=(None, columns), dtypes=(y.dtype,), device=device, strided_rows=True)
    rows = rank * len(adapted)
    check_tensor("dense", dense, shape=(tokens, len(b)), dtypes=(torch.float32,), device=device)
    check_tensor("touched", touched, shape=(-(-tokens // tile), None), dtypes=(torch.int32,), device=device)
    slots = touched.shape[1]
    check_tensor("bridge", bridge, shape=(None, slots, tokens, rows), dtypes=(torch.float32,), device=device)
    if tokens == 0:
        return y
    (w0, y0), (w1, y1), (w2, y2) = [*adapted, (0, 0), (0, 0)][:3]
    block_n = min(launch.expand_columns, max(16, triton.next_power_of_2(max(w0, w1, w2))))
    block_r = ROW_BLOCK if tile == 1 else min(RANK_BLOCK, max(16, triton.next_power_of_2(rank)))
    options = launch_options(device) if launch.pdl else {"PDL": False}
    blocks = sum(-(-width // block_n) for width, _ in adapted)
    _expand_kernel[(-(-tokens // tile) * blocks,)](
        y, bridge, b, dense, touched, tokens, y.stride(0), bridge.stride(0), bridge.stride(1), b.stride(0),
        N=len(b), ROWS=rows, RANK=rank, SLOTS=slots, PARTS=len(bridge), W0=w0, W1=w1, W2=w2, Y0=y0, Y1=y1, Y2=y2,
        TILE=tile, BLOCK_R=block_r, BLOCK_N=block_n, SETTLED=settled, num_warps=4, num_stages=3, **options,
    )  # fmt: skip
    return y
