"""What the GPUs of one replica tell each other in a step: sums and gathers over the ranks of tensor parallelism."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

TIMEOUT = timedelta(seconds=120)  # a collective that takes longer has lost a rank


class Communicator:
    """One rank among `size`. Every rank calls the same methods in the same order, with tensors of the same shapes.

    issued: how often each collective was called.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self.issued: Counter[str] = Counter()

    @classmethod
    def join(cls, rank: int, size: int, address: str, device: torch.device) -> Communicator:
        """Meet the other ranks at `address` (tcp://host:port): NCCL between GPUs, gloo between processes on a CPU."""
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=address,
            rank=rank,
            world_size=size,
            timeout=TIMEOUT,
            device_id=device if device.type == "cuda" else None,
        )
        return cls(rank, size)

    def all_reduce_(self, x: torch.Tensor) -> torch.Tensor:
        """Replace x by its sum over the ranks."""
        self.issued["all_reduce"] += 1
        dist.all_reduce(x)
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Return the ranks' x, one after the other: [size, *x.shape]. x: contiguous."""
        self.issued["all_gather"] += 1
        out = torch.empty((self.size, *x.shape), dtype=x.dtype, device=x.device)
        dist.all_gather_into_tensor(out.view(-1), x.view(-1))
        return out

    def gather_columns(self, x: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        """Return the ranks' columns side by side: [rows, Σ widths]. x: [rows, this rank's width]."""
        widest = max(widths)
        if x.shape[1] < widest:
            x = torch.nn.functional.pad(x, (0, widest - x.shape[1]))
        parts = self.all_gather(x.contiguous())
        return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=1)


def leave() -> None:
    """Part from the other ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()
