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
_GROUP_STARTS = [first for first, _ in GROUPS]

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
    starts, counts, slots = row_starts[live], row_counts[live], slots[live]
    tiles_each = (counts + np.int32(tile_tokens - 1)) // np.int32(tile_tokens)
    num_tiles = int(tiles_each.sum())
    if num_tiles > len(tiles_out):
        raise ValueError(f"tiles_out: {num_tiles} tiles do not fit its {len(tiles_out)} rows")
    if num_tiles == 0:
        return 0, [0] * NUM_GROUPS
    if num_tiles != len(live):
        segment, number = _unroll(tiles_each)
        offsets = number * np.int32(tile_tokens)
        starts, counts, slots = starts[segment] + offsets, counts[segment] - offsets, slots[segment]
    tiles = tiles_out[:num_tiles]
    tiles[:] = adapter_meta[slots]
    tiles[:, ROW_START] = starts
    np.minimum(counts, tile_tokens, out=tiles[:, ROW_COUNT])

    rows = np.add.reduceat(tiles[:, RANKS : RANKS + 7], _GROUP_STARTS, axis=1)
    block_rows = np.array(rank_blocks, np.int32)[:, None]
    blocks = ((rows.T + (block_rows - 1)) // block_rows).astype(np.int32, copy=False)  # [4, tiles]
    num_items = blocks.sum(axis=1).tolist()
    if max(num_items) > shrink_items_out.shape[1]:
        raise ValueError(
            f"shrink_items_out: {max(num_items)} items do not fit its {shrink_items_out.shape[1]} rows"
        )
    pairs = np.empty((sum(num_items), 2), np.int32)
    index, pairs[:, 1] = _unroll(blocks.ravel())
    start = 0
    for group, count in enumerate(num_items):
        np.subtract(index[start : start + count], group * num_tiles, out=pairs[start : start + count, 0])
        shrink_items_out[group, :count] = pairs[start : start + count]
        start += count
    return num_tiles, num_items


def _unroll(counts: Int32) -> tuple[NDArray, NDArray]:
    """Return (index, number) for number 0 … counts[index] − 1 of every index, in order: [2, 0, 1] gives 0 0 2 and 0 1 0."""
    firsts = np.cumsum(counts, dtype=np.int32) - counts
    index = np.repeat(_count_up(len(counts)), counts)
    return index, _count_up(len(index)) - firsts[index]


def _count_up(length: int) -> Int32:
    return np.arange(length, dtype=np.int32)


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
