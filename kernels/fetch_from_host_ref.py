"""Reference of kernels/fetch_from_host.py."""

import torch


def fetch_from_host(source: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out = source."""
    return out.copy_(source)
