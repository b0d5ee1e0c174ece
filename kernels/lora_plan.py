"""The work lists of the LoRA kernels, built on the host with numpy.

A *tile* is consecutive rows of one adapter: up to SMALL_TILE of them, or up to the launch's `tile_tokens` where a segment has more. A *shrink
item* is one tile times one block of a group's A rows; every item is cut into the same number of parts of `in`, chosen here from the number
of items, so that few items keep the GPU as busy as many. The kernels walk the lists up to lengths that they read from device memory, so
the lists are the only place where a batch's mix shows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kernels.lora_launch import LoraLaunch

MODULES = ("q", "k", "v", "o", "gate", "up", "down")
GROUPS = ((0, 3), (3, 4), (4, 6), (6, 7))  # modules of group g: [first, last); they share their input
NUM_GROUPS = len(GROUPS)
COLUMN_PARALLEL = (
    True,
    True,
    True,
    False,
    True,
    True,
    False,
)  # modules whose outputs tensor parallelism cuts; of the others, the inputs
_GROUP_STARTS = [first for first, _ in GROUPS]

# Columns of a tile record, and of a row of `adapter_meta`: ranks are rows of B; LAYER_ROWS are entries of the row table a layer, FIRST_B
# the first of them that is of B.
TABLE_UNIT, ROW_START, ROW_COUNT, SLOT, RANKS, LAYER_ROWS, FIRST_B = 0, 1, 2, 3, 4, 11, 12
TILE_COLUMNS = 16
ROW_ALIGN_BYTES = 128
ENTRIES_PER_UNIT = ROW_ALIGN_BYTES // 4

# Columns of a shrink item: where the adapter's row table is; its first A row in there as of layer 0 | entries from one layer to the next
# << 16; first row of the batch; and row count | A rows << 8 | first column of the bridge << 16.
ITEM_TABLE_UNIT, ITEM_ENTRIES, ITEM_ROW_START, ITEM_SIZES = 0, 1, 2, 3
ITEM_COLUMNS = 4

# Columns of a group's header.
FIRST_ITEM, NUM_ITEMS, SPLIT_K, NUM_SPLITS, ITEM_N = 0, 1, 2, 3, 4
HEADER_COLUMNS = 8

SMALL_TILE = 16  # rows of a tile of a short segment
RANK_BLOCK = 64  # most A rows of a shrink item
SPLIT_UNIT = 256  # a part of `in` is a multiple of this many elements
PART_START = 512
COLUMN_UNIT = 256  # and the columns of an expand item of this many
MOST_COLUMN_UNITS = 4

Int32 = NDArray[np.int32]


def plan_lora(
    slots: Int32,
    row_starts: Int32,
    row_counts: Int32,
    adapter_meta: Int32,
    *,
    launches: Sequence[LoraLaunch],
    in_features: Sequence[int],
    widths: Sequence[Sequence[int]],
    shards: int = 1,
    tiles_out: Int32,
    headers_out: Int32,
    items_out: Int32,
) -> tuple[int, int]:
    """Cut segments into tiles and shrink items; return (number of tiles, number of shrink items of all groups).

    slots, row_starts, row_counts: int32 [n], one entry a segment; a negative slot is base-only and gets no tile, nor does an empty one.
    adapter_meta: int32 [max_slots, 16], columns (table_unit, 0, 0, slot, r_q … r_down, rows a layer, first row of B, 0…). launches,
    in_features, widths (`out` of the modules): of the four groups. shards: GPUs that the A rows of qkv and gate_up are spread over, under
    S-LoRA's tensor parallelism; this one has 1/shards of each module's, rounded up.
    tiles_out: int32 [tile capacity, 16] and items_out: int32 [item capacity, 4], filled from their start, the rest untouched.
    headers_out: int32 [4, 8], (first item, items, elements of a part, parts, columns of an expand item, 0…) of each group.
    Raises ValueError when a capacity is too small.
    """
    headers_out[:] = 0
    headers_out[:, SPLIT_K] = SPLIT_UNIT
    headers_out[:, NUM_SPLITS] = 1
    headers_out[:, ITEM_N] = COLUMN_UNIT
    live = np.flatnonzero((slots >= 0) & (row_counts > 0))
    starts, counts, slots = row_starts[live], row_counts[live], slots[live]
    most = np.int32(launches[0].tile_tokens)
    tiles_each = (counts + (most - np.int32(1))) // most
    num_tiles = int(tiles_each.sum())
    if num_tiles > len(tiles_out):
        raise ValueError(f"tiles_out: {num_tiles} tiles do not fit its {len(tiles_out)} rows")
    if num_tiles == 0:
        return 0, 0
    if num_tiles != len(live):
        segment, number = _unroll(tiles_each)
        offsets = number * most
        starts, counts, slots = starts[segment] + offsets, counts[segment] - offsets, slots[segment]
    tiles = tiles_out[:num_tiles]
    tiles[:] = adapter_meta[slots]
    tiles[:, ROW_START] = starts
    np.minimum(counts, most, out=tiles[:, ROW_COUNT])
    for header, launch, group_widths in zip(headers_out, launches, widths, strict=True):
        header[ITEM_N] = _item_columns(num_tiles, launch, group_widths)
    return num_tiles, _plan_items(tiles, launches, in_features, shards, headers_out, items_out)


def _plan_items(
    tiles: Int32,
    launches: Sequence[LoraLaunch],
    in_features: Sequence[int],
    shards: int,
    headers_out: Int32,
    items_out: Int32,
) -> int:
    num_tiles = len(tiles)
    ranks = tiles[:, RANKS : RANKS + 7]
    if shards > 1:
        divisors = np.array([shards if column else 1 for column in COLUMN_PARALLEL], np.int32)
        ranks = -(-ranks // divisors)
    group_rows = np.add.reduceat(ranks, _GROUP_STARTS, axis=1).T  # [4, tiles]
    group_ends = np.cumsum(group_rows, axis=0, dtype=np.int32)
    blocks = (group_rows + np.int32(RANK_BLOCK - 1)) // np.int32(RANK_BLOCK)
    counts = blocks.sum(axis=1)
    total = int(counts.sum())
    if total > len(items_out):
        raise ValueError(f"items_out: {total} items do not fit its {len(items_out)} rows")
    headers_out[:, NUM_ITEMS] = counts
    headers_out[1:, FIRST_ITEM] = np.cumsum(counts[:-1])
    for header, launch, width in zip(headers_out, launches, in_features, strict=True):
        header[SPLIT_K], header[NUM_SPLITS] = _parts_of(int(header[NUM_ITEMS]), launch, width)

    index, number = _unroll(blocks.ravel())  # index: group · tiles + tile
    tile = index % num_tiles
    low = number * np.int32(RANK_BLOCK)
    before = (group_ends - group_rows).ravel()
    live_rows = np.minimum(RANK_BLOCK, group_rows.ravel()[index] - low)
    items = items_out[:total]
    items[:, ITEM_TABLE_UNIT] = tiles[tile, TABLE_UNIT]
    items[:, ITEM_ENTRIES] = (before[index] + low) | (tiles[tile, LAYER_ROWS] << 16)
    items[:, ITEM_ROW_START] = tiles[tile, ROW_START]
    items[:, ITEM_SIZES] = tiles[tile, ROW_COUNT] | (live_rows << 8) | (low << 16)
    return total


def _parts_of(num_items: int, launch: LoraLaunch, width: int) -> tuple[int, int]:
    """Return (elements of a part of `in`, parts): what takes the programs the least time, a part's start costing PART_START elements."""
    best = (float("inf"), SPLIT_UNIT, 1)
    for parts in range(1, launch.max_splits + 1):
        split_k = -(-width // (parts * SPLIT_UNIT)) * SPLIT_UNIT
        waves = -(-num_items * -(-width // split_k) // launch.shrink_programs)
        best = min(best, (waves * (split_k + PART_START), split_k, -(-width // split_k)))
    return best[1], best[2]


def _item_columns(num_tiles: int, launch: LoraLaunch, widths: Sequence[int]) -> int:
    """Return the columns of an expand item such that items are about one for each program, or few enough to share evenly."""
    units = num_tiles * sum(-(-width // COLUMN_UNIT) for width in widths)
    return COLUMN_UNIT * min(MOST_COLUMN_UNITS, -(-units // launch.expand_programs))


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


def max_shrink_items(max_tile_count: int, max_rank: int) -> int:
    """Return the most shrink items of all groups together, when every module's rank is at most `max_rank`."""
    return max_tile_count * sum(-(-(last - first) * max_rank // RANK_BLOCK) for first, last in GROUPS)


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
