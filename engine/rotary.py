"""The table of rotary angles of a model."""

from __future__ import annotations

import math

import torch

from engine.model_shape import ModelShape, RopeScaling


def cos_sin_table(shape: ModelShape, positions: int) -> torch.Tensor:
    """Return [positions, head_dim] fp32: cos of the head_dim / 2 angles, then their sin. Source: arXiv:2104.09864."""
    frequencies = shape.rope_theta ** -(
        torch.arange(0, shape.head_dim, 2, dtype=torch.float64) / shape.head_dim
    )
    if shape.rope_scaling is not None:
        frequencies = _scaled(frequencies, shape.rope_scaling)
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies.float())
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def _scaled(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Stretch frequencies: all by the factor (linear), or the low ones, with a blend between (llama3, as transformers does it)."""
    stretched = frequencies / scaling.factor
    if scaling.kind == "linear":
        return stretched
    wavelengths = 2 * math.pi / frequencies
    original = scaling.original_max_position_embeddings
    blend = (original / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * stretched + blend * frequencies
