"""The gated activation of Llama's MLP.

    y = silu(gate) · up,   silu(g) = g / (1 + exp(−g))

It starts early (kernels/launch.py).
Source: Shazeer, arXiv:2002.05202 (SwiGLU).
"""

import torch
import triton
import triton.language as tl

from kernels.checks import FLOAT_DTYPES, check_tensor
from kernels.launch import launch_options, let_successor_start, wait_for_predecessors

BLOCK = 1024  # 8 elements a thread with 4 warps: one 16-byte load of gate and one of up in bf16.


@triton.jit
def _silu_mul_kernel(
    gate_up, out, gate_up_stride, out_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    let_successor_start(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    gate_ptrs = gate_up + row * gate_up_stride + column
    wait_for_predecessors(PDL)
    gate = tl.load(gate_ptrs, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + WIDTH, mask=inside, other=0.0).to(tl.float32)
    activated = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * out_stride + column, activated.to(out.dtype.element_ty), mask=inside)


def silu_mul(gate_up: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Compute silu(gate) · up in fp32.

    gate_up: [T, 2I] bf16, fp16 or fp32, the gate in the first I columns; rows contiguous, any row stride.
    out: [T, I], same dtype.
    Returns out. Raises ValueError on shape, dtype, stride or device mismatch.
    """
    check_tensor(
        "gate_up", gate_up, shape=(None, None), dtypes=FLOAT_DTYPES, device=gate_up.device, strided_rows=True
    )
    tokens, twice = gate_up.shape
    if twice % 2:
        raise ValueError(f"gate_up must have an even number of columns, not {twice}")
    width = twice // 2
    if out is None:
        out = torch.empty((tokens, width), dtype=gate_up.dtype, device=gate_up.device)
    check_tensor(
        "out", out, shape=(tokens, width), dtypes=(gate_up.dtype,), device=gate_up.device, strided_rows=True
    )
    if tokens == 0 or width == 0:
        return out
    block = min(BLOCK, triton.next_power_of_2(width))
    _silu_mul_kernel[(tokens, triton.cdiv(width, block))](
        gate_up,
        out,
        gate_up.stride(0),
        out.stride(0),
        WIDTH=width,
        BLOCK=block,
        num_warps=4,
        **launch_options(gate_up.device),
    )
    return out
