"""Reference of kernels/gather_tokens.py."""

import torch


def gather_tokens(
    host_tokens: torch.Tensor, last_token: torch.Tensor, sequence_slots: torch.Tensor, *, out: torch.Tensor
) -> torch.Tensor:
    """The host's token where it sent one, else the sequence's last, else 0."""
    produced = last_token[sequence_slots.clamp(min=0).long()].to(out.dtype)
    produced = torch.where(sequence_slots >= 0, produced, torch.zeros_like(produced))
    return out.copy_(torch.where(host_tokens >= 0, host_tokens.to(out.dtype), produced))
