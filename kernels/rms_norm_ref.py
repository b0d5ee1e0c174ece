"""Reference of kernels/rms_norm.py."""

import torch


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """y = x / sqrt(mean(x²) + eps) · weight, in fp32."""
    value = x.float()
    normed = value * torch.rsqrt(value.square().mean(-1, keepdim=True) + eps) * weight.float()
    return normed.to(x.dtype) if out is None else out.copy_(normed)


def add_rms_norm_(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """residual += x; y = rms_norm(residual, weight)."""
    residual.copy_(residual.float() + x.float())
    return rms_norm(residual, weight, eps, out=out)
