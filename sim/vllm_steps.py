"""What a step of vLLM is made of: the facts of it that cost time, each with one coefficient.

The LoRA kernels' grids are vLLM's own (0.8.5, `lora_shrink` and `lora_expand` in `vllm/lora/ops/triton_ops/`): every linear launches a block for each
slot, tile of tokens and tile of columns, whether or not the slot's adapter has a token in the batch; those without one read one number and end.
So a step pays for the number of slots, and more so the more tokens it has. The shrink splits its sum 64-fold below 128 tokens, else 8-fold.

Token counts are those of the CUDA graph that runs (sizes 1, 2, 4 and multiples of 8, `max_graph_tokens` at most), beyond it their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from engine.model_shape import GROUPS, ModelShape

Floats = NDArray[np.float64]

# Tiles of vLLM 0.8.5's kernels: rows and columns of shrink and expand, how often the shrink splits its sum, and from how many rows on seldom.
SHRINK_ROWS, SHRINK_COLUMNS = 32, 16
EXPAND_ROWS, EXPAND_COLUMNS = 64, 128
SPLITS_FEW, SPLITS_MANY, MANY_ROWS = 64, 8, 128
EXTRA_VOCABULARY = 256  # `lora_extra_vocab_size`, on top of the model's own

# Bends of the base model's time over tokens: the tile of its matrix products, the end of CUDA graphs, and where products become bound by arithmetic.
TOKEN_KNOTS = (0, 128, 256, 512, 600, 640, 1024)

TERMS = (
    "step",
    *(f"tokens_from_{knot}" for knot in TOKEN_KNOTS),
    "rows",
    "kv_tokens",
    "lora",
    "slot_blocks_few",
    "slot_blocks_many",
    "adapters_few",
    "adapters_many",
    "adapter_blocks",
    "adapter_tiles",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFacts:
    """A step. tokens: of all kinds; prompt_tokens: those among them of prompts; rows: whose next token is sampled; kv_tokens: Σ attended to.

    adapters: distinct ones; slots: `max_loras`, 0 where LoRA is off; rank: `max_lora_rank`.
    """

    tokens: float
    rows: float
    kv_tokens: float
    prompt_tokens: float = 0.0
    adapters: float = 0.0
    slots: int = 0
    rank: int = 8


@dataclass(frozen=True, kw_only=True)
class KernelGrid:
    """How many blocks the LoRA kernels launch for each slot, on one of `tp` GPUs."""

    model: ModelShape
    rank: int
    tp: int = 1
    max_graph_tokens: int = 512

    def padded(self, tokens: float) -> int:
        """Return the tokens that a step runs with."""
        count = max(1, round(tokens))
        if count > self.max_graph_tokens:
            return count
        return next((size for size in (1, 2, 4) if count <= size), -(-count // 8) * 8)

    def layer_blocks(self, padded: int) -> float:
        """Return the blocks a slot of all layers and of the embedding at so many tokens."""
        tiles = -(-padded // EXPAND_ROWS)
        layer = self._shrinks(padded) * len(_MODULES) + tiles * self._expand_columns
        return self.model.num_layers * layer + tiles * _tiles(self.model.hidden_size, EXPAND_COLUMNS)

    def head_blocks(self, rows: float) -> float:
        """Return the blocks a slot of the head where so many rows are sampled."""
        vocabulary = _tiles((self.model.vocab_size + EXTRA_VOCABULARY) // self.tp, EXPAND_COLUMNS)
        count = max(1, round(rows))
        return self._shrinks(count) + -(-count // EXPAND_ROWS) * vocabulary

    def _shrinks(self, rows: int) -> int:
        splits = SPLITS_FEW if rows < MANY_ROWS else SPLITS_MANY
        return splits * -(-rows // SHRINK_ROWS) * _tiles(self.rank, SHRINK_COLUMNS)

    @cached_property
    def _expand_columns(self) -> int:
        """Column tiles of the seven expands; linears that share an input launch the widest one's for each."""
        shapes = self.model.linear_shapes(self.tp)
        return sum(
            len(group) * _tiles(max(shapes[module][0] for module in group), EXPAND_COLUMNS)
            for group in GROUPS
        )


_MODULES = tuple(module for group in GROUPS for module in group)


def terms(facts: StepFacts, grid: KernelGrid) -> Floats:
    """Return how much of each of TERMS a step has; its time is their product with the coefficients."""
    padded = grid.padded(facts.tokens)
    return np.array(
        [1.0, *token_terms(padded), facts.rows, facts.kv_tokens, *_lora_terms(facts, grid, padded)]
    )


def token_terms(padded: float) -> list[float]:
    """Return the tokens between each two knots."""
    ends = (*TOKEN_KNOTS[1:], np.inf)
    return [min(max(padded - low, 0.0), high - low) for low, high in zip(TOKEN_KNOTS, ends, strict=True)]


def adapter_tiles(decode_rows: float, prompt_tokens: float, adapters: float) -> float:
    """Return the tiles of tokens that adapters need beyond one each."""
    return prompt_tokens / SHRINK_ROWS + max(0.0, decode_rows / SHRINK_ROWS - adapters)


def _lora_terms(facts: StepFacts, grid: KernelGrid, padded: int) -> list[float]:
    if not facts.slots:
        return [0.0] * 7
    layers, head = grid.layer_blocks(padded), grid.head_blocks(facts.rows)
    few, few_rows = padded < MANY_ROWS, round(facts.rows) < MANY_ROWS
    slots = facts.slots + 1  # one more stands for tokens without an adapter
    return [
        1.0,
        slots * (layers * few + head * few_rows),
        slots * (layers * (not few) + head * (not few_rows)),
        facts.adapters * few,
        facts.adapters * (not few),
        facts.adapters * (layers + head),
        adapter_tiles(facts.tokens - facts.prompt_tokens, facts.prompt_tokens, facts.adapters),
    ]


def _tiles(size: int, tile: int) -> int:
    return -(-size // tile)
