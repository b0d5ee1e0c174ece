"""Plain PyTorch reference of `kernels.lora_expand`; also the CPU backend's."""

from __future__ import annotations

from kernels.lora_plan import GROUPS, RANKS, ROW_COUNT, ROW_START, SLOT, TABLE_UNIT
from kernels.lora_shrink_ref import read_rows


def lora_expand_ref_(
    y,
    bridge,
    scales,
    pool,
    tiles,
    num_tiles,
    *,
    group,
    layer,
    widths,
    tile_tokens,
    splits,
    num_programs,
    tuning=None,
):
    """Compute what `lora_expand_` computes: y[t, columns of m] += scale[slot, m] · h[t] · B_m, in place."""
    first, last = GROUPS[group]
    for record in tiles[: int(num_tiles)].tolist():
        ranks = record[RANKS : RANKS + 7]
        rows = slice(record[ROW_START], record[ROW_START] + record[ROW_COUNT])
        column, bridge_column = 0, 0
        for module, width in zip(range(first, last), widths, strict=True):
            rank = ranks[module]
            if rank:
                b_first = layer * 2 * sum(ranks) + sum(ranks) + sum(ranks[:module])
                b = read_rows(pool, record[TABLE_UNIT], b_first, rank, width)
                h = bridge[:splits, rows, bridge_column : bridge_column + rank].sum(dim=0)
                part = y[rows, column : column + width]
                part.copy_(part.float() + scales[record[SLOT], module] * (h @ b.float()))
            column, bridge_column = column + width, bridge_column + rank
    return y
