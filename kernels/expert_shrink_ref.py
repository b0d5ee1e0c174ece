"""Plain PyTorch reference of `kernels.expert_shrink`; also the CPU backend's."""

from __future__ import annotations


def expert_shrink(x, a, touched, bridge, *, launch, settled=False):
    """Compute what the kernel computes, all in plane 0 and the others zero; the slots without an expert are left alone."""
    for tile, experts in enumerate(touched.tolist()):
        rows = slice(tile * launch.tile_tokens, (tile + 1) * launch.tile_tokens)
        for slot, expert in enumerate(experts):
            if expert >= 0:
                bridge[:, slot, rows] = 0
                bridge[0, slot, rows] = x[rows].float() @ a[expert].float().T
    return bridge
