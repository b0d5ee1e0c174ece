"""One step as the GPU sees it: every index that the kernels need, in one int32 buffer that travels in one copy.

`BatchLayout` says where things lie for a padded token count; the same layout gives numpy views of the pinned host buffer and tensor views of
the device buffer, so that a captured graph always reads the same addresses.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engine.budget import ATTENTION_PARTIAL_ROWS
from kernels.attention_plan import prefill_block_q
from kernels.lora_launch import LoraLaunch, lora_launch_config
from kernels.lora_plan import (
    FIRST_ITEM,
    HEADER_COLUMNS,
    ITEM_COLUMNS,
    NUM_GROUPS,
    NUM_ITEMS,
    TILE_COLUMNS,
    max_shrink_items,
    max_tiles,
)
from kernels.sample_params import PARAM_COLUMNS

Int32 = NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLimits:
    """What bounds a batch on one rank. max_rank: the largest adapter rank (0: no adapters); in_features, widths (of the
    modules): of the four LoRA groups; lora_shards: GPUs over which A's rows of column-parallel modules are spread. num_dynamic: dynamic adapters."""

    max_num_seqs: int
    max_rank: int
    num_heads: int
    num_kv_heads: int
    in_features: tuple[int, int, int, int]
    widths: tuple[tuple[int, ...], ...]
    lora_shards: int = 1
    num_dynamic: int = 0


@dataclass(frozen=True, slots=True)
class BatchLayout:
    """Regions of the buffer for steps padded to `tokens` rows: where each starts, and its shape; `size` is of all, in int32."""

    limits: BatchLimits
    tokens: int
    regions: dict[str, tuple[int, tuple[int, ...]]]
    size: int
    block_q: int
    lora: tuple[LoraLaunch, ...]

    @property
    def tile_tokens(self) -> int:
        return self.lora[0].tile_tokens

    def views(self, buffer: Any) -> dict[str, Any]:
        """Return the regions of a flat int32 array or tensor, each in its shape."""
        return {name: _cut(buffer, start, shape) for name, (start, shape) in self.regions.items()}

    def used_size(self, buffer: Int32) -> int:
        """Return how much of the buffer, from its start, a step fills: all but the tail of the shrink items, the last region."""
        start, _ = self.regions["lora_items"]
        header_start, shape = self.regions["lora_headers"]
        last = _cut(buffer, header_start, shape)[-1]
        return start + int(last[FIRST_ITEM] + last[NUM_ITEMS]) * ITEM_COLUMNS


def _cut(buffer: Any, start: int, shape: tuple[int, ...]) -> Any:
    size = int(np.prod(shape))
    return buffer[start : start + size].reshape(shape)


def batch_layout(tokens: int, limits: BatchLimits) -> BatchLayout:
    """Lay out the buffer for steps of `tokens` padded rows."""
    samples = min(tokens, limits.max_num_seqs)
    lora = tuple(lora_launch_config(tokens, group) for group in range(NUM_GROUPS))
    tile_tokens = lora[0].tile_tokens
    tiles = max_tiles(tokens, limits.max_num_seqs, tile_tokens) if limits.max_rank else 1
    items = max_shrink_items(tiles, max(limits.max_rank, 1))
    block_q = prefill_block_q(limits.num_heads, limits.num_kv_heads)
    shapes: dict[str, tuple[int, ...]] = {
        "host_tokens": (tokens,),
        "positions": (tokens,),
        "sequence_slots": (tokens,),
        "sample_rows": (samples,),
        "sample_slots": (samples,),
        "sample_params": (samples, PARAM_COLUMNS),
        "num_tiles": (1,),
        "lora_headers": (NUM_GROUPS, HEADER_COLUMNS),
        "num_decode_items": (1,),
        "num_combine": (1,),
        "num_prefill_items": (1,),
        "tiles": (tiles, TILE_COLUMNS),
        "decode_items": (samples + ATTENTION_PARTIAL_ROWS, 4),
        "combine": (ATTENTION_PARTIAL_ROWS // 2, 4),
        "prefill_items": (samples + tokens // block_q, 4),
        **({"expert_rows": (limits.num_dynamic, tokens)} if limits.num_dynamic else {}),
        "lora_items": (items, ITEM_COLUMNS),  # last, so that only its head need travel
    }
    regions: dict[str, tuple[int, tuple[int, ...]]] = {}
    start = 0
    for name, shape in shapes.items():
        regions[name] = (start, shape)
        start += -(-int(np.prod(shape)) // 32) * 32  # regions start at 128 bytes
    return BatchLayout(limits, tokens, regions, start, block_q, lora)


@dataclass(slots=True)
class DeviceBatch:
    """The device views that one forward pass reads; `decode_only`, `with_lora` and `with_experts` leave out what such steps do not need."""

    layout: BatchLayout
    views: dict[str, torch.Tensor]
    decode_only: bool
    with_lora: bool
    with_experts: bool = False


@dataclass(slots=True)
class PageUpdates:
    """Entries of the device's page table to change: flat index and page."""

    index: list[int] = field(default_factory=list)
    page: list[int] = field(default_factory=list)

    def add_row(self, row_start: int, pages: list[int]) -> None:
        """Write a whole row of the table from its start."""
        self.index.extend(range(row_start, row_start + len(pages)))
        self.page.extend(pages)

    def add(self, index: int, page: int) -> None:
        self.index.append(index)
        self.page.append(page)
