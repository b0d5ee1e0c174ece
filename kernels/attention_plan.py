"""Work lists of the attention kernels, made on the host with numpy for each step."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

MIN_CHUNK_TOKENS = (
    256  # A shorter chunk would spend more on its start and its partial result than on its K and V.
)

Int32Array = NDArray[np.int32]


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
    for name, value, least in (
        ("page_tokens", page_tokens, 1),
        ("target_items", target_items, 1),
        ("max_partials", max_partials, 0),
    ):
        if value < least:
            raise ValueError(f"{name}(={value}) must be >= {least}")
    lens = np.asarray(kv_lens, dtype=np.int64)
    if lens.ndim != 1 or (lens.size and lens.min() < 0):
        raise ValueError("kv_lens must be a vector of numbers >= 0")
    chunk, pieces = _split(lens, page_tokens, max_partials, target_items)

    row = np.repeat(np.arange(lens.size), pieces)
    ends = np.cumsum(pieces)
    kv_start = (np.arange(row.size) - (ends - pieces)[row]) * chunk[row]
    kv_end = np.minimum(kv_start + chunk[row], lens[row])
    is_split = pieces > 1
    partial = np.where(is_split[row], np.cumsum(is_split[row]) - 1, -1)
    order = np.argsort(kv_start - kv_end, kind="stable")
    items = _fill(
        None if out is None else out[0], "items", (row[order], kv_start[order], kv_end[order], partial[order])
    )

    split_row = np.flatnonzero(is_split)
    count = pieces[split_row]
    combine = _fill(
        None if out is None else out[1], "combine", (split_row, np.cumsum(count) - count, count, 0)
    )
    return items, combine


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
    return _fill(out, "items", tuple(column[order] for column in columns))


def prefill_block_q(num_heads: int, num_kv_heads: int, *, tile_rows: int = 128) -> int:
    """Rows of a prefill item such that rows × query heads of a KV head, padded to a power of two, make a
    tile of `tile_rows`."""
    group = num_heads // num_kv_heads
    return max(1, tile_rows // (1 << (group - 1).bit_length()))


def _split(
    lens: NDArray[np.int64], page_tokens: int, max_partials: int, target_items: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Chunk length and number of chunks of each row."""
    total = int(lens.sum())
    share = max(MIN_CHUNK_TOKENS, total / target_items)
    pieces = _pieces(lens, share)
    if int(pieces[pieces > 1].sum()) > max_partials:
        # p > 1 chunks come from at least p − 1/2 shares, so split rows make at most 4/3 · total / share
        # chunks.
        share = 4 / 3 * total / max_partials if max_partials else float(total + 1)
        pieces = _pieces(lens, share)
    chunk = np.maximum(1, -(-lens // np.maximum(pieces, 1)))
    chunk = -(-chunk // page_tokens) * page_tokens
    return chunk, -(-lens // chunk)


def _pieces(lens: NDArray[np.int64], share: float) -> NDArray[np.int64]:
    rounded = (lens / share + 0.5).astype(np.int64)
    return np.maximum(np.minimum(rounded, lens // MIN_CHUNK_TOKENS), lens > 0)


def _fill(out: Int32Array | None, name: str, columns: Sequence[NDArray[np.int64] | int]) -> Int32Array:
    first = columns[0]
    assert isinstance(first, np.ndarray)
    if out is None:
        out = np.empty((first.size, 4), dtype=np.int32)
    elif first.size > len(out):
        raise ValueError(f"out: {name} needs {first.size} entries, has room for {len(out)}")
    filled = out[: first.size]
    for index, column in enumerate(columns):
        filled[:, index] = column
    return filled
