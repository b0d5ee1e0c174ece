"""What one step of the engine does, and the facts of it that cost time.

A `Step` is what the scheduler planned; its `StepShape` is what the runner records, the profiler measures and the cost model prices. Both are
values: nobody changes a shape, a chunk or a load once it is made. They are not `frozen`, as a simulation makes one a step and a frozen dataclass
takes 3.2 µs to make instead of 0.4 (13 fields, Python 3.11); nor can a frozen one be sent to another process when it is compiled. `__init__` is
written out in what a simulation makes all the time: one that `dataclass` makes stays interpreted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from engine.sequence import Sequence


@dataclass(slots=True, unsafe_hash=True, init=False)
class StepShape:
    """The cost-relevant facts of a step; counts are of this rank.

    decode_rows: sequences that decode one token; decode_kv_tokens: Σ of the KV tokens they attend to, the new one included;
    decode_kv_max: the longest of them.
    prefill_tokens, prefill_chunks: tokens and chunks of prompts; prefill_pairs: Σ over chunks of (query, key) pairs under the causal
    mask; prefill_kv_tokens: Σ of the KV tokens that chunks attend to; prefill_kv_max: the most that one does.
    sample_rows: rows whose next token is sampled.
    lora_tokens: tokens with an adapter; lora_adapters: distinct adapters; lora_bytes: Σ weight bytes of the distinct adapters;
    lora_single_bytes: of those among them that have one decode row (their tiles take a path of their own through the kernels);
    lora_token_bytes: Σ over tokens of their adapter's weight bytes (proportional to the LoRA operations).
    """

    decode_rows: int
    decode_kv_tokens: int
    decode_kv_max: int
    prefill_tokens: int
    prefill_chunks: int
    prefill_pairs: int
    prefill_kv_tokens: int
    sample_rows: int
    lora_tokens: int
    lora_adapters: int
    lora_bytes: int
    lora_single_bytes: int
    lora_token_bytes: int
    prefill_kv_max: int

    def __init__(
        self,
        decode_rows: int = 0,
        decode_kv_tokens: int = 0,
        decode_kv_max: int = 0,
        prefill_tokens: int = 0,
        prefill_chunks: int = 0,
        prefill_pairs: int = 0,
        prefill_kv_tokens: int = 0,
        sample_rows: int = 0,
        lora_tokens: int = 0,
        lora_adapters: int = 0,
        lora_bytes: int = 0,
        lora_single_bytes: int = 0,
        lora_token_bytes: int = 0,
        prefill_kv_max: int = 0,
    ) -> None:
        self.decode_rows = decode_rows
        self.decode_kv_tokens = decode_kv_tokens
        self.decode_kv_max = decode_kv_max
        self.prefill_tokens = prefill_tokens
        self.prefill_chunks = prefill_chunks
        self.prefill_pairs = prefill_pairs
        self.prefill_kv_tokens = prefill_kv_tokens
        self.sample_rows = sample_rows
        self.lora_tokens = lora_tokens
        self.lora_adapters = lora_adapters
        self.lora_bytes = lora_bytes
        self.lora_single_bytes = lora_single_bytes
        self.lora_token_bytes = lora_token_bytes
        self.prefill_kv_max = prefill_kv_max

    @property
    def tokens(self) -> int:
        return self.decode_rows + self.prefill_tokens

    def to_json(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in SHAPE_FIELDS}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StepShape:
        """Read a shape. What was written before `prefill_kv_max` was, says it as if all chunks had the same."""
        if LAST_FIELD not in data:
            chunks = max(1, int(data["prefill_chunks"]))
            data = {**data, LAST_FIELD: -(-int(data["prefill_kv_tokens"]) // chunks)}
        return cls(**{name: int(data[name]) for name in SHAPE_FIELDS})


SHAPE_FIELDS = tuple(item.name for item in fields(StepShape))
LAST_FIELD = "prefill_kv_max"


@dataclass(slots=True, unsafe_hash=True, init=False)
class PrefillChunk:
    """`length` prompt tokens of a sequence from position `start`; `last`: its next token is sampled from the final row."""

    sequence: Sequence
    start: int
    length: int
    last: bool

    def __init__(self, sequence: Sequence, start: int, length: int, last: bool) -> None:
        self.sequence = sequence
        self.start = start
        self.length = length
        self.last = last


@dataclass(slots=True, unsafe_hash=True)
class Load:
    """An adapter load to start: copy its pages from host memory. No step in flight uses these pages any more."""

    adapter: str
    slot: int
    pages: tuple[int, ...]
    num_bytes: int


@dataclass(slots=True, init=False)
class Step:
    """A planned step, told as changes to the last one.

    joined: sequences that decode from this step on. left: sequences that decoded in the last step and do not any more.
    new_pages: (sequence, page) taken for tokens that this step writes, beyond those a prefill brings; empty where pages are not named.
    finishing: sequences that produce their last token in this step.
    dropped: sequences that were dropped while it was in flight; what it makes for them is ignored.
    merged: the adapter that must be in the weights when it runs, under merge='dynamic'.
    """

    index: int
    shape: StepShape
    joined: list[Sequence]
    left: list[Sequence]
    new_pages: list[tuple[Sequence, int]]
    prefills: list[PrefillChunk]
    finishing: list[Sequence]
    dropped: tuple[Sequence, ...]
    merged: str | None

    def __init__(
        self,
        index: int,
        shape: StepShape,
        joined: list[Sequence] | None = None,
        left: list[Sequence] | None = None,
        new_pages: list[tuple[Sequence, int]] | None = None,
        prefills: list[PrefillChunk] | None = None,
        finishing: list[Sequence] | None = None,
        dropped: tuple[Sequence, ...] = (),
        merged: str | None = None,
    ) -> None:
        self.index = index
        self.shape = shape
        self.joined = [] if joined is None else joined
        self.left = [] if left is None else left
        self.new_pages = [] if new_pages is None else new_pages
        self.prefills = [] if prefills is None else prefills
        self.finishing = [] if finishing is None else finishing
        self.dropped = dropped
        self.merged = merged
