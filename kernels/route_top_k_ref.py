"""Plain PyTorch reference of `kernels.route_top_k`; also the CPU backend's."""

from __future__ import annotations

import torch


def route_top_k(
    logits, indices, gates, dense, touched, *, renormalise=False, tile_tokens=1, active=None
) -> None:
    """Compute what the kernel computes: softmax, the k largest with ties by the lowest index, experts by tile."""
    p = torch.softmax(logits.float(), dim=1)
    order = torch.sort(logits.float(), dim=1, descending=True, stable=True).indices
    chosen = order[:, : indices.shape[1]]
    gate = p.gather(1, chosen)
    if renormalise:
        gate = gate / gate.sum(dim=1, keepdim=True)
    live = torch.ones(len(logits), dtype=torch.bool, device=logits.device) if active is None else active != 0
    indices.copy_(torch.where(live[:, None], chosen, -1))
    gates.copy_(torch.where(live[:, None], gate, 0.0))
    dense.zero_().scatter_(1, chosen, gates)
    touched.fill_(-1)
    for tile in range(len(touched)):
        rows = indices[tile * tile_tokens : (tile + 1) * tile_tokens]
        experts = rows[rows >= 0].unique()
        touched[tile, : len(experts)] = experts
