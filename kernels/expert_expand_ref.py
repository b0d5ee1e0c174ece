"""Plain PyTorch reference of `kernels.expert_expand`; also the CPU backend's."""

from __future__ import annotations


def expert_expand_(y, bridge, b, dense, touched, *, rank, widths, targets, launch, settled=False):
    """Compute what the kernel computes, linear by linear."""
    for tile, experts in enumerate(touched.tolist()):
        rows = slice(tile * launch.tile_tokens, (tile + 1) * launch.tile_tokens)
        for slot, expert in enumerate(experts):
            if expert < 0:
                continue
            gate = dense[rows, expert, None]
            h = (bridge[:, slot, rows].sum(dim=0) * gate).where(gate != 0, 0)  # not 0 · ∞
            y_first = h_first = b_first = 0
            for width, is_target in zip(widths, targets, strict=True):
                if is_target:
                    factor = b[expert, b_first : b_first + rank * width].view(rank, width).float()
                    columns = y[rows, y_first : y_first + width]
                    columns.copy_((columns.float() + h[:, h_first : h_first + rank] @ factor).to(y.dtype))
                    h_first, b_first = h_first + rank, b_first + rank * width
                y_first += width
    return y
