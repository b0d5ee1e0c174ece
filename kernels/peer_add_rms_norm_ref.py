"""Reference of kernels/peer_add_rms_norm.py, for ranks whose buffers are at hand."""

from collections.abc import Sequence

import torch

from kernels.rms_norm_ref import rms_norm


def peer_add_rms_norm_(
    parts: Sequence[torch.Tensor], residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """residual += Σ parts, summed in fp32 in the order of the ranks and rounded once; y = rms_norm(residual, weight)."""
    total = torch.zeros(residual.shape, dtype=torch.float32, device=residual.device)
    for part in parts:
        total += part.float()
    residual.copy_(total.to(residual.dtype).float() + residual.float())
    return rms_norm(residual, weight, eps)
