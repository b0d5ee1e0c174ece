"""Reference of kernels/greedy_sample.py."""

import torch


def greedy_sample(
    logits: torch.Tensor,
    sample_slots: torch.Tensor,
    last_token: torch.Tensor,
    arrivals: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The first largest column of each row, NaN the largest of all; `arrivals` is the kernel's own."""
    tokens = torch.argmax(logits, dim=-1)
    last_token.index_copy_(0, sample_slots.long(), tokens)
    return tokens if out is None else out.copy_(tokens)
