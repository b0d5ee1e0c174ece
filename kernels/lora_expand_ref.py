"""Plain PyTorch reference of `kernels.lora_expand`; also the CPU backend's."""

from __future__ import annotations

from kernels.lora_plan import (
    ENTRIES_PER_UNIT,
    FIRST_B,
    GROUPS,
    LAYER_ROWS,
    NUM_SPLITS,
    RANKS,
    ROW_COUNT,
    ROW_START,
    SLOT,
    TABLE_UNIT,
)
from kernels.lora_shrink_ref import product_of_tile, read_rows


def lora_expand_ref_(
    y, bridge, scales, pool, tiles, num_tiles, headers, *, group, layer, widths, tile_tokens, num_programs, tuning=None,
    summed=False,
):  # fmt: skip
    """Compute what `lora_expand_` computes: y[t, columns of m] += scale[slot, m] · h[t] · B_m, in place."""
    first, last = GROUPS[group]
    splits = 1 if summed else int(headers[group, NUM_SPLITS])
    for record in tiles[: int(num_tiles)].tolist():
        ranks = record[RANKS : RANKS + 7]
        table = record[TABLE_UNIT] * ENTRIES_PER_UNIT
        rows = slice(record[ROW_START], record[ROW_START] + record[ROW_COUNT])
        column, bridge_column = 0, 0
        for module, width in zip(range(first, last), widths, strict=True):
            rank = ranks[module]
            if rank:
                b_first = table + layer * record[LAYER_ROWS] + record[FIRST_B] + sum(ranks[:module])
                b = read_rows(pool, b_first, rank, width)
                h = bridge[:splits, rows, bridge_column : bridge_column + rank].sum(dim=0)
                part = y[rows, column : column + width]
                part.copy_(part.float() + scales[record[SLOT], module] * product_of_tile(h, b.float()))
            column, bridge_column = column + width, bridge_column + rank
    return y
