"""Plain PyTorch reference of `kernels.lora_shrink`; also the CPU backend's."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.lora_plan import (
    ENTRIES_PER_UNIT,
    FIRST_ITEM,
    ITEM_ENTRIES,
    ITEM_ROW_START,
    ITEM_SIZES,
    ITEM_TABLE_UNIT,
    NUM_ITEMS,
    NUM_SPLITS,
    ROW_ALIGN_BYTES,
    SMALL_TILE,
)


def lora_shrink_ref(x, pool, headers, items, bridge, *, group, layer, tile_tokens, num_programs, tuning=None):
    """Compute what `lora_shrink` computes: bridge planes whose sum is x · Aᵀ, here all in plane 0 and the others zero."""
    header = headers[group].tolist()
    first = header[FIRST_ITEM]
    for item in items[first : first + header[NUM_ITEMS]].tolist():
        sizes = item[ITEM_SIZES]
        rows = slice(item[ITEM_ROW_START], item[ITEM_ROW_START] + (sizes & 255))
        columns = slice(sizes >> 16, (sizes >> 16) + (sizes >> 8 & 255))
        entry = item[ITEM_TABLE_UNIT] * ENTRIES_PER_UNIT + (item[ITEM_ENTRIES] & 0xFFFF)
        entry += layer * (item[ITEM_ENTRIES] >> 16)
        a = read_rows(pool, entry, sizes >> 8 & 255, x.shape[1])
        bridge[1 : header[NUM_SPLITS], rows, columns] = 0
        bridge[0, rows, columns] = product_of_tile(x[rows].float(), a.float().T)
    return bridge


def product_of_tile(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Return x @ w, each row the same bits however many rows there are: BLAS rounds products of other shapes otherwise, so whole tiles are taken."""
    padded = F.pad(x, (0, 0, 0, -len(x) % SMALL_TILE))
    return (padded @ w)[: len(x)]


def read_rows(pool: torch.Tensor, first: int, count: int, length: int) -> torch.Tensor:
    """Gather `count` rows of `length` elements through the row table at entries [first, first + count) of the pool: [count, length]."""
    entries = pool.view(torch.int32).view(-1)[first : first + count].long()
    unit = ROW_ALIGN_BYTES // pool.element_size()
    units = -(-length // unit)
    columns = torch.arange(units, device=pool.device)
    return pool.view(-1, unit)[entries[:, None] + columns].view(count, units * unit)[:, :length]
