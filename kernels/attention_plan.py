"""Work lists of the attention kernels, made on the host with numpy for each step."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# A shorter chunk would spend more on its start and its partial result than on its K and V.
MIN_CHUNK_TOKENS = 256

Int32Array = NDArray[np.int32]
Int64Array = NDArray[np.int64]


def plan_decode_attention(
    kv_lens: NDArray[np.integer],
    *,
    page_tokens: int,
    max_partials: int,
    target_items: int,
    out: tuple[Int32Array, Int32Array] | None = None,
) -> tuple[Int32Array, Int32Array]:
    """Split the KV ranges of decode rows into about `target_items` work items of similar length.

    kv_lens: [rows], tokens that row i attends to, its own included; 0: the row gets no item. A row is split
    into equal chunks of whole pages, each at least 256 tokens long (the last takes what is left), when it is
    longer than 1.5 times the mean share of an item; the split is coarser where `max_partials` demands it.
    `target_items`: programs / kv_heads keeps every program busy.

    Returns items [n, 4] (row, kv_start, kv_end, partial), longest first, and combine [m, 4] (row,
    first_partial, count, 0), both int32 and described in docs/design.md; n <= rows + max_partials, 2m <=
    max_partials. With `out`, two int32 arrays [cap, 4], they are views of its first rows. Raises ValueError
    where an argument is out of range or `out` too short.
    """
    if page_tokens < 1 or target_items < 1 or max_partials < 0:
        raise ValueError(
            f"page_tokens(={page_tokens}) and target_items(={target_items}) must be > 0, "
            f"max_partials(={max_partials}) must be >= 0"
        )
    lens = np.asarray(kv_lens, dtype=np.int64)
    if lens.ndim != 1 or (lens.size and int(lens.min()) < 0):
        raise ValueError("kv_lens must be a vector of numbers >= 0")
    items_out, combine_out = (None, None) if out is None else out
    pieces, chunk = _split(lens, page_tokens, max_partials, target_items)
    if pieces is None or chunk is None:  # The common step: many rows of like length, none to split.
        order = np.argsort(-lens, kind="stable")[: np.count_nonzero(lens)]
        items = _fill(items_out, "items", order.size, (order, 0, lens[order], -1))
        return items, _fill(combine_out, "combine", 0, ())

    row = np.repeat(np.arange(lens.size), pieces)
    ends = np.cumsum(pieces)
    kv_start = (np.arange(row.size) - (ends - pieces)[row]) * chunk[row]
    kv_end = np.minimum(kv_start + chunk[row], lens[row])
    is_split = (pieces > 1)[row]
    partial = np.where(is_split, np.cumsum(is_split) - 1, -1)
    order = np.argsort(kv_start - kv_end, kind="stable")
    items = _fill(items_out, "items", row.size, (row[order], kv_start[order], kv_end[order], partial[order]))
    split_row = np.flatnonzero(pieces > 1)
    count = pieces[split_row]
    split = (split_row, np.cumsum(count) - count, count, 0)
    return items, _fill(combine_out, "combine", split_row.size, split)


def plan_prefill_attention(
    chunks: Sequence[tuple[int, int, int, int]], block_q: int, *, out: Int32Array | None = None
) -> Int32Array:
    """Cut prefill chunks into items of at most `block_q` rows, those with the longest KV first.

    chunks: (row_start, length, first_position, sequence_slot) each.
    Returns items [n, 4] int32, (row_start, row_count, first_position, sequence_slot); with `out`, an int32
    array [cap, 4], a view of its first rows. Raises ValueError where `out` is too short.
    """
    if block_q < 1:
        raise ValueError(f"block_q(={block_q}) must be > 0")
    table = np.asarray(chunks, dtype=np.int64).reshape(-1, 4)
    if table.size and table[:, 1].min() < 0:
        raise ValueError("chunks must have lengths >= 0")
    pieces = -(-table[:, 1] // block_q)
    row_start, length, first_position, slot = np.repeat(table, pieces, axis=0).T
    offset = (np.arange(slot.size) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * block_q
    row_count = np.minimum(block_q, length - offset)
    order = np.argsort(-(first_position + offset + row_count), kind="stable")
    columns = (row_start + offset, row_count, first_position + offset, slot)
    return _fill(out, "items", slot.size, [column[order] for column in columns])


def prefill_block_q(num_heads: int, num_kv_heads: int, *, tile_rows: int = 128) -> int:
    """Rows of a prefill item such that rows × query heads of a KV head, padded to a power of two, make a
    tile of `tile_rows`."""
    group = num_heads // num_kv_heads
    return max(1, tile_rows // (1 << (group - 1).bit_length()))


def _split(
    lens: Int64Array, page_tokens: int, max_partials: int, target_items: int
) -> tuple[Int64Array, Int64Array] | tuple[None, None]:
    """Number of chunks and chunk length of each row; (None, None) if no row is split."""
    total, longest = int(lens.sum()), int(lens.max(initial=0))
    share = max(MIN_CHUNK_TOKENS, total / target_items)
    if longest < max(1.5 * share, 2 * MIN_CHUNK_TOKENS) or max_partials < 2:
        return None, None
    pieces = _pieces(lens, share)
    if int(pieces.sum()) > target_items:  # a few items more than programs would take as long as twice as many
        pieces = _pieces(lens, share, rounding=0.0)
    if int(pieces[pieces > 1].sum()) > max_partials:
        # p > 1 chunks come from at least p − 1/2 shares: split rows make at most 4/3 · total / share chunks.
        pieces = _pieces(lens, 4 / 3 * total / max_partials)
    chunk = -(-lens // np.maximum(pieces, 1))
    chunk = np.maximum(-(-chunk // page_tokens) * page_tokens, 1)
    return -(-lens // chunk), chunk


def _pieces(lens: Int64Array, share: float, *, rounding: float = 0.5) -> Int64Array:
    rounded = (lens / share + rounding).astype(np.int64)
    return np.maximum(np.minimum(rounded, lens // MIN_CHUNK_TOKENS), lens > 0)


def _fill(out: Int32Array | None, name: str, size: int, columns: Sequence[Int64Array | int]) -> Int32Array:
    if out is None:
        out = np.empty((size, 4), dtype=np.int32)
    elif size > len(out):
        raise ValueError(f"out: {name} needs {size} entries, has room for {len(out)}")
    filled = out[:size]
    for index, column in enumerate(columns):
        filled[:, index] = column
    return filled
