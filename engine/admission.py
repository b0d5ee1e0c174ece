"""Who of the waiting starts to run, and whose adapter is fetched meanwhile."""

from __future__ import annotations

from engine.prefills import Prefills
from engine.queues import QueueView, WaitingQueue
from engine.residency import AdapterState
from engine.running_set import RunningSet
from engine.sequence import Sequence
from engine.step import Load, PrefillChunk
from engine.unified_pool import UnifiedPool

# Python looks a member of an enumeration up in 0.15 µs, a global in none; these are asked for in every plan.
_RESIDENT = AdapterState.RESIDENT

MAX_LOADS_IN_FLIGHT = 8
LOOKAHEAD_MERGED = 1024  # and so many for those of the adapter that is merged
LOOKAHEAD_REQUESTS = 64  # so many waiting requests are looked at for admission and prefetch
WATERMARK_SHARE = 0.01  # admission leaves so much of the pool free while others run, for their growth


class _Kept:
    """What nobody may overtake the first waiting request into.

    pages: those it wants, its adapter's included where they are not taken yet. adapter: the one whose load it waits for, with a slot to run in.
    idle_adapter: the one that is there, while there is no room for its prompt.
    """

    __slots__ = ("adapter", "idle_adapter", "pages", "slots")

    def __init__(self) -> None:
        self.pages = 0
        self.slots = 0
        self.adapter: str | None = None
        self.idle_adapter: str | None = None


class Admission:
    """Admits in the queue's order while slots, pages and the step's token budget last; loads adapters for those further back.

    A request is admitted when its adapter is resident and its prompt's pages can be had; only the adapter's own requests wait for a load.
    """

    def __init__(
        self,
        queue: WaitingQueue,
        memory: UnifiedPool,
        running: RunningSet,
        prefills: Prefills,
        *,
        page_tokens: int,
        max_adapters_per_step: int | None,
    ) -> None:
        self.loads: list[Load] = []  # decided and not taken by the caller
        self.only: str | None = None  # the adapter that is merged: only its requests start
        self.watermark_pages = max(1, int(memory.kv.num_pages * WATERMARK_SHARE))
        self._queue = queue
        self._memory = memory
        self._residency = memory.residency
        self._running = running
        self._prefills = prefills
        self._page_tokens = page_tokens
        self._max_adapters = max_adapters_per_step
        self._window: list[Sequence] = []
        self._blocked = False  # the last attempt ended for another reason than the token budget

    def admit(
        self, chunks: list[PrefillChunk], budget: int, now_s: float, view: QueueView, *, changed: bool
    ) -> None:
        """Admit waiting requests in order and plan their first chunks; start loads for those whose adapters are not there.

        What ended for want of slots, pages or loads stays so until something changes, so it is not tried again before.
        """
        if self._blocked and not changed and not self._queue.time_dependent:
            return
        self._window = window = self._look(now_s, view)
        admitted: list[Sequence] = []
        kept = _Kept()
        position = 0
        for position, sequence in enumerate(window):
            if budget <= 0 or len(self._running.free_slots) <= kept.slots:
                break
            head = position == len(admitted)
            name = sequence.request.adapter
            if name is not None and not self._residency.is_resident(name):
                on_its_way = self._fetch(name, now_s, kept, head)
                if head:
                    self._keep_for(sequence, name, kept)
                    if not on_its_way:
                        position += 1
                        break
            elif self._fits(sequence, kept):
                self._start(sequence, now_s)
                admitted.append(sequence)
                budget -= self._prefills.plan_chunk(chunks, sequence, budget)
            else:
                if head:
                    kept.idle_adapter = name
                    kept.pages = self.watermark_pages + self._pages_for(sequence)
                position += 1
                break
        else:
            position = len(window)
        if position < len(window):
            self._look_ahead(position, position == len(admitted), now_s, kept)
        if kept.idle_adapter is not None:
            self._residency.touch(kept.idle_adapter)  # after the others, as it is wanted first
        self._blocked = budget > 0
        if admitted:
            self._queue.drop(admitted)

    def _look(self, now_s: float, view: QueueView) -> list[Sequence]:
        if self.only is None:
            return self._queue.window(LOOKAHEAD_REQUESTS, now_s, view)
        window = self._queue.window(LOOKAHEAD_MERGED, now_s, view)
        return [sequence for sequence in window if sequence.request.adapter == self.only][:LOOKAHEAD_REQUESTS]

    def _look_ahead(self, first: int, head: bool, now_s: float, kept: _Kept) -> None:
        """For requests that cannot start now, from place `first` of the window on: fetch their adapters, or keep them from being evicted.

        head: whether the first of them is the first waiting request.
        """
        residency = self._residency
        find = residency.held.get
        for position in range(first, len(self._window)):
            sequence = self._window[position]
            name = sequence.request.adapter
            adapter = None if name is None else find(name)
            if name is None or (adapter is not None and adapter.users):
                continue
            if adapter is not None and adapter.state is _RESIDENT:
                residency.touch_idle(adapter)
                continue
            at_head = head and position == first
            self._fetch(name, now_s, kept, at_head)
            if at_head:
                self._keep_for(sequence, name, kept)

    def _keep_for(self, sequence: Sequence, name: str, kept: _Kept) -> None:
        """Keep what the first waiting request will need when its adapter is there."""
        kept.adapter, kept.slots = name, 1
        kept.pages = self.watermark_pages + self._pages_for(sequence)
        if self._memory.shared and name not in self._residency.held:
            kept.pages += self._residency.footprints[name].pages

    def _fetch(self, name: str, now_s: float, kept: _Kept, head: bool) -> bool:
        """Start the load of an adapter that is not resident; return whether it is on its way, or will be when another load has ended."""
        if name in self._residency.held or self._residency.num_loading >= MAX_LOADS_IN_FLIGHT:
            return True
        return self._start_load(name, now_s, kept.pages, head)

    def _start_load(self, name: str, now_s: float, reserve: int, head: bool) -> bool:
        """Start a load where there is room for it.

        The first waiting request may take any idle adapter's pages and all of the watermark; one further back must leave `reserve` pages, and
        the adapters that others wait for.
        """
        spare = 0 if head else reserve + (self.watermark_pages if self._running.active else 0)
        keep = () if head else {sequence.request.adapter for sequence in self._window}
        adapter = self._memory.start_load(name, now_s, spare=spare, keep=keep)
        if adapter is None:
            return False
        self.loads.append(Load(name, adapter.slot, tuple(adapter.pages), adapter.footprint.copy_bytes))
        return True

    def _fits(self, sequence: Sequence, kept: _Kept) -> bool:
        name, in_use = sequence.request.adapter, self._running.adapters
        if self._max_adapters is not None and name is not None and name not in in_use:
            promised = kept.adapter is not None and kept.adapter not in in_use and kept.adapter != name
            if len(in_use) + promised >= self._max_adapters:
                return False
        pages = self._pages_for(sequence)
        room = self._memory.available(name) - kept.pages
        if self._running.active or self._running.finishing:
            room -= self.watermark_pages
        if pages <= room:
            return True
        return (
            sequence.request.page_keys is not None
            and self._memory.missing_pages(pages, self._match(sequence)) <= room
        )

    def _start(self, sequence: Sequence, now_s: float) -> None:
        matched = self._match(sequence)
        first_time = sequence.admitted_s is None
        self._running.start(sequence, self._pages_for(sequence), matched, now_s)
        sequence.prefilled = sequence.cached_tokens = len(matched) * self._page_tokens
        if first_time:
            sequence.found_tokens = sequence.cached_tokens
            self._memory.looked_up(sequence.request, sequence.cached_tokens)
        self._prefills.sequences[sequence] = None

    def _match(self, sequence: Sequence) -> list[int]:
        """Return the pages of its prompt that are there already; one token at least is left to compute."""
        if sequence.request.page_keys is None:
            return []
        return self._memory.match(sequence.request, (sequence.prefill_tokens - 1) // self._page_tokens)

    def _pages_for(self, sequence: Sequence) -> int:
        return -(-sequence.prefill_tokens // self._page_tokens)
