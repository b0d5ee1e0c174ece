"""The one table of error bounds for kernels against their fp32 references: ‖out − ref‖ / ‖ref‖ by dtype."""

import torch

RELATIVE_ERROR_BOUND = {
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1e-2,
}


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """‖out − reference‖ / ‖reference‖ in float64; NaN or infinity in `out` gives infinity."""
    if out.shape != reference.shape:
        raise AssertionError(f"shape {tuple(out.shape)} against {tuple(reference.shape)}")
    out, reference = out.detach().cpu().double(), reference.detach().cpu().double()
    if not torch.isfinite(out).all():
        return float("inf")
    difference, size = (out - reference).norm().item(), reference.norm().item()
    return difference / size if size > 0 else (0.0 if difference == 0 else float("inf"))


def assert_close(out: torch.Tensor, reference: torch.Tensor, dtype: torch.dtype | None = None) -> None:
    """Fail unless `out` is within the bound of `dtype` (default: its own) of `reference`."""
    bound = RELATIVE_ERROR_BOUND[dtype or out.dtype]
    error = relative_error(out, reference)
    assert error <= bound, f"relative error {error:.3e} > {bound:.0e}"
