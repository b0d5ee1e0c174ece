"""The few kilobytes that a step exchanges with the host, moved by kernels that reach pinned host memory over PCIe.

    fetch_from_host     out[i] = source[i]
    scatter_from_host_  out[index[i]] = value[i]
    send_to_host        out[i] = source[i]

A step's small copies and adapter loads on one copy engine do not get along: with loads always under way a step of 6 ms stood still for 40 to 110 s
three times in 400, and not once in 400 with these (H200, driver 580.159.04, torch 2.11, 2026-11-22).
"""

import torch
import triton
import triton.language as tl

from kernels.checks import check_tensor

BLOCK = 512  # 16 bytes a thread: PCIe carries what one warp asks for in a few large packets
NUM_WARPS = 4
CPU = torch.device("cpu")


@triton.jit
def _copy_kernel(source, out, size, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + index, tl.load(source + index, mask=index < size), mask=index < size)


@triton.jit
def _scatter_kernel(pairs, out, count, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    at = tl.load(pairs + index, mask=inside)
    tl.store(out + at, tl.load(pairs + count + index, mask=inside), mask=inside)


def fetch_from_host(source: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Copy `source` to `out`, in the order of the current stream.

    source: [n] int32, pinned, left alone until the kernel has ended. out: [n] int32, on the GPU.
    Returns out. Raises ValueError on shape, dtype or memory that does not fit.
    """
    check_tensor("out", out, shape=(None,), dtypes=(torch.int32,), device=out.device)
    _check_host("source", source, out.shape, torch.int32, out.device)
    return _copy(source, out)


def send_to_host(source: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Copy `source` to `out`; the host may read it when an event recorded behind says so.

    source: [n] int64, on the GPU. out: [n] int64, pinned.
    Returns out. Raises ValueError on shape, dtype or memory that does not fit.
    """
    check_tensor("source", source, shape=(None,), dtypes=(torch.int64,), device=source.device)
    _check_host("out", out, source.shape, torch.int64, source.device)
    return _copy(source, out)


def scatter_from_host_(pairs: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Write pairs[1, i] to element pairs[0, i] of `out`.

    pairs: [2, n] int32, pinned, contiguous: indices, none twice, and values; left alone until the kernel has ended. out: [m] int32, on the GPU.
    Returns out. Raises ValueError on shape, dtype or memory that does not fit.
    """
    check_tensor("out", out, shape=(None,), dtypes=(torch.int32,), device=out.device)
    _check_host("pairs", pairs, (2, None), torch.int32, out.device)
    count = pairs.shape[1]
    if count:
        _scatter_kernel[(triton.cdiv(count, BLOCK),)](pairs, out, count, BLOCK=BLOCK, num_warps=NUM_WARPS)
    return out


def _check_host(name, tensor, shape, dtype, device):
    check_tensor(name, tensor, shape=tuple(shape), dtypes=(dtype,), device=CPU)
    if device.type == "cuda" and tensor.numel() and not tensor.is_pinned():
        raise ValueError(f"{name} must be in pinned memory")


def _copy(source, out):
    if len(out):
        _copy_kernel[(triton.cdiv(len(out), BLOCK),)](source, out, len(out), BLOCK=BLOCK, num_warps=NUM_WARPS)
    return out
