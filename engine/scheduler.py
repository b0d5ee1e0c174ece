"""The scheduler: a torch-free state machine that decides what each step does.

Requests go in, `schedule()` plans a `Step`, `complete()` tells that the GPU has done it. The engine and the simulator drive the same object;
step n+1 may be planned before step n completes. Decoding sequences are never touched one by one: they share a tick counter, a sequence needs a
page when `tick ≡ page_key (mod page_tokens)` and ends at a tick that is known when it joins.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum

from engine.pool import PagePool
from engine.requests import Request
from engine.residency import AdapterFootprint, AdapterState, Residency, ResidentAdapter
from engine.step import Load, PrefillChunk, Step, StepShape

MAX_LOADS_IN_FLIGHT = 8
LOOKAHEAD_REQUESTS = 64  # so many waiting requests are looked at for admission and prefetch
WATERMARK_SHARE = 0.01  # admission leaves so much of the pool free while others run, for their growth


class Phase(Enum):
    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    FINISHING = "finishing"
    DONE = "done"


@dataclass(slots=True, eq=False)
class Sequence:
    """A request on its way. `slot` indexes the engine's per-sequence tables while it runs.

    prefill_tokens: tokens to compute before it decodes: the prompt, and after a preemption what it had generated too.
    generated: tokens planned so far, exact unless it decodes; `Scheduler.planned_tokens` is exact always.
    """

    request: Request
    order: int
    prefill_tokens: int
    phase: Phase = Phase.WAITING
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    prefilled: int = 0
    generated: int = 0
    preemptions: int = 0
    admitted_s: float | None = None
    load_wait_s: float = 0.0
    join_tick: int = 0
    finish_tick: int = 0
    page_key: int = 0
    resident: ResidentAdapter | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """The part of a serving configuration that the scheduler obeys."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    page_tokens: int
    max_adapters_per_step: int | None = None


class RefusedError(ValueError):
    """A request that can never run, with the reason."""


@dataclass(slots=True)
class _LoraSums:
    """Running sums over the decoding sequences that have an adapter."""

    rows: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    distinct_bytes: int = 0
    single_bytes: int = 0  # of adapters with one row
    token_bytes: int = 0

    def add(self, name: str, weight_bytes: int) -> None:
        count = self.rows.get(name, 0)
        self._count_single(count, -weight_bytes)
        self._count_single(count + 1, weight_bytes)
        self.rows[name] = count + 1
        self.tokens += 1
        self.token_bytes += weight_bytes
        if count == 0:
            self.distinct_bytes += weight_bytes

    def remove(self, name: str, weight_bytes: int) -> None:
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


class Scheduler:
    """First come, first served, with chunked prefill mixed with decodes.

    Every decoding sequence is in every step; prompts fill what `max_num_batched_tokens` leaves, in order of arrival. A request is admitted
    when its adapter is resident and its prompt's pages can be had; only the adapter's own requests wait for a load. Out of pages: idle
    adapters are evicted, then the youngest sequence is preempted and later computed again.
    """

    def __init__(
        self, limits: SchedulerLimits, num_pages: int, footprints: Mapping[str, AdapterFootprint]
    ) -> None:
        self.limits = limits
        self.pool = PagePool(num_pages)
        self.residency = Residency(self.pool, footprints)
        self.preemptions = 0
        self._waiting: deque[Sequence] = deque()
        self._running: dict[Sequence, None] = {}  # prefill and decode, oldest admission first
        self._prefilling: dict[Sequence, None] = {}
        self._finishing: dict[Sequence, None] = {}  # last token planned, not yet complete
        self._decoding = 0
        self._free_slots = list(range(limits.max_num_seqs - 1, -1, -1))
        self._running_adapters: dict[str, int] = {}
        self._lora = _LoraSums()
        self._growth: list[dict[Sequence, None]] = [{} for _ in range(limits.page_tokens)]
        self._finish_at: dict[int, dict[Sequence, None]] = {}
        self._finish_ticks: list[int] = []
        self._tick = 0  # number of the next decode tick
        self._kv_base = 0  # Σ (KV tokens at join − join tick) over decoding sequences
        self._longest: list[
            tuple[int, int, Sequence]
        ] = []  # heap by −(KV at join − join tick), cleaned lazily
        self._joining: list[Sequence] = []
        self._leaving: list[Sequence] = []
        self._loads: list[Load] = []
        self._order = 0
        self._next_step = 0
        self._last_shape: StepShape | None = None
        self._steady = False  # the last plan would repeat, but for what `_changed` says
        self._changed = True  # something happened since the last plan that could admit a request
        self._blocked = False  # the last admission ended for another reason than the token budget
        self._preempted = False  # by the plan being made
        self._watermark_pages = max(1, int(num_pages * WATERMARK_SHARE))

    # ---- requests in ----

    def add(self, request: Request) -> Sequence:
        """Queue a request. Raises RefusedError when it could not run even alone."""
        reason = self.why_refused(request)
        if reason is not None:
            raise RefusedError(reason)
        sequence = Sequence(request, self._order, request.prompt_tokens)
        self._order += 1
        self._waiting.append(sequence)
        self._changed = True
        return sequence

    def why_refused(self, request: Request) -> str | None:
        """Return why a request can never run, or None."""
        if request.prompt_tokens < 1 or request.output_tokens < 1:
            return f"prompt_tokens={request.prompt_tokens} and output_tokens={request.output_tokens} must be at least 1"
        tokens = request.prompt_tokens + request.output_tokens
        if tokens > self.limits.max_model_len:
            return f"{tokens} tokens exceed max_model_len={self.limits.max_model_len}"
        pages = self._pages_for(tokens)
        if request.adapter is not None:
            footprint = self.residency.footprints.get(request.adapter)
            if footprint is None:
                return f"adapter {request.adapter!r} is not registered"
            pages += footprint.pages
        if pages > self.pool.num_pages:
            return f"{pages} pages needed for {tokens} tokens and the adapter, the pool has {self.pool.num_pages}"
        return None

    # ---- what is going on ----

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running) + len(self._finishing)

    @property
    def num_unfinished(self) -> int:
        return len(self._waiting) + self.num_running

    @property
    def kv_pages(self) -> int:
        return self.pool.num_used - self.residency.pages_held

    def planned_tokens(self, sequence: Sequence) -> int:
        """Return how many output tokens of a sequence have been planned."""
        if sequence.phase is Phase.DECODE:
            return sequence.generated + max(0, self._tick - sequence.join_tick)
        return sequence.generated

    # ---- planning ----

    def schedule(self, now_s: float) -> Step | None:
        """Plan the next step; None when nothing can run now (all wait for a load, a completion or an arrival).

        A plan that had to preempt admits nobody and loads nothing: the step in flight may still use the victims' pages and make their
        last tokens, and the next plan is made when it has completed.
        """
        self._preempted = False
        step = Step(index=self._next_step, shape=StepShape())
        decode_rows = self._plan_decodes(step)
        budget = self.limits.max_num_batched_tokens - decode_rows
        budget = self._continue_prefills(step, budget)
        if not self._preempted:
            self._admit(step, budget, now_s)
            self._changed = False
        if not decode_rows and not step.prefills:
            self._steady = False
            self._preserve_changes(step)
            return None
        self._next_step += 1
        step.shape = self._shape_of(step, decode_rows)
        if decode_rows:
            self._tick += 1
        self._end_last_tokens(step)
        self._last_shape = step.shape
        self._steady = not step.prefills and not self._prefilling and not step.finishing
        return step

    def take_loads(self) -> list[Load]:
        """Hand over the adapter loads decided since the last call, in order. The caller starts them and reports `load_finished`."""
        loads, self._loads = self._loads, []
        return loads

    def complete(self, step: Step) -> None:
        """Note that the GPU has done a planned step: what ended in it gives its pages, slot and adapter back."""
        for sequence in step.finishing:
            del self._finishing[sequence]
            self._let_go(sequence)
            sequence.phase = Phase.DONE
            self._changed = True

    def load_finished(self, adapter: str, now_s: float) -> None:
        """Note that an adapter's bytes are on the GPU."""
        self.residency.finish_load(adapter, now_s)
        self._changed = True

    # ---- many equal steps at once ----

    def extendable(self) -> int:
        """Return how many further steps would be planned exactly like the last one, but for one more KV token a row each."""
        if not self._steady or (self._changed and self._waiting):
            return 0
        steps = self._next_finish_tick() - self._tick
        free = self.pool.num_free + self.residency.evictable_pages
        rotations = -(-steps // self.limits.page_tokens)
        if rotations * self._decoding <= free:
            return max(steps, 0)
        for done in range(steps):
            free -= len(self._growth[(self._tick + done) % self.limits.page_tokens])
            if free < 0:
                return done
        return max(steps, 0)

    def extend(self, steps: int) -> None:
        """Plan and complete `steps` further steps like the last one; at most `extendable()`."""
        assert self._last_shape is not None
        for _ in range(steps):
            for sequence in self._growth[self._tick % self.limits.page_tokens]:
                if not self.pool.num_free:
                    self.residency.evict(1)
                sequence.pages += self.pool.allocate(1)
            self._tick += 1
        self._next_step += steps

    # ---- decodes ----

    def _plan_decodes(self, step: Step) -> int:
        self._take_growth_pages(step)
        step.joined, self._joining = self._joining, []
        step.left, self._leaving = self._leaving, []
        return self._decoding

    def _take_growth_pages(self, step: Step) -> None:
        growing = self._growth[self._tick % self.limits.page_tokens]
        while len(growing) > self.pool.num_free:
            self.residency.evict(len(growing))
            if len(growing) > self.pool.num_free:
                self._preempt(next(reversed(self._running)))
        for sequence in growing:
            pages = self.pool.allocate(1)
            sequence.pages += pages
            step.new_pages.append((sequence, pages[0]))

    def _join_decodes(self, sequence: Sequence) -> None:
        """Let a sequence whose prefill is planned decode from the next step on."""
        sequence.phase = Phase.DECODE
        sequence.join_tick = self._tick
        sequence.finish_tick = self._tick + sequence.request.output_tokens - sequence.generated - 1
        sequence.page_key = (self._tick - sequence.prefill_tokens) % self.limits.page_tokens
        self._growth[sequence.page_key][sequence] = None
        bucket = self._finish_at.get(sequence.finish_tick)
        if bucket is None:
            self._finish_at[sequence.finish_tick] = bucket = {}
            heapq.heappush(self._finish_ticks, sequence.finish_tick)
        bucket[sequence] = None
        base = sequence.prefill_tokens - sequence.join_tick
        self._kv_base += base
        heapq.heappush(self._longest, (-base, sequence.order, sequence))
        self._decoding += 1
        self._joining.append(sequence)
        if sequence.resident is not None:
            self._lora.add(sequence.resident.name, sequence.resident.footprint.weight_bytes)

    def _leave_decodes(self, sequence: Sequence) -> None:
        sequence.generated += self._tick - sequence.join_tick
        del self._growth[sequence.page_key][sequence]
        bucket = self._finish_at[sequence.finish_tick]
        del bucket[sequence]
        self._kv_base -= sequence.prefill_tokens - sequence.join_tick
        self._decoding -= 1
        if sequence in self._joining:
            self._joining.remove(sequence)
        else:
            self._leaving.append(sequence)
        if sequence.resident is not None:
            self._lora.remove(sequence.resident.name, sequence.resident.footprint.weight_bytes)

    def _next_finish_tick(self) -> int:
        while self._finish_ticks and not self._finish_at[self._finish_ticks[0]]:
            del self._finish_at[heapq.heappop(self._finish_ticks)]
        return self._finish_ticks[0] if self._finish_ticks else self._tick

    def _longest_kv(self) -> int:
        """Return the most KV tokens that a row of the tick being planned attends to."""
        while self._longest:
            negative_base, _, sequence = self._longest[0]
            if (
                sequence.phase is Phase.DECODE
                and sequence.prefill_tokens - sequence.join_tick == -negative_base
            ):
                return -negative_base + self._tick + 1
            heapq.heappop(self._longest)
        return 0

    # ---- prefills ----

    def _continue_prefills(self, step: Step, budget: int) -> int:
        for sequence in self._prefilling:
            if budget <= 0:
                break
            budget -= self._plan_chunk(step, sequence, budget)
        return budget

    def _plan_chunk(self, step: Step, sequence: Sequence, budget: int) -> int:
        length = min(budget, sequence.prefill_tokens - sequence.prefilled)
        last = sequence.prefilled + length == sequence.prefill_tokens
        step.prefills.append(PrefillChunk(sequence, sequence.prefilled, length, last))
        sequence.prefilled += length
        return length

    def _admit(self, step: Step, budget: int, now_s: float) -> None:
        """Admit waiting requests in order; start loads for those further back whose adapters are not there.

        What ended for want of slots, pages or loads stays so until something changes, so it is not tried again before.
        """
        if not self._waiting or (self._blocked and not self._changed):
            return
        admitted: list[Sequence] = []
        may_admit = True
        reserve = 0  # pages that the first waiting request wants when its adapter is there: nobody overtakes it into them
        wanted = {s.request.adapter for _, s in zip(range(LOOKAHEAD_REQUESTS), self._waiting, strict=False)}
        for position, sequence in zip(range(LOOKAHEAD_REQUESTS), self._waiting, strict=False):
            may_admit = may_admit and budget > 0 and bool(self._free_slots)
            name = sequence.request.adapter
            if name is not None and self.residency.state(name) is not AdapterState.RESIDENT:
                head = position == len(admitted)
                absent = self.residency.state(name) is AdapterState.ABSENT
                busy = self.residency.num_loading >= MAX_LOADS_IN_FLIGHT
                started = (
                    absent and not busy and self._start_load(name, now_s, reserve, None if head else wanted)
                )
                if head:
                    may_admit = may_admit and (started or busy or not absent)
                    reserve = self._watermark_pages + self._pages_for(sequence.prefill_tokens)
                    if absent and not started:
                        reserve += self.residency.footprints[name].pages
                continue
            if not may_admit:
                if name is not None:
                    self.residency.touch(name)
                continue
            if not self._fits(sequence, reserve):
                may_admit = False
                continue
            self._start(sequence, now_s)
            admitted.append(sequence)
            budget -= self._plan_chunk(step, sequence, budget)
        self._blocked = budget > 0
        if admitted:
            self._drop_from_waiting(admitted)

    def _drop_from_waiting(self, admitted: list[Sequence]) -> None:
        gone = set(admitted)
        kept: list[Sequence] = []
        while gone:
            sequence = self._waiting.popleft()
            if sequence in gone:
                gone.discard(sequence)
            else:
                kept.append(sequence)
        self._waiting.extendleft(reversed(kept))

    def _fits(self, sequence: Sequence, reserve: int) -> bool:
        name = sequence.request.adapter
        cap = self.limits.max_adapters_per_step
        if (
            cap is not None
            and name is not None
            and name not in self._running_adapters
            and len(self._running_adapters) >= cap
        ):
            return False
        wanted = self._pages_for(sequence.prefill_tokens) + reserve
        if self._running or self._finishing:
            wanted += self._watermark_pages
        return wanted <= self.pool.num_free + self.residency.evictable_pages_without(name)

    def _start(self, sequence: Sequence, now_s: float) -> None:
        name = sequence.request.adapter
        if name is not None:
            sequence.resident = self.residency.acquire(name)
            self._running_adapters[name] = self._running_adapters.get(name, 0) + 1
            if sequence.admitted_s is None:
                arrived_s = sequence.request.arrival_s
                waited_s = sequence.resident.load_finished_s - max(
                    arrived_s, sequence.resident.load_started_s
                )
                sequence.load_wait_s = max(0.0, waited_s)
        wanted = self._pages_for(sequence.prefill_tokens)
        self.residency.evict(wanted)
        sequence.pages = self.pool.allocate(wanted)
        sequence.slot = self._free_slots.pop()
        sequence.phase = Phase.PREFILL
        sequence.prefilled = 0
        if sequence.admitted_s is None:
            sequence.admitted_s = now_s
        self._running[sequence] = None
        self._prefilling[sequence] = None

    def _start_load(self, name: str, now_s: float, reserve: int, keep: set[str | None] | None) -> bool:
        """Start a load if `reserve` pages are left beside it: of free ones, and those of idle adapters but of those in `keep`.

        keep: None for the first waiting request, which may take any idle adapter's pages and all of the watermark.
        """
        wanted = self.residency.footprints[name].pages
        if keep is not None:
            wanted += reserve + (self._watermark_pages if self._running else 0)
        kept = keep or set()
        if wanted > self.pool.num_free:
            if wanted > self.pool.num_free + self.residency.evictable_pages_but(kept):
                return False
            self.residency.evict(wanted, keep=kept.__contains__)
        adapter = self.residency.start_load(name, now_s)
        self._loads.append(Load(name, adapter.slot, tuple(adapter.pages), adapter.footprint.copy_bytes))
        return True

    # ---- ends ----

    def _end_last_tokens(self, step: Step) -> None:
        """Move on what this step planned: prefills that end in it, and decodes whose last token it makes."""
        if step.shape.decode_rows:
            for sequence in list(self._finish_at.get(self._tick - 1, ())):
                self._leave_decodes(sequence)
                self._finish(sequence, step)
        for chunk in step.prefills:
            if not chunk.last:
                continue
            sequence = chunk.sequence
            del self._prefilling[sequence]
            sequence.generated += 1
            if sequence.generated == sequence.request.output_tokens:
                self._finish(sequence, step)
            else:
                self._join_decodes(sequence)

    def _finish(self, sequence: Sequence, step: Step) -> None:
        del self._running[sequence]
        self._finishing[sequence] = None
        sequence.phase = Phase.FINISHING
        step.finishing.append(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        """Take everything from a running sequence; it waits at the front and computes its tokens again."""
        if sequence.phase is Phase.DECODE:
            self._leave_decodes(sequence)
        else:
            del self._prefilling[sequence]
        del self._running[sequence]
        self._let_go(sequence)
        sequence.phase = Phase.WAITING
        sequence.prefill_tokens = sequence.request.prompt_tokens + sequence.generated
        sequence.prefilled = 0
        sequence.preemptions += 1
        self.preemptions += 1
        self._waiting.appendleft(sequence)
        self._preempted = True
        self._changed = True

    def _let_go(self, sequence: Sequence) -> None:
        self.pool.release(sequence.pages)
        sequence.pages = []
        self._free_slots.append(sequence.slot)
        sequence.slot = -1
        if sequence.resident is not None:
            name = sequence.resident.name
            self.residency.release(name)
            sequence.resident = None
            self._running_adapters[name] -= 1
            if not self._running_adapters[name]:
                del self._running_adapters[name]

    def _preserve_changes(self, step: Step) -> None:
        """Keep the changes of a plan that came to nothing for the next one."""
        self._leaving = step.left + self._leaving
        assert not step.joined and not step.new_pages

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.limits.page_tokens)

    def _shape_of(self, step: Step, decode_rows: int) -> StepShape:
        lora = self._lora
        tokens, adapters, distinct, token_bytes = (
            lora.tokens,
            len(lora.rows),
            lora.distinct_bytes,
            lora.token_bytes,
        )
        seen: set[str] = set()
        prefill = pairs = kv_tokens = samples = 0
        for chunk in step.prefills:
            prefill += chunk.length
            pairs += chunk.length * chunk.start + chunk.length * (chunk.length + 1) // 2
            kv_tokens += chunk.start + chunk.length
            samples += chunk.last
            resident = chunk.sequence.resident
            if resident is not None:
                tokens += chunk.length
                token_bytes += chunk.length * resident.footprint.weight_bytes
                if resident.name not in lora.rows and resident.name not in seen:
                    seen.add(resident.name)
                    adapters += 1
                    distinct += resident.footprint.weight_bytes
        return StepShape(
            decode_rows=decode_rows,
            decode_kv_tokens=self._kv_base + decode_rows * (self._tick + 1),
            decode_kv_max=self._longest_kv() if decode_rows else 0,
            prefill_tokens=prefill,
            prefill_chunks=len(step.prefills),
            prefill_pairs=pairs,
            prefill_kv_tokens=kv_tokens,
            sample_rows=decode_rows + samples,
            lora_tokens=tokens,
            lora_adapters=adapters,
            lora_bytes=distinct,
            lora_single_bytes=lora.single_bytes,
            lora_token_bytes=token_bytes,
        )

    # ---- integrity ----

    def running(self) -> Iterator[Sequence]:
        """Yield the sequences that hold pages."""
        yield from self._running
        yield from self._finishing

    def check_integrity(self) -> None:
        """Raise AssertionError unless pages are conserved and all counters agree with the sequences."""
        self.residency.check_integrity()
        holders = [sequence.pages for sequence in self.running()]
        self.pool.check_integrity([*holders, *self.residency.holders()])
        slots = [sequence.slot for sequence in self.running()]
        assert sorted(slots + self._free_slots) == list(range(self.limits.max_num_seqs)), (
            "slots are not conserved"
        )
        decoding = [s for s in self._running if s.phase is Phase.DECODE]
        assert len(decoding) == self._decoding
        assert set(decoding) == {s for bucket in self._growth for s in bucket}
        assert self._kv_base == sum(s.prefill_tokens - s.join_tick for s in decoding)
        for s in decoding:
            kv_tokens = s.prefill_tokens + self._tick - s.join_tick
            assert len(s.pages) == self._pages_for(kv_tokens), f"{len(s.pages)} pages for {kv_tokens} tokens"
            assert s.prefill_tokens + s.request.output_tokens - s.generated <= self.limits.max_model_len + 1
        users: dict[str, int] = {}
        for s in self.running():
            if s.resident is not None:
                users[s.resident.name] = users.get(s.resident.name, 0) + 1
        assert users == self._running_adapters
        assert all(self.residency.get(name).users == count for name, count in users.items())
        assert all(s.phase is Phase.WAITING and not s.pages and s.slot == -1 for s in self._waiting)
