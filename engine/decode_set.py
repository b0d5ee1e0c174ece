"""The sequences that decode, accounted without touching them one by one.

All of them advance by one token a tick. So when a sequence joins, the tick at which it makes its last token is known, and it needs a new
page whenever `tick ≡ page_key (mod page_tokens)`; Σ KV tokens is a constant plus the number of sequences times the tick. A step costs
O(changes).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from heapq import heappop, heappush

from engine.residency import AdapterFootprint
from engine.sequence import Phase, Sequence

# Python looks a member of an enumeration up in 0.15 µs, a global in none; these are asked for in every plan.
_DECODE = Phase.DECODE


@dataclass(slots=True)
class LoraSums:
    """Running sums over the decoding sequences that have an adapter. rows: decode rows by adapter."""

    rows: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    distinct_bytes: int = 0
    single_bytes: int = 0  # of adapters with one row
    token_bytes: int = 0

    def add(self, name: str, footprint: AdapterFootprint) -> None:
        """Count one more row of an adapter."""
        weight_bytes = footprint.weight_bytes
        count = self.rows.get(name, 0)
        self.rows[name] = count + 1
        self.tokens += 1
        self.token_bytes += weight_bytes
        if count == 0:
            self.distinct_bytes += weight_bytes
            self.single_bytes += weight_bytes
        elif count == 1:
            self.single_bytes -= weight_bytes
        if footprint.experts is not None and count:
            self.distinct_bytes += int(footprint.bytes_of(count + 1)) - int(footprint.bytes_of(count))

    def remove(self, name: str, footprint: AdapterFootprint) -> None:
        """Count one row less."""
        weight_bytes = footprint.weight_bytes
        count = self.rows[name] - 1
        self.tokens -= 1
        self.token_bytes -= weight_bytes
        if footprint.experts is not None and count:
            self.distinct_bytes -= int(footprint.bytes_of(count + 1)) - int(footprint.bytes_of(count))
        if count:
            self.rows[name] = count
            if count == 1:
                self.single_bytes += weight_bytes
        else:
            del self.rows[name]
            self.distinct_bytes -= weight_bytes
            self.single_bytes -= weight_bytes


class DecodeSet:
    """Sequences that decode in every step. `tick` is the number of the decode step to be planned next."""

    def __init__(self, page_tokens: int) -> None:
        self.tick = 0
        self.size = 0
        self.lora = LoraSums()
        self.kv_base = 0  # Σ (KV tokens at join − join tick)
        self._page_tokens = page_tokens
        self._growth: list[dict[Sequence, None]] = [{} for _ in range(page_tokens)]
        self._finish_at: dict[int, dict[Sequence, None]] = {}
        self._finish_ticks: list[int] = []  # heap of the keys of _finish_at
        self._bases: dict[int, int] = {}  # KV tokens at join − join tick -> how many have it
        self._longest: list[int] = []  # heap of its keys, negative, cleaned lazily
        self._longest_base: int | None = None  # the largest key; None: to be looked up
        self._joined: list[Sequence] = []
        self._left: list[Sequence] = []

    def __len__(self) -> int:
        return self.size

    def join(self, sequence: Sequence) -> None:
        """Let a sequence whose prefill is planned decode from the next tick on."""
        tick = self.tick
        base = sequence.prefill_tokens - tick
        finish_tick = tick + sequence.request.output_tokens - sequence.generated - 1
        page_key = -base % self._page_tokens
        sequence.phase = _DECODE
        sequence.join_tick = tick
        sequence.finish_tick = finish_tick
        sequence.page_key = page_key
        self._growth[page_key][sequence] = None
        bucket = self._finish_at.get(finish_tick)
        if bucket is None:
            self._finish_at[finish_tick] = {sequence: None}
            heappush(self._finish_ticks, finish_tick)
        else:
            bucket[sequence] = None
        self.kv_base += base
        alike = self._bases.get(base, 0)
        self._bases[base] = alike + 1
        if not alike:
            heappush(self._longest, -base)
        if self._longest_base is not None and base > self._longest_base:
            self._longest_base = base
        self.size += 1
        self._joined.append(sequence)
        if sequence.resident is not None:
            self.lora.add(sequence.resident.name, sequence.resident.footprint)

    def leave(self, sequence: Sequence) -> None:
        """Take a sequence out: after its last tick, or because it is preempted. Its `generated` and `held_pages` are exact from here on."""
        ticks = self.tick - sequence.join_tick
        sequence.generated += ticks
        sequence.held_pages = self.pages_of(sequence)
        del self._growth[sequence.page_key][sequence]
        del self._finish_at[sequence.finish_tick][sequence]
        base = sequence.prefill_tokens - sequence.join_tick
        self.kv_base -= base
        alike = self._bases[base] - 1
        if alike:
            self._bases[base] = alike
        else:
            del self._bases[base]
            if base == self._longest_base:
                self._longest_base = None
        self.size -= 1
        if self._joined and sequence in self._joined:
            self._joined.remove(sequence)
        else:
            self._left.append(sequence)
        if sequence.resident is not None:
            self.lora.remove(sequence.resident.name, sequence.resident.footprint)

    def pages_of(self, sequence: Sequence) -> int:
        """Return how many pages a decoding sequence holds: those of its KV tokens so far."""
        return -(-(sequence.prefill_tokens + self.tick - sequence.join_tick) // self._page_tokens)

    def growing(self) -> dict[Sequence, None]:
        """Return the sequences that need a page for the token of the next tick."""
        return self._growth[self.tick % self._page_tokens]

    def growth(self, ticks: int) -> int:
        """Return how many pages the next `ticks` ticks take."""
        turns, rest = divmod(ticks, self._page_tokens)
        pages, key = turns * self.size, self.tick % self._page_tokens
        for bucket in (self._growth[key:] + self._growth[:key])[:rest] if rest else ():
            pages += len(bucket)
        return pages

    def growth_at(self, ahead: int) -> int:
        """Return how many pages the tick `ahead` ticks after the next one takes."""
        return len(self._growth[(self.tick + ahead) % self._page_tokens])

    def skip(self, ticks: int) -> None:
        """Take ticks in which nobody ends."""
        self.tick += ticks

    def advance(self) -> Collection[Sequence]:
        """Take one tick; return the sequences that made their last token in it. They are still in the set."""
        tick = self.tick
        self.tick = tick + 1
        ended = self._finish_at.get(tick)
        return list(ended) if ended else ()

    def ticks_to_finish(self) -> int:
        """Return how many ticks pass before the one in which a sequence makes its last token; 0 where there is none."""
        ticks = self._finish_ticks
        while ticks and not self._finish_at[ticks[0]]:
            del self._finish_at[heappop(ticks)]
        return ticks[0] - self.tick if ticks else 0

    def kv_tokens(self) -> int:
        """Return Σ KV tokens that the rows of the next tick attend to, their own included."""
        return self.kv_base + self.size * (self.tick + 1)

    def longest_kv(self) -> int:
        """Return the most KV tokens that a row of the next tick attends to; there must be one."""
        base = self._longest_base
        if base is None:
            base = self._longest_base = self._look_up_longest()
        return base + self.tick + 1

    def _look_up_longest(self) -> int:
        longest = self._longest
        while -longest[0] not in self._bases:  # somebody decodes
            heappop(longest)
        return -longest[0]

    def take_changes(self) -> tuple[list[Sequence], list[Sequence]]:
        """Hand over who joined and who left since the last call."""
        joined: list[Sequence] = []
        left: list[Sequence] = []
        if self._joined:
            joined, self._joined = self._joined, joined
        if self._left:
            left, self._left = self._left, left
            self.ticks_to_finish()  # forgets ticks at which nobody ends any more
        return joined, left

    def put_back_left(self, sequences: list[Sequence]) -> None:
        """Take back who left, from a plan that came to nothing."""
        self._left = sequences + self._left

    def check_integrity(self, sequences: list[Sequence]) -> None:
        """Raise AssertionError unless the counters agree with these sequences, which are those that decode."""
        assert len(sequences) == self.size
        assert set(sequences) == {s for bucket in self._growth for s in bucket}
        assert set(sequences) == {s for bucket in self._finish_at.values() for s in bucket}
        assert self.kv_base == sum(s.prefill_tokens - s.join_tick for s in sequences)
        bases = [s.prefill_tokens - s.join_tick for s in sequences]
        assert self._bases == {base: bases.count(base) for base in bases}
        assert not bases or self.longest_kv() == max(bases) + self.tick + 1
        assert self.lora.tokens == sum(s.resident is not None for s in sequences)
        assert sorted(self._finish_at) == sorted(self._finish_ticks)
