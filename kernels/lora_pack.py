"""Random adapters laid out in a pool by the rule of docs/design.md, for tests and benchmarks.

The engine's own layout module applies the same rule to real adapters; this one exists so that `kernels/` can be tested alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kernels.lora_plan import (
    FIRST_B,
    LAYER_ROWS,
    RANKS,
    ROW_ALIGN_BYTES,
    SLOT,
    TABLE_UNIT,
    TILE_COLUMNS,
    a_row,
    b_row,
)

# (in, out) of q, k, v, o, gate, up, down of one Llama-3.1-8B layer.
LLAMA_8B = (
    (4096, 4096),
    (4096, 1024),
    (4096, 1024),
    (4096, 4096),
    (4096, 14336),
    (4096, 14336),
    (14336, 4096),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedAdapters:
    """A pool holding adapters, and what is needed to read them back."""

    pool: torch.Tensor  # [num_pages, page_elems]
    adapter_meta: np.ndarray  # int32 [adapters, 16], host
    ranks: tuple[tuple[int, ...], ...]  # ranks of the seven modules, for each adapter
    shapes: tuple[tuple[int, int], ...]  # (in, out) of the seven modules

    def a(self, adapter: int, layer: int, module: int) -> torch.Tensor:
        """Return A [rank, in] of one module, copied out of the pool."""
        return self._rows(adapter, a_row(self.ranks[adapter], layer, module), module, self.shapes[module][0])

    def b(self, adapter: int, layer: int, module: int) -> torch.Tensor:
        """Return B transposed [rank, out] of one module, copied out of the pool."""
        return self._rows(adapter, b_row(self.ranks[adapter], layer, module), module, self.shapes[module][1])

    def _rows(self, adapter: int, first: int, module: int, length: int) -> torch.Tensor:
        rank = self.ranks[adapter][module]
        start = int(self.adapter_meta[adapter, TABLE_UNIT]) * (ROW_ALIGN_BYTES // 4) + first
        entries = self.pool.view(torch.int32).view(-1)[start : start + rank].long()
        unit = ROW_ALIGN_BYTES // self.pool.element_size()
        columns = torch.arange(length, device=self.pool.device)
        return self.pool.view(-1)[entries[:, None] * unit + columns]


def pack_random(
    ranks: Sequence[Sequence[int]],
    *,
    shapes: Sequence[tuple[int, int]] = LLAMA_8B,
    num_layers: int = 1,
    dtype: torch.dtype = torch.float16,
    page_bytes: int = 2 << 20,
    device: str | torch.device = "cpu",
    seed: int = 0,
    scale: float = 0.05,
    poison: bool = False,
) -> PackedAdapters:
    """Place adapters of the given ranks on shuffled pages of a new pool and fill their rows with random numbers.

    ranks: for each adapter the ranks of q, k, v, o, gate, up, down. poison: everything that is no row is NaN (slow; small pools only).
    Raises ValueError if a row or an adapter's row table does not fit a page.
    """
    itemsize = torch.empty((), dtype=dtype).element_size()
    placed = [_place(r, shapes, num_layers, itemsize, page_bytes) for r in ranks]
    pages_each = [int(rows[-1, 0]) + 1 if len(rows) else 1 for rows in placed]
    order = np.random.default_rng(seed).permutation(sum(pages_each) + 1)
    generator = torch.Generator(device=device).manual_seed(seed)
    pool = torch.empty(len(order), page_bytes // itemsize, dtype=dtype, device=device)
    for (
        page
    ) in pool:  # page by page: a random fill of the whole pool at once would need its size again in fp32
        page.copy_(torch.randn(page.shape, generator=generator, device=device).mul_(scale))
    words = pool.view(torch.int32).view(-1)
    if poison:
        random, pool = pool.view(-1).clone(), pool.fill_(float("nan"))

    meta = np.zeros((len(ranks), TILE_COLUMNS), np.int32)
    used = 0
    for adapter, (rows, count) in enumerate(zip(placed, pages_each, strict=True)):
        pages = order[used : used + count].astype(np.int64)
        used += count
        starts = pages[rows[:, 0]] * page_bytes + rows[:, 1]
        table_at = int(pages[0]) * page_bytes
        words[table_at // 4 : table_at // 4 + len(rows)] = torch.from_numpy(
            (starts // ROW_ALIGN_BYTES).astype(np.int32)
        ).to(device)
        meta[adapter, [TABLE_UNIT, SLOT]] = table_at // ROW_ALIGN_BYTES, adapter
        meta[adapter, RANKS : RANKS + 7] = ranks[adapter]
        meta[adapter, [LAYER_ROWS, FIRST_B]] = 2 * sum(ranks[adapter]), sum(ranks[adapter])
        if poison:
            for start, length in zip(starts // itemsize, rows[:, 2], strict=True):
                pool.view(-1)[start : start + length] = random[start : start + length]
    return PackedAdapters(
        pool=pool, adapter_meta=meta, ranks=tuple(tuple(map(int, r)) for r in ranks), shapes=tuple(shapes)
    )


def _place(
    ranks: Sequence[int], shapes: Sequence[tuple[int, int]], num_layers: int, itemsize: int, page_bytes: int
) -> np.ndarray:
    """Return (page of the adapter, byte in that page, elements) for each of its rows, in the order of its row table."""
    layer = [shape[0] for r, shape in zip(ranks, shapes, strict=True) for _ in range(r)]
    layer += [shape[1] for r, shape in zip(ranks, shapes, strict=True) for _ in range(r)]
    lengths = layer * num_layers
    byte, page, rows = _aligned(4 * len(lengths)), 0, []
    if byte > page_bytes:
        raise ValueError(f"page_bytes(={page_bytes}) must hold the row table of {byte} bytes")
    for length in lengths:
        size = _aligned(length * itemsize)
        if size > page_bytes:
            raise ValueError(f"page_bytes(={page_bytes}) must hold a row of {size} bytes")
        if byte + size > page_bytes:
            page, byte = page + 1, 0
        rows.append((page, byte, length))
        byte += size
    return np.array(rows, np.int64).reshape(-1, 3)


def _aligned(size: int) -> int:
    return -(-size // ROW_ALIGN_BYTES) * ROW_ALIGN_BYTES
