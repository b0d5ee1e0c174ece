"""Memory of this GPU that the other ranks' kernels read, at addresses that all ranks exchange once (kernels/peers.py)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class PeerBuffer:
    """data: this rank's, flat. addresses: uint64 [ranks], on the device, where every rank's begins."""

    data: torch.Tensor
    addresses: torch.Tensor
    _handle: Any  # keeps the other ranks' memory mapped


def peer_buffer(elems: int, dtype: torch.dtype, device: torch.device) -> PeerBuffer:
    """Allocate zeroed memory that all ranks can read. Every rank calls it at the same time, with the same size."""
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # not all hosts allow NVLink multicast
    import torch.distributed._symmetric_memory as symmetric_memory

    data: torch.Tensor = symmetric_memory.empty(elems, dtype=dtype, device=device)
    data.zero_()
    group = dist.group.WORLD
    assert group is not None
    handle = symmetric_memory.rendezvous(data, group.group_name)
    torch.cuda.synchronize(device)
    dist.barrier()  # nobody signals into a pad that is not zero yet
    addresses = torch.tensor(list(handle.buffer_ptrs), dtype=torch.int64).view(torch.uint64).to(device)
    return PeerBuffer(data, addresses, handle)
