"""Root-mean-square norm of each token, alone or with the residual add before it.

    y = x / sqrt(mean(x²) + eps) · weight

Both start early (kernels/launch.py): `weight` is read before the kernels ahead have ended.
Source: Zhang and Sennrich, arXiv:1910.07467; the placement of the residual is Llama's.
"""

import torch
import triton
import triton.language as tl

from kernels.checks import FLOAT_DTYPES, check_tensor
from kernels.launch import KEEP, launch_options, let_successor_start, wait_for_predecessors


@triton.jit
def _rms_norm_kernel(
    x,
    residual,
    weight,
    out,
    x_stride,
    residual_stride,
    out_stride,
    eps,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    PDL: tl.constexpr,
):
    let_successor_start(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < HIDDEN
    scale = tl.load(weight + column, mask=inside, other=0.0, eviction_policy=KEEP)
    wait_for_predecessors(PDL)
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0)
    if ADD:
        residual_ptrs = residual + row * residual_stride + column
        before = tl.load(residual_ptrs, mask=inside, other=0.0, eviction_policy=KEEP)
        # The norm sees what the residual stream holds, so the sum is rounded first, as in Llama.
        value = (value.to(tl.float32) + before.to(tl.float32)).to(residual.dtype.element_ty)
        tl.store(residual_ptrs, value, mask=inside, eviction_policy=KEEP)
    value = value.to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / HIDDEN + eps)
    # The weight is converted only here, or every load after it would wait for it.
    normed = value * inverse * scale.to(tl.float32)
    tl.store(out + row * out_stride + column, normed.to(out.dtype.element_ty), mask=inside)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Normalise each row of `x` and scale it by `weight`, in fp32.

    x: [T, H] bf16, fp16 or fp32; rows contiguous, any row stride. weight: [H], dtype of x. out: like x, may
    be x itself.
    Returns out, [T, H]. Raises ValueError on shape, dtype, stride or device mismatch.
    """
    return _launch(x, None, weight, eps, out)


def add_rms_norm_(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Add `x` to `residual` in place, then normalise the sum: residual += x; out = rms_norm(residual,
    weight).

    x, residual: [T, H] of one dtype; rows contiguous, any row stride. out: like x, may be x itself.
    Returns out, [T, H]. Raises ValueError on shape, dtype, stride or device mismatch.
    """
    return _launch(x, residual, weight, eps, out)


def _launch(x, residual, weight, eps, out):
    check_tensor("x", x, shape=(None, None), dtypes=FLOAT_DTYPES, device=x.device, strided_rows=True)
    tokens, hidden = x.shape
    check_tensor("weight", weight, shape=(hidden,), dtypes=(x.dtype,), device=x.device)
    if residual is not None:
        check_tensor(
            "residual", residual, shape=x.shape, dtypes=(x.dtype,), device=x.device, strided_rows=True
        )
    if out is None:
        out = torch.empty((tokens, hidden), dtype=x.dtype, device=x.device)
    check_tensor("out", out, shape=x.shape, dtypes=(x.dtype,), device=x.device, strided_rows=True)
    if tokens == 0:
        return out
    block = triton.next_power_of_2(hidden)
    _rms_norm_kernel[(tokens,)](
        x,
        x if residual is None else residual,
        weight,
        out,
        x.stride(0),
        x.stride(0) if residual is None else residual.stride(0),
        out.stride(0),
        eps,
        HIDDEN=hidden,
        BLOCK=block,
        ADD=residual is not None,
        num_warps=min(
            max(block // 512, 1), 16
        ),  # 16 elements a thread: two 16-byte loads in bf16, no spills at H = 8192.
        **launch_options(x.device),
    )
    return out
