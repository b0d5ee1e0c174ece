"""Copy a little pinned host memory to the GPU by a kernel instead of a copy engine.

    out[i] = source[i]

A copy engine serves one queue for as long as there is work in it: behind adapter loads that keep coming, the few kilobytes that a step needs were
seen to wait for seconds (H200, 2026-11-22). A kernel reads them over PCIe beside the loads.
"""

import torch
import triton
import triton.language as tl

from kernels.checks import check_tensor

BLOCK = 1024
NUM_WARPS = 4


@triton.jit
def _fetch_from_host_kernel(source, out, size, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(source + index, mask=index < size, cache_modifier=".cv")
    tl.store(out + index, value, mask=index < size)


def fetch_from_host(source: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Copy `source` to `out`, in the order of the current stream of out's device.

    source: [n] int32 in pinned host memory (on the CPU where out is), unchanged until the kernel has ended. out: [n] int32.
    Returns out. Raises ValueError on shape, dtype or memory that does not fit.
    """
    check_tensor("out", out, shape=(None,), dtypes=(torch.int32,), device=out.device)
    check_tensor("source", source, shape=out.shape, dtypes=(torch.int32,), device=torch.device("cpu"))
    if out.is_cuda and not source.is_pinned():
        raise ValueError("source must be in pinned memory")
    if len(out):
        _fetch_from_host_kernel[(triton.cdiv(len(out), BLOCK),)](
            source, out, len(out), BLOCK=BLOCK, num_warps=NUM_WARPS
        )
    return out
