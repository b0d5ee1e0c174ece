"""Turns planned steps into batches: keeps what each running sequence looks like, and writes a step's indices with numpy.

Only changes reach it: who joins and leaves the decodes, new pages, prefill chunks. The rest is vectorised over the decode rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.batch import BatchLayout, PageUpdates
from engine.sampling import GREEDY, Sampling
from engine.sequence import Sequence
from engine.step import PrefillChunk, Step
from kernels.attention_plan import plan_decode_attention, plan_prefill_attention
from kernels.lora_plan import plan_lora
from kernels.sample_params import PARAM_COLUMNS, POSITION, sample_params

NO_ADAPTER = -1


@dataclass(slots=True)
class SampledRows:
    """Whose tokens the rows of a step's sampled output are, in order."""

    sequences: list[Sequence]


class BatchBuilder:
    """Per-sequence state by slot, and the writing of one step. `adapter_meta [adapters, 16]` is shared with the adapter memory."""

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_pages_per_seq: int,
        page_tokens: int,
        attention_items: int,
        adapter_meta: NDArray[np.int32],
        dynamic_slots: Sequence_[int] = (),
    ) -> None:
        self._page_tokens = page_tokens
        self._max_pages = max_pages_per_seq
        self._attention_items = attention_items
        self._adapter_meta = adapter_meta
        self._dynamic_of = {slot: number for number, slot in enumerate(dynamic_slots, start=1)}
        self._dynamic = np.zeros(max_num_seqs, dtype=np.int32)  # its dynamic adapter, from 1 on; 0: none
        self._sequences: list[Sequence | None] = [None] * max_num_seqs
        self._slot_of: dict[Sequence, int] = {}
        self._kv_tokens = np.zeros(
            max_num_seqs, dtype=np.int32
        )  # tokens in the cache before the next decode row
        self._adapter = np.full(max_num_seqs, NO_ADAPTER, dtype=np.int32)
        self._decoding = np.zeros(max_num_seqs, dtype=bool)
        self._pages_written = np.zeros(max_num_seqs, dtype=np.int32)
        self._sample_params = np.zeros((max_num_seqs, PARAM_COLUMNS), dtype=np.int32)

    def clear(self) -> None:
        """Forget all sequences."""
        self._sequences = [None] * len(self._sequences)
        self._slot_of.clear()
        self._decoding[:] = False

    def apply(self, step: Step, sampling_of: Mapping[Sequence, Sampling] | None = None) -> PageUpdates:
        """Take over a step's changes; return the page table entries that change. sampling_of: of sequences that start; greedy if not there."""
        updates = PageUpdates()
        for sequence in step.left:
            self._leave(sequence)
        for sequence in step.joined:
            self._decoding[self._slot_of[sequence]] = True
            self._kv_tokens[self._slot_of[sequence]] = sequence.prefill_tokens
        for sequence, page in step.new_pages:
            slot = self._slot_of[sequence]
            updates.add(slot * self._max_pages + int(self._pages_written[slot]), page)
            self._pages_written[slot] += 1
        for chunk in step.prefills:
            if chunk.start == chunk.sequence.cached_tokens:
                self.enter(chunk.sequence, updates, (sampling_of or {}).get(chunk.sequence, GREEDY))
        return updates

    def enter(self, sequence: Sequence, updates: PageUpdates, sampling: Sampling = GREEDY) -> None:
        """Take in a sequence that starts to run: its slot, pages, adapter and how its tokens are chosen."""
        slot = sequence.slot
        previous = self._sequences[slot]
        if previous is not None and self._slot_of.get(previous) == slot:
            del self._slot_of[previous]
        self._sequences[slot] = sequence
        self._slot_of[sequence] = slot
        self._decoding[slot] = False
        self._adapter[slot] = NO_ADAPTER if sequence.resident is None else sequence.resident.slot
        if self._dynamic_of:
            self._dynamic[slot] = number = self._dynamic_of.get(int(self._adapter[slot]), 0)
            if number:
                self._adapter[slot] = NO_ADAPTER
        self._pages_written[slot] = len(sequence.pages)
        self._sample_params[slot] = sample_params(sampling.temperature, sampling.top_p, sampling.seed)
        updates.add_row(slot * self._max_pages, sequence.pages)

    def _leave(self, sequence: Sequence) -> None:
        slot = self._slot_of.get(sequence)
        if slot is not None and self._sequences[slot] is sequence:
            self._decoding[slot] = False

    def build(
        self,
        step: Step,
        layout: BatchLayout,
        views: dict[str, NDArray[np.int32]],
        tokens_of: dict[Sequence, NDArray[np.int32]],
    ) -> SampledRows:
        """Write a step into the host views of its layout; return whose tokens it samples.

        tokens_of: prompt and generated tokens of the sequences that prefill.
        """
        slots = self._decode_slots()
        rows = len(slots)
        kv_tokens = self._kv_tokens[slots]
        views["host_tokens"][:rows] = -1
        views["positions"][:rows] = kv_tokens
        views["sequence_slots"][:rows] = slots
        views["sample_rows"][:rows] = np.arange(rows)
        views["sample_slots"][:rows] = slots
        views["sample_params"][:rows] = self._sample_params[slots]
        views["sample_params"][:rows, POSITION] = kv_tokens + 1
        sequences = [self._sequences[slot] for slot in slots.tolist()]
        chunks = sorted(step.prefills, key=self._adapter_of)
        row, attention_chunks, samples = rows, [], rows
        for chunk in chunks:
            self._write_chunk(chunk, row, views, tokens_of)
            attention_chunks.append((row, chunk.length, chunk.start, chunk.sequence.slot))
            if chunk.last:
                views["sample_rows"][samples] = row + chunk.length - 1
                views["sample_slots"][samples] = chunk.sequence.slot
                views["sample_params"][samples] = self._sample_params[chunk.sequence.slot]
                views["sample_params"][samples, POSITION] = chunk.start + chunk.length
                sequences.append(chunk.sequence)
                samples += 1
            row += chunk.length
        self._pad(views, row, samples)
        self._plan_attention(layout, views, kv_tokens + 1, attention_chunks)
        self._plan_lora(layout, views, self._adapter[slots], chunks, rows)
        if self._dynamic_of:
            self._write_expert_rows(views["expert_rows"], slots, chunks)
        self._kv_tokens[slots] += 1
        return SampledRows([sequence for sequence in sequences if sequence is not None])

    def has_experts(self, step: Step) -> bool:
        """Whether a row of a step, which has been applied, has a dynamic adapter."""
        if not self._dynamic_of:
            return False
        chunks = (self._dynamic[chunk.sequence.slot] for chunk in step.prefills)
        return bool(self._dynamic[self._decoding].any()) or any(chunks)

    def _write_expert_rows(
        self, rows_of: NDArray[np.int32], slots: NDArray[np.int64], chunks: list[PrefillChunk]
    ) -> None:
        """Mark, for each dynamic adapter, which rows have it."""
        rows_of[:] = 0
        numbers = np.arange(1, len(rows_of) + 1)[:, None]
        rows_of[:, : len(slots)] = self._dynamic[slots] == numbers
        row = len(slots)
        for chunk in chunks:
            number = self._dynamic[chunk.sequence.slot]
            if number:
                rows_of[number - 1, row : row + chunk.length] = 1
            row += chunk.length

    def _decode_slots(self) -> NDArray[np.int64]:
        """Return the slots of the decode rows in row order: by adapter, then by slot."""
        slots = np.flatnonzero(self._decoding)
        return slots[np.argsort(self._adapter[slots], kind="stable")]

    def _adapter_of(self, chunk: PrefillChunk) -> int:
        return int(self._adapter[chunk.sequence.slot])

    def _write_chunk(
        self,
        chunk: PrefillChunk,
        row: int,
        views: dict[str, NDArray[np.int32]],
        tokens_of: dict[Sequence, NDArray[np.int32]],
    ) -> None:
        rows = slice(row, row + chunk.length)
        end = chunk.start + chunk.length
        views["host_tokens"][rows] = tokens_of[chunk.sequence][chunk.start : end]
        views["positions"][rows] = np.arange(chunk.start, end)
        views["sequence_slots"][rows] = chunk.sequence.slot

    def _pad(self, views: dict[str, NDArray[np.int32]], rows: int, samples: int) -> None:
        views["host_tokens"][rows:] = 0
        views["positions"][rows:] = 0
        views["sequence_slots"][rows:] = -1
        views["sample_rows"][samples:] = 0
        views["sample_slots"][samples:] = len(self._sequences)  # a slot that nobody reads
        views["sample_params"][samples:] = 0

    def _plan_attention(
        self,
        layout: BatchLayout,
        views: dict[str, NDArray[np.int32]],
        kv_lens: NDArray[np.int32],
        chunks: list[tuple[int, int, int, int]],
    ) -> None:
        items, combine = plan_decode_attention(
            kv_lens,
            page_tokens=self._page_tokens,
            max_partials=len(views["combine"]) * 2,
            target_items=self._attention_items,
            out=(views["decode_items"], views["combine"]),
        )
        views["num_decode_items"][0] = len(items)
        views["num_combine"][0] = len(combine)
        prefill = plan_prefill_attention(chunks, layout.block_q, out=views["prefill_items"])
        views["num_prefill_items"][0] = len(prefill)

    def _plan_lora(
        self,
        layout: BatchLayout,
        views: dict[str, NDArray[np.int32]],
        decode_adapters: NDArray[np.int32],
        chunks: list[PrefillChunk],
        rows: int,
    ) -> None:
        adapters = np.concatenate([decode_adapters, [self._adapter_of(chunk) for chunk in chunks]]).astype(
            np.int32
        )
        counts = np.concatenate([np.ones(rows), [chunk.length for chunk in chunks]]).astype(np.int32)
        starts = np.cumsum(counts, dtype=np.int32) - counts
        # Neighbours of one adapter are one segment; decodes and prefills are sorted apart, so an adapter has at most two.
        first = np.flatnonzero(np.diff(adapters, prepend=-2))
        lengths = np.add.reduceat(counts, first) if len(first) else counts
        num_tiles, _ = plan_lora(
            adapters[first],
            starts[first],
            lengths.astype(np.int32),
            self._adapter_meta,
            launches=layout.lora,
            in_features=layout.limits.in_features,
            widths=layout.limits.widths,
            shards=layout.limits.lora_shards,
            tiles_out=views["tiles"],
            headers_out=views["lora_headers"],
            items_out=views["lora_items"],
        )
        views["num_tiles"][0] = num_tiles
