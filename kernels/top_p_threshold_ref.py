"""Reference of kernels/top_p_threshold.py."""

import torch

from kernels.sample_params import TEMPERATURE, TOP_P


def top_p_threshold(
    logits: torch.Tensor, params: torch.Tensor, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The logit at which the sum over the sorted row reaches top_p of all, in fp64: a sum over 128,256 tokens one by one is long."""
    out = torch.empty(len(logits), dtype=torch.float32, device=logits.device) if out is None else out
    out.fill_(float("-inf"))
    temperature = params[:, TEMPERATURE].contiguous().view(torch.float32)
    top_p = params[:, TOP_P].contiguous().view(torch.float32)
    wanted = torch.nonzero((temperature != 0) & (top_p < 1)).squeeze(1)
    if len(wanted):  # a row that keeps all costs nothing
        likeliest = logits[wanted].float().sort(dim=-1, descending=True).values
        mass = ((likeliest - likeliest[:, :1]).double() / temperature[wanted, None]).exp().cumsum(dim=-1)
        last = (mass < top_p[wanted, None].double() * mass[:, -1:]).sum(dim=-1)
        out[wanted] = likeliest.gather(1, last[:, None]).squeeze(1)
    return out
