"""The scheduler: a torch-free state machine that decides what each step does.

Requests go in, `schedule()` plans a `Step`, `complete()` tells that the GPU has done it. The engine and the simulator drive the same object;
step n+1 may be planned before step n completes.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from engine.config import AdapterEviction, SchedulerPolicy
from engine.decode_set import DecodeSet
from engine.pool import PagePool
from engine.queues import new_queue
from engine.requests import Request
from engine.residency import AdapterFootprint, AdapterState, Residency
from engine.sequence import Phase, Sequence
from engine.step import Load, PrefillChunk, Step, StepShape
from engine.step_shape import shape_of
from engine.unified_pool import UnifiedPool

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
    max_adapters: int | None = None
    policy: SchedulerPolicy = "fcfs"
    ttft_slo_s: float | None = None
    adapter_weights: Mapping[str, float] = field(default_factory=dict, hash=False)
    adapter_eviction: AdapterEviction = "lru"
    adapter_pool_pages: int | None = None
    prefix_caching: bool = True


@dataclass(slots=True)
class _Kept:
    """What nobody may overtake the first waiting request into.

    pages: those it wants, its adapter's included where they are not taken yet. adapter: the one whose load it waits for, with a slot to run in.
    idle_adapter: the one that is there, while there is no room for its prompt.
    """

    pages: int = 0
    slots: int = 0
    adapter: str | None = None
    idle_adapter: str | None = None


class RefusedError(ValueError):
    """A request that can never run, with the reason."""


class Scheduler:
    """Chunked prefill mixed with decodes; who is served first, the policy's queue says (engine/queues.py).

    Every decoding sequence is in every step; prompts fill what `max_num_batched_tokens` leaves, in order of admission. A request is admitted
    when its adapter is resident and its prompt's pages can be had; only the adapter's own requests wait for a load. Out of pages: what is kept
    for later is evicted (engine/unified_pool.py), then the youngest sequence is preempted and later computed again.
    """

    def __init__(
        self, limits: SchedulerLimits, num_pages: int, footprints: Mapping[str, AdapterFootprint]
    ) -> None:
        self.limits = limits
        self.memory = UnifiedPool(
            num_pages,
            footprints,
            adapter_pages=limits.adapter_pool_pages,
            max_adapters=limits.max_adapters,
            eviction=limits.adapter_eviction,
            prefix_caching=limits.prefix_caching,
        )
        self.queue = new_queue(
            limits.policy, ttft_slo_s=limits.ttft_slo_s, adapter_weights=limits.adapter_weights
        )
        self.preemptions = 0
        self._refused: list[tuple[Sequence, str]] = []
        self._unfinished: dict[str, int] = {}  # requests by adapter
        self._retired: set[str] = set()  # adapters that go when their last request has ended
        self._in_flight: list[Step] = []  # planned and not complete
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
        self._watermark_pages = max(1, int(self.pool.num_pages * WATERMARK_SHARE))

    # ---- requests in ----

    def add(self, request: Request) -> Sequence:
        """Queue a request. Raises RefusedError when it could not run even alone."""
        reason = self.why_refused(request)
        if reason is not None:
            raise RefusedError(reason)
        sequence = Sequence(request, self._order, request.prompt_tokens)
        self._order += 1
        self.queue.push(sequence)
        if request.adapter is not None:
            self._unfinished[request.adapter] = self._unfinished.get(request.adapter, 0) + 1
        self._changed = True
        return sequence

    def why_refused(self, request: Request) -> str | None:
        """Return why a request can never run, or None."""
        if request.prompt_tokens < 1 or request.output_tokens < 1:
            return f"prompt_tokens={request.prompt_tokens} and output_tokens={request.output_tokens} must be at least 1"
        tokens = request.prompt_tokens + request.output_tokens
        if tokens > self.limits.max_model_len:
            return f"{tokens} tokens exceed max_model_len={self.limits.max_model_len}"
        if request.adapter is not None and (
            request.adapter not in self.residency.footprints or request.adapter in self._retired
        ):
            return f"adapter {request.adapter!r} is not registered"
        return self.memory.why_never(tokens, self._pages_for(tokens), request.adapter)

    def abort(self, sequence: Sequence) -> None:
        """Drop a request that is not wanted any more, or has produced all it will; what is planned for it is done and ignored."""
        if sequence.phase is Phase.WAITING:
            self.queue.remove(sequence)
            self._end(sequence)
        elif sequence.phase in (Phase.PREFILL, Phase.DECODE):
            self._stop_running(sequence)
            sequence.phase = Phase.FINISHING
            if self._in_flight:
                self._finishing[sequence] = None
                self._in_flight[-1].dropped.append(sequence)
            else:
                self._let_go(sequence)
                self._end(sequence)
        self._changed = True
        self._steady = False

    def keep_output(self, sequence: Sequence, keys: Iterable[Hashable]) -> None:
        """Note what is in the full pages of a request that has produced its last token; its pages must not be given back yet.

        keys: as `Request.page_keys`, of prompt and output.
        """
        pages = sequence.pages
        if sequence.prefilled < sequence.prefill_tokens:
            pages = pages[: sequence.prefilled // self.limits.page_tokens]
        for key, page in zip(keys, pages, strict=False):
            self.memory.note(key, page, sequence.request.adapter)

    def take_refused(self) -> list[tuple[Sequence, str]]:
        """Hand over the requests that were turned away since the last call, with the reason."""
        refused, self._refused = self._refused, []
        return refused

    # ---- adapters that come and go ----

    def register(self, name: str, footprint: AdapterFootprint) -> None:
        """Let requests name an adapter. Raises ValueError where the name is taken."""
        if name in self.residency.footprints:
            raise ValueError(f"adapter {name!r} is registered already")
        self.residency.footprints[name] = footprint

    def unregister(self, name: str) -> None:
        """Take no more requests for an adapter. Those that are there are served; then its pages go, and `is_registered` is false."""
        if name not in self.residency.footprints or name in self._retired:
            raise ValueError(f"adapter {name!r} is not registered")
        self._retired.add(name)
        self._retire_if_unused(name)

    def is_registered(self, name: str) -> bool:
        """Whether an adapter's weights may still be asked for."""
        return name in self.residency.footprints

    def _retire_if_unused(self, name: str) -> None:
        if name not in self._retired or name in self._unfinished:
            return
        if self.residency.state(name) is AdapterState.LOADING:
            return  # when it has ended
        self.memory.forget_adapter(name)
        self._retired.discard(name)
        del self.residency.footprints[name]

    # ---- what is going on ----

    @property
    def pool(self) -> PagePool:
        """The pages of KV, and of adapters unless they have their own."""
        return self.memory.kv

    @property
    def residency(self) -> Residency:
        return self.memory.residency

    @property
    def num_waiting(self) -> int:
        return len(self.queue)

    @property
    def num_running(self) -> int:
        return len(self._running) + len(self._finishing)

    @property
    def num_unfinished(self) -> int:
        return len(self.queue) + self.num_running

    @property
    def kv_pages(self) -> int:
        """Pages that requests hold."""
        return self.memory.kv_pages

    @property
    def prefix_queried_tokens(self) -> int:
        """Prompt tokens of admitted requests that were looked for in the prefix cache."""
        return 0 if self.memory.prefixes is None else self.memory.prefixes.queried_tokens

    @property
    def prefix_hit_tokens(self) -> int:
        """Those of them that were found."""
        return 0 if self.memory.prefixes is None else self.memory.prefixes.hit_tokens

    def is_resident(self, adapter: str) -> bool:
        """Whether an adapter's weights are on the GPU."""
        return self.residency.state(adapter) is AdapterState.RESIDENT

    def is_running(self, adapter: str) -> bool:
        """Whether a running request uses an adapter."""
        return adapter in self._running_adapters

    def running_adapters(self) -> Iterable[str]:
        """Return the adapters that running requests use, each once."""
        return self._running_adapters.keys()

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
        self._turn_away(now_s)
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
        self._in_flight.append(step)
        step.shape = shape_of(self._decoding, decode_rows, step.prefills)
        self._end_last_tokens(step)
        self._steady = not step.prefills and not self._prefilling and not step.finishing
        return step

    def take_loads(self) -> list[Load]:
        """Hand over the adapter loads decided since the last call, in order. The caller starts them and reports `load_finished`."""
        loads, self._loads = self._loads, []
        return loads

    def complete(self, step: Step) -> None:
        """Note that the GPU has done a planned step: what ended in it gives its pages, slot and adapter back."""
        self._in_flight.remove(step)
        for sequence in (*step.finishing, *step.dropped):
            del self._finishing[sequence]
            self._let_go(sequence)
            self._end(sequence)
            self._changed = True

    def load_finished(self, adapter: str, now_s: float) -> None:
        """Note that an adapter's bytes are on the GPU."""
        self.residency.finish_load(adapter, now_s)
        self._retire_if_unused(adapter)
        self._changed = True

    def load_failed(self, adapter: str) -> list[Sequence]:
        """Note that an adapter's bytes cannot be had; return the requests that waited for it, which are dropped."""
        self.residency.load_failed(adapter)
        wanted_it = [sequence for sequence in self.queue if sequence.request.adapter == adapter]
        for sequence in wanted_it:
            self.queue.remove(sequence)
            self._end(sequence)
        self._retire_if_unused(adapter)
        self._changed = True
        return wanted_it

    # ---- many equal steps at once ----

    def extendable(self) -> int:
        """Return how many further steps would be planned exactly like the last one, but for one more KV token a row each."""
        if not self._steady or (self.queue and (self._changed or self.queue.time_dependent)):
            return 0
        steps = self._decoding.ticks_to_finish()
        free = self.pool.num_free + self.memory.evictable_pages
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
            growing = self._decoding.growing()
            self.memory.make_room(len(growing))
            for sequence in growing:
                sequence.pages += self.pool.allocate(1)
            self._decoding.advance()
        self._next_step += steps

    # ---- decodes ----

    def _take_growth_pages(self, step: Step) -> None:
        growing = self._decoding.growing()
        while len(growing) > self.pool.num_free:
            self.memory.make_room(len(growing))
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
        start, end = sequence.prefilled, sequence.prefilled + length
        step.prefills.append(PrefillChunk(sequence, start, length, end == sequence.prefill_tokens))
        sequence.prefilled = end
        page_tokens = self.limits.page_tokens
        # Whoever shares these pages computes in a later step, or behind them in this one: every layer writes KV before it attends.
        self.memory.filled(sequence.request, sequence.pages, start // page_tokens, end // page_tokens)
        self.queue.served(sequence, length, 0)
        return length

    def _turn_away(self, now_s: float) -> None:
        if not self.queue.time_dependent:
            return
        for sequence in self.queue.expired(now_s):
            self.queue.remove(sequence)
            self._end(sequence)
            self._refused.append(
                (sequence, f"its first token could not come within {self.limits.ttft_slo_s} s")
            )

    def _admit(self, step: Step, budget: int, now_s: float) -> None:
        """Admit waiting requests in order; start loads for those further back whose adapters are not there.

        What ended for want of slots, pages or loads stays so until something changes, so it is not tried again before.
        """
        if not self.queue or (self._blocked and not self._changed and not self.queue.time_dependent):
            return
        admitted: list[Sequence] = []
        may_admit = True
        kept = _Kept()
        window = self.queue.window(LOOKAHEAD_REQUESTS, now_s, self)
        wanted = {sequence.request.adapter for sequence in window}
        for position, sequence in enumerate(window):
            head = position == len(admitted)
            may_admit = may_admit and budget > 0 and len(self._free_slots) > kept.slots
            name = sequence.request.adapter
            if name is not None and not self.is_resident(name):
                on_its_way = self._fetch(name, now_s, kept, wanted, head)
                if head:
                    may_admit = may_admit and on_its_way
                    kept.adapter, kept.slots = name, 1
                    kept.pages = self._watermark_pages + self._pages_for(sequence.prefill_tokens)
                    if self.memory.shared and self.residency.state(name) is AdapterState.ABSENT:
                        kept.pages += self.residency.footprints[name].pages
            elif may_admit and self._fits(sequence, kept):
                self._start(sequence, now_s)
                admitted.append(sequence)
                budget -= self._plan_chunk(step, sequence, budget)
            elif may_admit:
                may_admit = False
                if head:
                    kept.idle_adapter = name
                    kept.pages = self._watermark_pages + self._pages_for(sequence.prefill_tokens)
            elif name is not None:
                self.residency.touch(name)
        if kept.idle_adapter is not None:
            self.residency.touch(kept.idle_adapter)  # after the others, as it is wanted first
        self._blocked = budget > 0
        if admitted:
            self.queue.drop(admitted)

    def _fetch(self, name: str, now_s: float, kept: _Kept, wanted: set[str | None], head: bool) -> bool:
        """Start the load of an adapter that is not resident; return whether it is on its way, or will be when another load has ended."""
        if (
            self.residency.state(name) is AdapterState.LOADING
            or self.residency.num_loading >= MAX_LOADS_IN_FLIGHT
        ):
            return True
        return self._start_load(name, now_s, kept.pages, wanted, head)

    def _fits(self, sequence: Sequence, kept: _Kept) -> bool:
        name = sequence.request.adapter
        cap = self.limits.max_adapters_per_step
        if cap is not None and name is not None and name not in self._running_adapters:
            promised = kept.adapter is not None and kept.adapter not in (name, *self._running_adapters)
            if len(self._running_adapters) + promised >= cap:
                return False
        pages = self._pages_for(sequence.prefill_tokens)
        room = self.memory.available(name) - kept.pages
        if self._running or self._finishing:
            room -= self._watermark_pages
        return pages <= room or self.memory.missing_pages(pages, self._match(sequence)) <= room

    def _match(self, sequence: Sequence) -> list[int]:
        """Return the pages of its prompt that are there already; one token at least is left to compute."""
        return self.memory.match(sequence.request, (sequence.prefill_tokens - 1) // self.limits.page_tokens)

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
        matched = self._match(sequence)
        wanted = self._pages_for(sequence.prefill_tokens)
        sequence.pages = self.memory.admit(sequence.request, wanted, matched)
        sequence.cached_tokens = len(matched) * self.limits.page_tokens
        sequence.slot = self._free_slots.pop()
        sequence.phase = Phase.PREFILL
        sequence.prefilled = sequence.cached_tokens
        if sequence.admitted_s is None:
            sequence.admitted_s = now_s
            sequence.found_tokens = sequence.cached_tokens
            self.memory.looked_up(sequence.request, sequence.cached_tokens)
        self._running[sequence] = None
        self._prefilling[sequence] = None

    def _start_load(self, name: str, now_s: float, reserve: int, wanted: set[str | None], head: bool) -> bool:
        """Start a load where there is room for it.

        The first waiting request may take any idle adapter's pages and all of the watermark; one further back must leave `reserve` pages, and
        the adapters that others wait for.
        """
        spare = 0 if head else reserve + (self._watermark_pages if self._running else 0)
        adapter = self.memory.start_load(name, now_s, spare=spare, keep=() if head else wanted)
        if adapter is None:
            return False
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
        self._stop_running(sequence)
        self._let_go(sequence)
        sequence.phase = Phase.WAITING
        sequence.prefill_tokens = sequence.request.prompt_tokens + sequence.generated
        sequence.prefilled = 0
        sequence.preemptions += 1
        self.preemptions += 1
        self.queue.push_front(sequence)
        self._preempted = True
        self._changed = True

    def _stop_running(self, sequence: Sequence) -> None:
        if sequence.phase is Phase.DECODE:
            self._decoding.leave(sequence)
        else:
            del self._prefilling[sequence]
        del self._running[sequence]

    def _end(self, sequence: Sequence) -> None:
        """Note that nothing more will come of a request."""
        sequence.phase = Phase.DONE
        name = sequence.request.adapter
        if name is None:
            return
        self._unfinished[name] -= 1
        if not self._unfinished[name]:
            del self._unfinished[name]
            self._retire_if_unused(name)

    def _let_go(self, sequence: Sequence) -> None:
        self.queue.served(sequence, 0, sequence.generated)
        self.memory.release(sequence.pages)
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

    # ---- integrity ----

    def running(self) -> Iterator[Sequence]:
        """Yield the sequences that hold pages."""
        yield from self._running
        yield from self._finishing

    def check_integrity(self) -> None:
        """Raise AssertionError unless pages are conserved and all counters agree with the sequences."""
        self.memory.check_integrity(sequence.pages for sequence in self.running())
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
        assert all(s.phase is Phase.WAITING and not s.pages and s.slot == -1 for s in self.queue)
        assert all(sequence in self._finishing for step in self._in_flight for sequence in step.dropped)
