"""Check a model's unmerged experts on the GPU against plain PyTorch, at real widths and few layers: run in a process of its own, it also
leaves the compiled kernels in Triton's cache for the benchmark.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from engine.dynamic_adapter import DynamicAdapterSpec
from engine.expert_pools import random_expert_pools
from engine.model_shape import MODEL_CATALOGUE
from engine.switch_ops import switch_ops_for
from engine.switch_paths import SwitchDecoder
from engine.weights import random_weights
from kernels.expert_launch import ExpertTuning

MAX_RELATIVE_ERROR = 3e-2
"""Of a token's logits in bf16 after two layers: products summed in another order are rounded otherwise. One token in ten may be worse, its
router's logits having been equal but for rounding."""


def check_decoder(
    model: str, rank: int, batch: int, tuning: ExpertTuning | None = None, device: str = "cuda"
) -> float:
    """Return the relative error of two tokens' logits; raises ValueError where it is too large."""
    shape = replace(MODEL_CATALOGUE[model], num_layers=2, vocab_size=512)
    weights = random_weights(shape, torch.bfloat16, device, seed=0)
    spec = DynamicAdapterSpec(name="d", num_experts=8, top_k=2, rank=rank)
    pools = random_expert_pools(spec, shape, seed=1, dtype=torch.bfloat16, device=device)
    found = []
    for backend in ("triton", "reference"):
        decoder = SwitchDecoder(
            shape,
            weights,
            pools,
            switch_ops_for("triton" if backend == "triton" else "reference"),
            batch=batch,
            max_tokens=64,
            tuning=tuning,
        )
        decoder.sequences.ids.copy_(torch.arange(batch) * 37 % 512)
        logits = [decoder.forward("unmerged").clone()]
        decoder.sequences.positions.add_(1)
        decoder.sequences.ids.copy_(torch.arange(batch) * 11 % 512)
        found.append(torch.stack([*logits, decoder.forward("unmerged")]).float())
    errors = (found[0] - found[1]).norm(dim=-1) / found[1].norm(dim=-1)
    error: float = errors.flatten().quantile(0.9).item()
    if not error < MAX_RELATIVE_ERROR:
        raise ValueError(
            f"unmerged experts of {model}, r={rank}, batch {batch}, {tuning}: relative error {error:.2e}"
        )
    return error
