"""Plain PyTorch reference of `kernels.lora_shrink`; also the CPU backend's."""

from __future__ import annotations

import torch

from kernels.lora_launch import ShrinkTuning
from kernels.lora_plan import GROUPS, RANKS, ROW_ALIGN_BYTES, ROW_COUNT, ROW_START, TABLE_UNIT


def lora_shrink_ref(
    x,
    pool,
    tiles,
    num_tiles,
    shrink_items,
    num_shrink_items,
    bridge,
    *,
    group,
    layer,
    tile_tokens,
    splits,
    num_programs,
    tuning=None,
):
    """Compute what `lora_shrink` computes: bridge planes whose sum is x · Aᵀ, here all in plane 0 and the others zero."""
    block_rows = (tuning or ShrinkTuning()).rank_block
    first, last = GROUPS[group]
    items = shrink_items[group, : int(num_shrink_items[group])].tolist()
    records = tiles[: int(num_tiles)].tolist()
    blocks: dict[int, list[int]] = {}
    for tile, block in items:
        blocks.setdefault(tile, []).append(block)
    for tile, tile_blocks in blocks.items():
        record = records[tile]
        ranks = record[RANKS : RANKS + 7]
        group_rows = sum(ranks[first:last])
        start_row = layer * 2 * sum(ranks) + sum(ranks[:first])
        rows = slice(record[ROW_START], record[ROW_START] + record[ROW_COUNT])
        a = read_rows(pool, record[TABLE_UNIT], start_row, group_rows, x.shape[1])
        h = x[rows].float() @ a.float().T
        for block in tile_blocks:
            low, high = block * block_rows, min((block + 1) * block_rows, bridge.shape[2])
            bridge[:splits, rows, low:high] = 0
            bridge[0, rows, low : min(high, group_rows)] = h[:, low:high]
    return bridge


def read_rows(pool: torch.Tensor, table_unit: int, first: int, count: int, length: int) -> torch.Tensor:
    """Gather `count` rows of `length` elements through an adapter's row table, from table index `first` on: [count, length]."""
    start = table_unit * (ROW_ALIGN_BYTES // 4) + first
    entries = pool.view(torch.int32).view(-1)[start : start + count].long()
    unit = ROW_ALIGN_BYTES // pool.element_size()
    units = -(-length // unit)
    columns = torch.arange(units, device=pool.device)
    return pool.view(-1, unit)[entries[:, None] + columns].view(count, units * unit)[:, :length]
