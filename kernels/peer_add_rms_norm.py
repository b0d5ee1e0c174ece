"""The end of a row-parallel linear under tensor parallelism, in one kernel: sum over the ranks, residual, norm.

    residual[t] += Σ_i x_i[t];    y[t] = residual[t] / sqrt(mean(residual[t]²) + eps) · weight

Every rank reads every rank's partial sums over NVLink and does all of the rest itself, so nothing is written between: one latency where an
all-reduce and a norm have two. One program a row; it hands shake with the same row's programs alone. Sums are taken in fp32 in the order of the
ranks, so all ranks get the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.checks import FLOAT_DTYPES, check_tensor
from kernels.launch import KEEP, launch_options, let_successor_start, wait_for_predecessors
from kernels.peers import await_signals, signal


@triton.jit
def _peer_add_rms_norm_kernel(
    x, buffers, pads, offset, residual, weight, out, residual_stride, out_stride, eps,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_successor_start(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < HIDDEN
    scale = tl.load(weight + column, mask=inside, other=0.0, eviction_policy=KEEP)
    wait_for_predecessors(PDL)
    signal(pads, tl.program_id(0), RANK, RANKS)
    residual_ptrs = residual + row * residual_stride + column
    before = tl.load(residual_ptrs, mask=inside, other=0.0, eviction_policy=KEEP)
    await_signals(pads, tl.program_id(0), RANK, RANKS)
    tl.debug_barrier()  # the wait is one thread's; what follows is all threads'
    total = tl.zeros([BLOCK], tl.float32)
    for peer in tl.static_range(0, RANKS):
        part = tl.multiple_of(tl.load(buffers + peer).to(x.dtype), 16) + tl.multiple_of(offset, 16)
        total += tl.load(part + row * HIDDEN + column, mask=inside, other=0.0).to(tl.float32)
    value = (total.to(residual.dtype.element_ty).to(tl.float32) + before.to(tl.float32)).to(
        residual.dtype.element_ty
    )
    tl.store(residual_ptrs, value, mask=inside, eviction_policy=KEEP)
    value = value.to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / HIDDEN + eps)
    normed = value * inverse * scale.to(tl.float32)
    tl.store(out + row * out_stride + column, normed.to(out.dtype.element_ty), mask=inside)


def peer_add_rms_norm_(
    x: torch.Tensor,
    buffers: torch.Tensor,
    pads: torch.Tensor,
    offset: int,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    rank: int,
    ranks: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Add the ranks' `x` to `residual` in place, then normalise the sum.

    x: [T, H], contiguous: this rank's partial sums, `offset` elements into its shared buffer; the other ranks' lie at the same offset. buffers, pads:
    uint64 [ranks], the addresses of all ranks' buffers and signal pads (kernels/peers.py); pads have room for T programs. residual, out: [T, H], rows
    contiguous. weight: [H].
    Returns out. Raises ValueError on shape, dtype, stride or device mismatch.
    """
    check_tensor("x", x, shape=(None, None), dtypes=FLOAT_DTYPES, device=x.device)
    tokens, hidden = x.shape
    if offset % 16:
        raise ValueError(f"offset(={offset}) must be a multiple of 16 elements")
    for name, table in (("buffers", buffers), ("pads", pads)):
        check_tensor(name, table, shape=(ranks,), dtypes=(torch.uint64,), device=x.device)
    check_tensor("weight", weight, shape=(hidden,), dtypes=(x.dtype,), device=x.device)
    check_tensor("residual", residual, shape=x.shape, dtypes=(x.dtype,), device=x.device, strided_rows=True)
    if out is None:
        out = torch.empty((tokens, hidden), dtype=x.dtype, device=x.device)
    check_tensor("out", out, shape=x.shape, dtypes=(x.dtype,), device=x.device, strided_rows=True)
    if tokens == 0:
        return out
    block = triton.next_power_of_2(hidden)
    _peer_add_rms_norm_kernel[(tokens,)](
        x, buffers, pads, offset, residual, weight, out, residual.stride(0), out.stride(0), eps,
        HIDDEN=hidden, BLOCK=block, RANK=rank, RANKS=ranks, num_warps=min(max(block // 512, 1), 16),
        **launch_options(x.device),
    )  # fmt: skip
    return out
