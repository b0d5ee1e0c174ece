"""Adapter clustering: waiting requests whose adapter is in use already go first, so that a step has few distinct adapters."""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Collection, Iterator
from itertools import islice

from engine.queue_view import QueueView
from engine.sequence import Sequence

MOST_OVERTAKES = 1024  # 23 s at 45 admissions a second; docs/scheduling.md has what 128 to 8192 give
SCAN_REQUESTS = 256  # so many of the oldest are searched for adapters that do not run


class ClusteredQueue:
    """Requests of running adapters and of the base model, then of resident adapters, then the rest; each in order of arrival.

    S-LoRA's `cluster(d)` (arXiv:2311.03285, section on adapter clustering), with `max_adapters_per_step` as its d. Among resident
    adapters that do not run, one adapter's requests stay together: when the first is admitted the others may follow it.

    Ageing: a request is overtaken when one that came later is admitted before it. After `most_overtakes` of them it goes before all but
    preempted ones, so nobody is overtaken more often than that and by what one more window admits, and nobody starves. Counted, not timed:
    under overload every wait exceeds any bound in seconds, and a timed bound would turn clustering off just when it is wanted. Who gives
    up counts as overtaking, too. Where the cap is reached, an aged request waits for a running adapter to end, and all wait behind it: a small
    bound together with a small cap costs throughput.
    """

    time_dependent = False

    def __init__(self, *, most_overtakes: int = MOST_OVERTAKES) -> None:
        self._most_overtakes = most_overtakes
        self._preempted: deque[Sequence] = deque()
        self._waiting: OrderedDict[Sequence, int] = OrderedDict()  # oldest first; the value counts arrivals
        self._by_adapter: dict[str | None, OrderedDict[Sequence, int]] = {}
        self._arrived = 0
        self._left = 0

    def __len__(self) -> int:
        return len(self._preempted) + len(self._waiting)

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._preempted
        yield from self._waiting

    def push(self, sequence: Sequence) -> None:
        """Take in a new request."""
        self._waiting[sequence] = self._arrived
        self._by_adapter.setdefault(sequence.request.adapter, OrderedDict())[sequence] = self._arrived
        self._arrived += 1

    def push_front(self, sequence: Sequence) -> None:
        """Take back a preempted one, which goes before all others."""
        self._preempted.appendleft(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget one that gave up."""
        if sequence not in self._waiting:
            self._preempted.remove(sequence)
            return
        del self._waiting[sequence]
        siblings = self._by_adapter[sequence.request.adapter]
        del siblings[sequence]
        if not siblings:
            del self._by_adapter[sequence.request.adapter]
        self._left += 1

    def drop(self, admitted: Collection[Sequence]) -> None:
        """Note that these of the last window were admitted."""
        for sequence in admitted:
            self.remove(sequence)

    def window(self, limit: int, now_s: float, view: QueueView) -> list[Sequence]:
        """Return the first `limit` in order of service."""
        del now_s
        order = dict.fromkeys(islice(self._preempted, limit))
        order.update(dict.fromkeys(islice(self._aged(), limit - len(order))))
        _fill(order, limit, self._of_running(view))
        if len(order) < limit:
            _fill(order, limit, self._of_others(limit, view))
        return list(order)

    def served(self, sequence: Sequence, prefill_tokens: int, decode_tokens: int) -> None:
        """Nothing depends on it."""

    def expired(self, now_s: float) -> list[Sequence]:
        """Turn nobody away."""
        del now_s
        return []

    def _aged(self) -> Iterator[Sequence]:
        """Yield those overtaken too often, oldest first.

        With `ahead` older ones still waiting, arrival number n should have left as number n - ahead from now: all that left beyond it
        came later. Of two requests the older one has been overtaken at least as often, so the first that is not aged ends the search.
        """
        for ahead, (sequence, arrival) in enumerate(self._waiting.items()):
            if self._left + ahead - arrival < self._most_overtakes:
                return
            yield sequence

    def _of_running(self, view: QueueView) -> Iterator[Sequence]:
        queues = [self._by_adapter[name] for name in view.running_adapters() if name in self._by_adapter]
        if None in self._by_adapter:
            queues.append(self._by_adapter[None])
        heads = [
            (arrival, sequence, rest) for rest in map(_items, queues) for sequence, arrival in [next(rest)]
        ]
        heapq.heapify(heads)  # arrivals are unique, so nothing else is compared
        while heads:
            _, sequence, rest = heads[0]
            yield sequence
            following = next(rest, None)
            if following is None:
                heapq.heappop(heads)
            else:
                heapq.heapreplace(heads, (following[1], following[0], rest))

    def _of_others(self, limit: int, view: QueueView) -> Iterator[Sequence]:
        absent: list[Sequence] = []
        seen: set[str] = set()
        for sequence in islice(self._waiting, SCAN_REQUESTS):
            name = sequence.request.adapter
            if name is None or name in seen or view.is_running(name):
                continue
            if view.is_resident(name):
                seen.add(name)
                yield from islice(self._by_adapter[name], limit)
            else:
                absent.append(sequence)
        yield from absent


def _items(queue: OrderedDict[Sequence, int]) -> Iterator[tuple[Sequence, int]]:
    return iter(queue.items())


def _fill(order: dict[Sequence, None], limit: int, candidates: Iterator[Sequence]) -> None:
    """Append candidates that are not there yet, until there are `limit`."""
    while len(order) < limit:
        sequence = next(candidates, None)
        if sequence is None:
            return
        order[sequence] = None
