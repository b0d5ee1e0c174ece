"""The work lists of the LoRA kernels, built on the host with numpy.

A *tile* is up to `tile_tokens` consecutive rows of one adapter. A *shrink item* is one tile times one block of a group's A rows. The
kernels walk both lists up to lengths that they read from device memory, so the lists here are the only place where a batch's mix shows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

MODULES = ("q", "k", "v", "o", "gate", "up", "down")
GROUPS = ((0, 3), (3, 4), (4, 6), (6, 7))  # modules of group g: [first, last); they share their input
NUM_GROUPS = len(GROUPS)

# Columns of a tile record, and of a row of `adapter_meta`.
TABLE_UNIT, ROW_START, ROW_COUNT, SLOT, RANKS = 0, 1, 2, 3, 4
TILE_COLUMNS = 16
ROW_ALIGN_BYTES = 128

Int32 = NDArray[np.int32]


def plan_lora(
    slots: Int32,
    row_starts: Int32,
    row_counts: Int32,
    adapter_meta: Int32,
    *,
    tile_tokens: int,
    tiles_out: Int32,
    shrink_items_out: Int32,
    rank_blocks: Sequence[int] = (16, 16, 16, 16),
) -> tuple[int, list[int]]:
    """Cut segments into tiles and shrink items; return (number of tiles, number of shrink items of each group).

    slots, row_starts, row_counts: int32 [n], one entry a segment; a negative slot is base-only and gets no tile, nor does an empty one.
    adapter_meta: int32 [max_slots, 16], columns (table_unit, 0, 0, slot, r_q … r_down, 0…).
    tiles_out: int32 [tile capacity, 16]; shrink_items_out: int32 [4, item capacity, 2]; both filled from their start, the rest untouched.
    rank_blocks: A rows in one shrink item, for each group; must be what `lora_shrink` is launched with.
    Raises ValueError when a capacity is too small.
    """
    live = np.flatnonzero((slots >= 0) & (row_counts > 0))
    starts, counts = row_starts[live], row_counts[live]
    tiles_each = (counts + (tile_tokens - 1)) // tile_tokens
    ends = np.cumsum(tiles_each)
    num_tiles = int(ends[-1]) if len(ends) else 0
    if num_tiles > len(tiles_out):
        raise ValueError(f"tiles_out: {num_tiles} tiles do not fit its {len(tiles_out)} rows")
    if num_tiles == 0:
        return 0, [0] * NUM_GROUPS

    offsets = np.arange(num_tiles, dtype=np.int32)
    segment = slice(None)
    if num_tiles != len(live):
        segment = np.repeat(np.arange(len(live)), tiles_each)
        offsets = (offsets - (ends - tiles_each)[segment]) * tile_tokens
    else:
        offsets = np.int32(0)
    tiles = tiles_out[:num_tiles]
    tiles[:] = adapter_meta[slots[live][segment]]
    tiles[:, ROW_START] = starts[segment] + offsets
    tiles[:, ROW_COUNT] = np.minimum(counts[segment] - offsets, tile_tokens)

    num_items = []
    for group, (first, last) in enumerate(GROUPS):
        rows = tiles[:, RANKS + first : RANKS + last].sum(axis=1)
        num_items.append(_fill_items(rows, rank_blocks[group], shrink_items_out[group]))
    return num_tiles, num_items


def _fill_items(rows: NDArray, rank_block: int, out: Int32) -> int:
    """Write (tile, block) for every block of every tile; return how many."""
    blocks = (rows + (rank_block - 1)) // rank_block
    ends = np.cumsum(blocks)
    total = int(ends[-1])
    if total > len(out):
        raise ValueError(f"shrink_items_out: {total} items do not fit its {len(out)} rows")
    tile = np.repeat(np.arange(len(rows)), blocks)
    out[:total, 0] = tile
    out[:total, 1] = np.arange(total) - (ends - blocks)[tile]
    return total


def max_tiles(max_rows: int, max_segments: int, tile_tokens: int) -> int:
    """Return the most tiles that `max_rows` rows in at most `max_segments` segments can be cut into."""
    segments = min(max_rows, max_segments)
    return segments + (max_rows - segments) // tile_tokens


def max_shrink_items(max_tile_count: int, max_rank: int, rank_block: int = 16) -> int:
    """Return the most shrink items of any group, when every module's rank is at most `max_rank`."""
    largest = max(last - first for first, last in GROUPS)
    return max_tile_count * -(-largest * max_rank // rank_block)


def bridge_width(max_rank: int) -> int:
    """Return the columns that the bridge needs: the A rows of the largest group, padded to 16."""
    largest = max(last - first for first, last in GROUPS)
    return -(-largest * max_rank // 16) * 16


def a_row(ranks: Sequence[int], layer: int, module: int) -> int:
    """Return the index in an adapter's row table of `module`'s first A row."""
    return layer * 2 * sum(ranks) + sum(ranks[:module])


def b_row(ranks: Sequence[int], layer: int, module: int) -> int:
    """Return the index in an adapter's row table of `module`'s first B row."""
    return a_row(ranks, layer, module) + sum(ranks)
