"""The sequences that decode, accounted without touching them one by one.

All of them advance by one token a tick. So when a sequence joins, the tick at which it makes its last token is known, and it needs a new
page whenever `tick ≡ page_key (mod page_tokens)`; Σ KV tokens is a constant plus the number of sequences times the tick. A step costs
O(changes).
"""

from __future__ import annotations

import heapq
from collections.abc import Collection
from dataclasses import dataclass, field

from engine.sequence import Phase, Sequence


@dataclass(slots=True)
class LoraSums:
    """Running sums over the decoding sequences that have an adapter. rows: decode rows by adapter."""

    rows: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    distinct_bytes: int = 0
    single_bytes: int = 0  # of adapters with one row
    token_bytes: int = 0

    def add(self, name: str, weight_bytes: int) -> None:
        """Count one more row of an adapter."""
        count = self.rows.get(name, 0)
        self._count_single(count, -weight_bytes)
        self._count_single(count + 1, weight_bytes)
        self.rows[name] = count + 1
        self.tokens += 1
        self.token_bytes += weight_bytes
        if count == 0:
            self.distinct_bytes += weight_bytes

    def remove(self, name: str, weight_bytes: int) -> None:
        """Count one row less."""
        count = self.rows[name] - 1
        self._count_single(count + 1, -weight_bytes)
        self._count_single(count, weight_bytes)
        self.tokens -= 1
        self.token_bytes -= weight_bytes
        if count:
            self.rows[name] = count
        else:
            del self.rows[name]
            self.distinct_bytes -= weight_bytes

    def _count_single(self, rows: int, weight_bytes: int) -> None:
        if rows == 1:
            self.single_bytes += weight_bytes


class DecodeSet:
    """Sequences that decode in every step. `tick` is the number of the decode step to be planned next."""

    def __init__(self, page_tokens: int) -> None:
        self.tick = 0
        self.lora = LoraSums()
        self._page_tokens = page_tokens
        self._size = 0
        self._growth: list[dict[Sequence, None]] = [{} for _ in range(page_tokens)]
        self._finish_at: dict[int, dict[Sequence, None]] = {}
        self._finish_ticks: list[int] = []  # heap of the keys of _finish_at
        self._kv_base = 0  # Σ (KV tokens at join − join tick)
        self._longest: list[
            tuple[int, int, Sequence]
        ] = []  # heap by −(KV at join − join tick), cleaned lazily
        self._joined: list[Sequence] = []
        self._left: list[Sequence] = []

    def __len__(self) -> int:
        return self._size

    def join(self, sequence: Sequence) -> None:
        """Let a sequence whose prefill is planned decode from the next tick on."""
        sequence.phase = Phase.DECODE
        sequence.join_tick = self.tick
        sequence.finish_tick = self.tick + sequence.request.output_tokens - sequence.generated - 1
        sequence.page_key = (self.tick - sequence.prefill_tokens) % self._page_tokens
        self._growth[sequence.page_key][sequence] = None
        bucket = self._finish_at.get(sequence.finish_tick)
        if bucket is None:
            self._finish_at[sequence.finish_tick] = bucket = {}
            heapq.heappush(self._finish_ticks, sequence.finish_tick)
        bucket[sequence] = None
        base = sequence.prefill_tokens - sequence.join_tick
        self._kv_base += base
        heapq.heappush(self._longest, (-base, sequence.order, sequence))
        self._size += 1
        self._joined.append(sequence)
        if sequence.resident is not None:
            self.lora.add(sequence.resident.name, sequence.resident.footprint.weight_bytes)

    def leave(self, sequence: Sequence) -> None:
        """Take a sequence out: after its last tick, or because it is preempted. Its `generated` is exact from here on."""
        sequence.generated += self.tick - sequence.join_tick
        del self._growth[sequence.page_key][sequence]
        del self._finish_at[sequence.finish_tick][sequence]
        self._kv_base -= sequence.prefill_tokens - sequence.join_tick
        self._size -= 1
        if sequence in self._joined:
            self._joined.remove(sequence)
        else:
            self._left.append(sequence)
        if sequence.resident is not None:
            self.lora.remove(sequence.resident.name, sequence.resident.footprint.weight_bytes)

    def growing(self, ahead: int = 0) -> Collection[Sequence]:
        """Return the sequences that need a page for the token of the next tick, or of `ahead` ticks later."""
        return self._growth[(self.tick + ahead) % self._page_tokens]

    def advance(self) -> list[Sequence]:
        """Take one tick; return the sequences that made their last token in it. They are still in the set."""
        self.tick += 1
        return list(self._finish_at.get(self.tick - 1, ()))

    def ticks_to_finish(self) -> int:
        """Return how many ticks pass before the one in which a sequence makes its last token; 0 where there is none."""
        while self._finish_ticks and not self._finish_at[self._finish_ticks[0]]:
            del self._finish_at[heapq.heappop(self._finish_ticks)]
        return self._finish_ticks[0] - self.tick if self._finish_ticks else 0

    def kv_tokens(self) -> int:
        """Return Σ KV tokens that the rows of the next tick attend to, their own included."""
        return self._kv_base + self._size * (self.tick + 1)

    def longest_kv(self) -> int:
        """Return the most KV tokens that a row of the next tick attends to."""
        while self._longest:
            negative_base, _, sequence = self._longest[0]
            base = sequence.prefill_tokens - sequence.join_tick
            if sequence.phase is Phase.DECODE and base == -negative_base:
                return base + self.tick + 1
            heapq.heappop(self._longest)
        return 0

    def take_changes(self) -> tuple[list[Sequence], list[Sequence]]:
        """Hand over who joined and who left since the last call."""
        changes = self._joined, self._left
        self._joined, self._left = [], []
        self.ticks_to_finish()  # forgets ticks at which nobody ends any more
        return changes

    def put_back_left(self, sequences: list[Sequence]) -> None:
        """Take back who left, from a plan that came to nothing."""
        self._left = sequences + self._left

    def check_integrity(self, sequences: list[Sequence]) -> None:
        """Raise AssertionError unless the counters agree with these sequences, which are those that decode."""
        assert len(sequences) == self._size
        assert set(sequences) == {s for bucket in self._growth for s in bucket}
        assert set(sequences) == {s for bucket in self._finish_at.values() for s in bucket}
        assert self._kv_base == sum(s.prefill_tokens - s.join_tick for s in sequences)
        assert self.lora.tokens == sum(s.resident is not None for s in sequences)
