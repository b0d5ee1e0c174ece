"""The scheduler: a torch-free state machine that decides what each step does.

Requests go in, `schedule()` plans a `Step`, `complete()` tells that the GPU has done it. The engine and the simulator drive the same object;
step n+1 may be planned before step n completes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from engine.decode_set import DecodeSet
from engine.pool import PagePool
from engine.requests import Request
from engine.residency import AdapterFootprint, AdapterState, Residency
from engine.sequence import Phase, Sequence
from engine.step import Load, PrefillChunk, Step, StepShape

MAX_LOADS_IN_FLIGHT = 8
LOOKAHEAD_REQUESTS = 64  # so many waiting requests are looked at for admission and prefetch
WATERMARK_SHARE = 0.01  # admission leaves so much of the pool free while others run, for their growth


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
        self._decoding = DecodeSet(limits.page_tokens)
        self._free_slots = list(range(limits.max_num_seqs - 1, -1, -1))
        self._running_adapters: dict[str, int] = {}
        self._loads: list[Load] = []
        self._order = 0
        self._next_step = 0
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
            return sequence.generated + max(0, self._decoding.tick - sequence.join_tick)
        return sequence.generated

    # ---- planning ----

    def schedule(self, now_s: float) -> Step | None:
        """Plan the next step; None when nothing can run now (all wait for a load, a completion or an arrival).

        A plan that had to preempt admits nobody and loads nothing: the step in flight may still use the victims' pages and make their
        last tokens, and the next plan is made when it has completed.
        """
        self._preempted = False
        step = Step(index=self._next_step, shape=StepShape())
        self._take_growth_pages(step)
        step.joined, step.left = self._decoding.take_changes()
        decode_rows = len(self._decoding)
        budget = self.limits.max_num_batched_tokens - decode_rows
        budget = self._continue_prefills(step, budget)
        if not self._preempted:
            self._admit(step, budget, now_s)
            self._changed = False
        if not decode_rows and not step.prefills:
            self._steady = False
            self._decoding.put_back_left(step.left)
            return None
        self._next_step += 1
        step.shape = self._shape_of(step, decode_rows)
        self._end_last_tokens(step)
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
        steps = self._decoding.ticks_to_finish()
        free = self.pool.num_free + self.residency.evictable_pages
        rotations = -(-steps // self.limits.page_tokens)
        if rotations * len(self._decoding) <= free:
            return steps
        for done in range(steps):
            free -= len(self._decoding.growing(done))
            if free < 0:
                return done
        return steps

    def extend(self, steps: int) -> None:
        """Plan and complete `steps` further steps like the last one; at most `extendable()`."""
        for _ in range(steps):
            for sequence in self._decoding.growing():
                if not self.pool.num_free:
                    self.residency.evict(1)
                sequence.pages += self.pool.allocate(1)
            self._decoding.advance()
        self._next_step += steps

    # ---- decodes ----

    def _take_growth_pages(self, step: Step) -> None:
        growing = self._decoding.growing()
        while len(growing) > self.pool.num_free:
            self.residency.evict(len(growing))
            if len(growing) > self.pool.num_free:
                self._preempt(next(reversed(self._running)))
        for sequence in growing:
            pages = self.pool.allocate(1)
            sequence.pages += pages
            step.new_pages.append((sequence, pages[0]))

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
            for sequence in self._decoding.advance():
                self._decoding.leave(sequence)
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
                self._decoding.join(sequence)

    def _finish(self, sequence: Sequence, step: Step) -> None:
        del self._running[sequence]
        self._finishing[sequence] = None
        sequence.phase = Phase.FINISHING
        step.finishing.append(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        """Take everything from a running sequence; it waits at the front and computes its tokens again."""
        if sequence.phase is Phase.DECODE:
            self._decoding.leave(sequence)
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

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.limits.page_tokens)

    def _shape_of(self, step: Step, decode_rows: int) -> StepShape:
        lora = self._decoding.lora
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
            decode_kv_tokens=self._decoding.kv_tokens(),
            decode_kv_max=self._decoding.longest_kv() if decode_rows else 0,
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
        self._decoding.check_integrity(decoding)
        for s in decoding:
            kv_tokens = s.prefill_tokens + self._decoding.tick - s.join_tick
            assert len(s.pages) == self._pages_for(kv_tokens), f"{len(s.pages)} pages for {kv_tokens} tokens"
            assert s.prefill_tokens + s.request.output_tokens - s.generated <= self.limits.max_model_len + 1
        users: dict[str, int] = {}
        for s in self.running():
            if s.resident is not None:
                users[s.resident.name] = users.get(s.resident.name, 0) + 1
        assert users == self._running_adapters
        assert all(self.residency.get(name).users == count for name, count in users.items())
        assert all(s.phase is Phase.WAITING and not s.pages and s.slot == -1 for s in self._waiting)
