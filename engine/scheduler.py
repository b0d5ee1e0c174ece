"""The scheduler: a torch-free state machine that decides what each step does.

Requests go in, `schedule()` plans a `Step`, `complete()` tells that the GPU has done it. The engine and the simulator drive the same object;
step n+1 may be planned before step n completes. Who is admitted, `engine/admission.py` says; what running requests hold is in
`engine/running_set.py`, prompts are planned by `engine/prefills.py` and decodes by `engine/decode_set.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping

from engine.admission import Admission
from engine.decode_set import DecodeSet
from engine.errors import UserError
from engine.merge_mode import MergeMode
from engine.merge_policy import MergePolicy
from engine.pool import PagePool
from engine.prefills import Prefills
from engine.queues import new_queue
from engine.registered_adapters import RegisteredAdapters
from engine.requests import Request
from engine.residency import AdapterFootprint, Residency
from engine.running_set import RunningSet
from engine.scheduler_limits import SchedulerLimits as SchedulerLimits
from engine.sequence import Phase, Sequence
from engine.step import Load, PrefillChunk, Step
from engine.step_shape import shape_of
from engine.unified_pool import UnifiedPool

# Python looks a member of an enumeration up in 0.15 µs, a global in none; these are asked for in every plan.
_DECODE = Phase.DECODE
_DONE = Phase.DONE


class RefusedError(ValueError):
    """A request that can never run, with the reason."""


class Scheduler:
    """Chunked prefill mixed with decodes; who is served first, the policy's queue says (engine/queues.py).

    Every decoding sequence is in every step; prompts fill what `max_num_batched_tokens` leaves, in order of admission. Out of pages: what is kept
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
        self.pool: PagePool = self.memory.kv  # KV's pages, and adapters' unless they have their own
        self.residency: Residency = self.memory.residency
        self.queue = new_queue(
            limits.policy, ttft_slo_s=limits.ttft_slo_s, adapter_weights=limits.adapter_weights
        )
        self.preemptions = 0
        self._adapters = RegisteredAdapters(self.memory)
        self._running = RunningSet(limits.max_num_seqs, self.memory, limits.hot_adapter)
        self._prefills = Prefills(limits.page_tokens, self.memory, self.queue)
        self._decoding = DecodeSet(limits.page_tokens)
        self._admission = Admission(
            self.queue,
            self.memory,
            self._running,
            self._prefills,
            page_tokens=limits.page_tokens,
            max_adapters_per_step=limits.max_adapters_per_step,
        )
        self.loads: list[Load] = self._admission.loads  # decided and not taken yet
        self.hot: Load | None = None if limits.hot_adapter is None else self._hold(limits.hot_adapter)
        self.fixed = [self._hold(name) for name in limits.fixed_adapters]
        self.residency.loads = 0  # what is there from the start is none
        self.merging: MergeMode | None = None
        if limits.merge_thresholds is not None:
            self.merging = MergeMode(
                MergePolicy(*limits.merge_thresholds),
                self.residency,
                self._running,
                self._prefills,
                self._decoding,
                self._admission,
            )
        self._refused: list[tuple[Sequence, str]] = []
        self._in_flight: list[Step] = []  # planned and not complete
        self._order = 0
        self._next_step = 0
        self.steady = False  # the running sequences would be planned again as in the last plan, but for one more KV token each
        self._changed = True  # something happened since the last plan that could admit a request
        self._preempted = False  # by the plan being made

    def _hold(self, name: str) -> Load:
        """Take pages for an adapter for good, before any request; whoever drives the scheduler copies it there first."""
        adapter = self.memory.start_load(name, 0.0, spare=0, keep=())
        if adapter is None:
            raise UserError(f"adapter {name!r}: the pool has no room for it")
        self.residency.finish_load(name, 0.0)
        self.residency.pin(name)
        return Load(name, adapter.slot, tuple(adapter.pages), adapter.footprint.copy_bytes)

    def count_pages(self) -> None:
        """Take pages by number from now on where nobody needs their names: no page table is written from what is planned."""
        if self.num_running:
            raise ValueError("requests run whose pages have names")
        self.memory.names_pages = False

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
            self._adapters.request_came(request.adapter)
        if self.merging is not None:
            self.merging.policy.came(request.adapter)
        self._changed = True
        return sequence

    def why_refused(self, request: Request) -> str | None:
        """Return why a request can never run, or None."""
        if request.prompt_tokens < 1 or request.output_tokens < 1:
            return f"prompt_tokens={request.prompt_tokens} and output_tokens={request.output_tokens} must be at least 1"
        tokens = request.prompt_tokens + request.output_tokens
        if tokens > self.limits.max_model_len:
            return f"{tokens} tokens exceed max_model_len={self.limits.max_model_len}"
        if request.adapter is not None and not self._adapters.may_be_named(request.adapter):
            return f"adapter {request.adapter!r} is not registered"
        return self.memory.why_never(tokens, -(-tokens // self.limits.page_tokens), request.adapter)

    def abort(self, sequence: Sequence) -> None:
        """Drop a request that is not wanted any more, or has produced all it will; what is planned for it is done and ignored."""
        if sequence.phase is Phase.WAITING:
            self.queue.remove(sequence)
            self._end(sequence)
        elif sequence.phase in (Phase.PREFILL, _DECODE, Phase.ASIDE):
            self._stop_planning(sequence)
            self._running.finish(sequence)
            if self._in_flight:
                self._in_flight[-1].dropped += (sequence,)
            else:
                self._let_go(sequence)
        self._changed = True
        self.steady = False

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
        self._adapters.register(name, footprint)
        if self.merging is not None:
            self.merging.registered(name)

    def unregister(self, name: str) -> None:
        """Take no more requests for an adapter. Those that are there are served; then its pages go, and `is_registered` is false.

        Raises ValueError where the name is unknown, or the adapter is merged for good.
        """
        if name in self.residency.pinned:
            raise ValueError(f"adapter {name!r} stays: it is merged into the weights, or dynamic")
        self._adapters.unregister(name)

    def is_registered(self, name: str) -> bool:
        """Whether an adapter's weights may still be asked for."""
        return name in self._adapters

    # ---- what is going on ----

    @property
    def num_waiting(self) -> int:
        return len(self.queue)

    @property
    def num_running(self) -> int:
        return self.limits.max_num_seqs - len(self._running.free_slots)

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
        return self.residency.is_resident(adapter)

    def is_running(self, adapter: str) -> bool:
        """Whether a running request uses an adapter."""
        return adapter in self._running.adapters

    def running_adapters(self) -> Iterable[str]:
        """Return the adapters that running requests use, each once."""
        return self._running.adapters.keys()

    def planned_tokens(self, sequence: Sequence) -> int:
        """Return how many output tokens of a sequence have been planned."""
        if sequence.phase is _DECODE:
            return sequence.generated + max(0, self._decoding.tick - sequence.join_tick)
        return sequence.generated

    # ---- planning ----

    def schedule(self, now_s: float) -> Step | None:
        """Plan the next step; None when nothing can run now (all wait for a load, a completion or an arrival).

        A plan that had to preempt admits nobody and loads nothing: the step in flight may still use the victims' pages and make their
        last tokens, and the next plan is made when it has completed.
        """
        self._preempted = False
        if self.queue.time_dependent:
            self._turn_away(now_s)
        if self.merging is not None and self.merging.choose(now_s):
            self._changed = True
        decoding = self._decoding
        growing = decoding.growing()
        new_pages = self._take_growth_pages(growing) if growing else []
        joined, left = decoding.take_changes()
        decode_rows = decoding.size
        chunks: list[PrefillChunk] = []
        budget = self.limits.max_num_batched_tokens - decode_rows
        if self._prefills.sequences:
            budget = self._prefills.continue_all(chunks, budget)
        if not self._preempted:
            if self.queue:
                self._admission.admit(chunks, budget, now_s, self, changed=self._changed)
            self._changed = False
        if not decode_rows and not chunks:
            self.steady = False
            decoding.put_back_left(left)
            if self.merging is not None and self.merging.give_up(now_s):
                self._changed = True
                return self.schedule(now_s)
            return None
        shape = shape_of(decoding, decode_rows, chunks)
        finishing = self._end_last_tokens(decode_rows, chunks)
        step = Step(self._next_step, shape, joined, left, new_pages, chunks, finishing)
        if self.merging is not None:
            self.merging.planned(step)
        self._next_step += 1
        self._in_flight.append(step)
        self.steady = not chunks and not self._prefills.sequences and not finishing
        return step

    def take_loads(self) -> list[Load]:
        """Hand over the adapter loads decided since the last call, in order. The caller starts them and reports `load_finished`."""
        loads = self.loads[:]
        self.loads.clear()
        return loads

    def complete(self, step: Step) -> None:
        """Note that the GPU has done a planned step: what ended in it gives its pages, slot and adapter back."""
        self._in_flight.remove(step)
        for sequence in step.finishing:
            self._let_go(sequence)
        for sequence in step.dropped:
            self._let_go(sequence)

    def load_finished(self, adapter: str, now_s: float) -> None:
        """Note that an adapter's bytes are on the GPU."""
        self.residency.finish_load(adapter, now_s)
        if self.merging is not None:
            self.merging.policy.look_again()
        self._adapters.retire_if_unused(adapter)
        self._changed = True

    def load_failed(self, adapter: str) -> list[Sequence]:
        """Note that an adapter's bytes cannot be had; return the requests that waited for it, which are dropped."""
        self.residency.load_failed(adapter)
        wanted_it = [sequence for sequence in self.queue if sequence.request.adapter == adapter]
        for sequence in wanted_it:
            self.queue.remove(sequence)
            self._end(sequence)
        self._adapters.retire_if_unused(adapter)
        self._changed = True
        return wanted_it

    def _turn_away(self, now_s: float) -> None:
        for sequence in self.queue.expired(now_s):
            self.queue.remove(sequence)
            self._end(sequence)
            self._refused.append(
                (sequence, f"its first token could not come within {self.limits.ttft_slo_s} s")
            )

    def _take_growth_pages(self, growing: Collection[Sequence]) -> list[tuple[Sequence, int]]:
        """Take a page for each of these decode rows, preempting where there are none; return the names of those that have one.

        growing: as the decode set has it, so a preempted sequence is not in it any more.
        """
        pool = self.pool
        while len(growing) > pool.num_free:
            self.memory.make_room(len(growing))
            if len(growing) > pool.num_free:
                self._preempt(next(reversed(self._running.active)))
        pool.reserve(len(growing))
        if not self.memory.names_pages:
            return []
        new_pages = list(zip(growing, pool.name(len(growing)), strict=True))
        for sequence, page in new_pages:
            sequence.pages.append(page)
        return new_pages

    # ---- many equal steps at once ----

    def extendable(self) -> int:
        """Return how many further steps would be planned exactly like the last one, but for one more KV token a row each."""
        if not self.steady or (self.queue and (self._changed or self.queue.time_dependent)):
            return 0
        decoding = self._decoding
        steps = decoding.ticks_to_finish()
        if self.merging is not None:
            steps = int(min(steps, self.merging.policy.quiet_steps()))
        free = self.pool.num_free + self.memory.evictable_pages
        if decoding.size * (steps // self.limits.page_tokens + 1) <= free:  # what they take at most
            return steps
        for done in range(steps):
            free -= decoding.growth_at(done)
            if free < 0:
                return done
        return steps

    def extend(self, steps: int) -> None:
        """Plan and complete `steps` further steps like the last one; at most `extendable()`."""
        growth = self._decoding.growth(steps)
        if growth <= self.pool.num_free and not self.memory.names_pages:
            self.pool.reserve(growth)
            self._decoding.skip(steps)
        else:  # what is evicted or overwritten, and when, is as in single steps
            for _ in range(steps):
                self._take_growth_pages(self._decoding.growing())
                self._decoding.skip(1)
        self._next_step += steps
        if self.merging is not None:
            self.merging.policy.ran(steps * self._decoding.size, steps)

    # ---- ends ----

    def _end_last_tokens(self, decode_rows: int, chunks: list[PrefillChunk]) -> list[Sequence]:
        """Move on what is planned: prefills that end in it, and decodes whose last token it makes. Return who makes the last token."""
        finishing: list[Sequence] = []
        if decode_rows:
            for sequence in self._decoding.advance():
                self._decoding.leave(sequence)
                finishing.append(sequence)
        for chunk in chunks:
            if not chunk.last:
                continue
            sequence = chunk.sequence
            del self._prefills.sequences[sequence]
            sequence.generated += 1
            if sequence.generated == sequence.request.output_tokens:
                finishing.append(sequence)
            else:
                self._decoding.join(sequence)
        for sequence in finishing:
            self._running.finish(sequence)
        return finishing

    def _preempt(self, sequence: Sequence) -> None:
        """Take everything from a running sequence; it waits at the front and computes its tokens again."""
        self._stop_planning(sequence)
        del self._running.active[sequence]
        self.queue.served(sequence, 0, sequence.generated)
        self._running.let_go(sequence)
        sequence.phase = Phase.WAITING
        sequence.prefill_tokens = sequence.request.prompt_tokens + sequence.generated
        sequence.prefilled = 0
        sequence.preemptions += 1
        self.preemptions += 1
        self.queue.push_front(sequence)
        self._preempted = True
        self._changed = True

    def _stop_planning(self, sequence: Sequence) -> None:
        if self.merging is not None and self.merging.forget(sequence):
            return
        if sequence.phase is _DECODE:
            self._decoding.leave(sequence)
        else:
            del self._prefills.sequences[sequence]

    def _let_go(self, sequence: Sequence) -> None:
        """Take everything from a sequence that has made its last token, or was dropped."""
        del self._running.finishing[sequence]
        self.queue.served(sequence, 0, sequence.generated)
        self._running.let_go(sequence)
        self._end(sequence)
        self._changed = True

    def _end(self, sequence: Sequence) -> None:
        """Note that nothing more will come of a request."""
        sequence.phase = _DONE
        if self.merging is not None:
            self.merging.policy.ended(sequence.request.adapter)
        if sequence.request.adapter is not None:
            self._adapters.request_ended(sequence.request.adapter)

    # ---- integrity ----

    def running(self) -> Iterator[Sequence]:
        """Yield the sequences that hold pages."""
        return iter(self._running)

    def check_integrity(self) -> None:
        """Raise AssertionError unless pages are conserved and all counters agree with the sequences."""
        page_tokens = self.limits.page_tokens
        decoding = [s for s in self._running.active if s.phase is _DECODE]
        nameless = 0
        for s in self._running:
            held = self._decoding.pages_of(s) if s.phase is _DECODE else s.held_pages
            assert held >= len(s.pages), f"{len(s.pages)} pages are named of {held}"
            nameless += held - len(s.pages)
        assert not (nameless and self.memory.names_pages), f"{nameless} pages have no name"
        self.memory.check_integrity((s.pages for s in self._running), nameless)
        self._running.check_integrity()
        self._decoding.check_integrity(decoding)
        for s in self._prefills.sequences:
            assert s.held_pages == -(-s.prefill_tokens // page_tokens), (
                f"{s.held_pages} pages for {s.prefill_tokens} tokens"
            )
        for s in decoding:
            assert s.prefill_tokens + s.request.output_tokens - s.generated <= self.limits.max_model_len + 1
        assert all(s.phase is Phase.WAITING and not s.held_pages and s.slot == -1 for s in self.queue)
        if self.merging is not None:
            self.merging.check_integrity()
        assert all(s in self._running.finishing for step in self._in_flight for s in step.dropped)
