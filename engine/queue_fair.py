"""Weighted fairness between adapters: the tenant that got least so far is served next."""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice

from engine.queue_view import QueueView
from engine.sequence import Sequence

PROMPT_COST = 1  # of a prompt token computed; Sheng et al., section 3.1: what providers charge
OUTPUT_COST = 2  # of a token generated

_Key = tuple[
    float, int
]  # a tenant's counter, and the arrival of its oldest waiting request, which breaks ties
_Listed = tuple[float, int, int, "_Tenant"]  # the key, the entry's number, and whose it is

_Upcoming = tuple[float, int, Sequence, "_Tenant", Iterator[Sequence]]


@dataclass(slots=True, eq=False)
class _Tenant:
    """An adapter, or the base model.

    running: of each of its requests that runs, the output tokens charged so far. units: what it was charged. lift: what it got for
    nothing when it came back. charged_in: the window that saw its running requests last. entry: the number of its heap entry; 0: none.
    """

    weight: float
    waiting: OrderedDict[Sequence, None] = field(default_factory=OrderedDict)
    running: dict[Sequence, int] = field(default_factory=dict)
    units: int = 0
    lift: float = 0.0
    charged_in: int = 0
    entry: int = 0

    @property
    def counter(self) -> float:
        return self.lift + self.units / self.weight

    def key(self) -> _Key:
        return self.counter, next(iter(self.waiting)).order


class FairQueue:
    """The virtual token counter of Sheng et al., "Fairness in Serving Large Language Models", arXiv:2401.00588.

    A tenant is an adapter; the base model is one, too. Its counter is (prompt tokens computed + 2 × output tokens) / weight. Next is the
    oldest request of the waiting tenant with the smallest counter, so the order within a tenant is that of arrival, and while anybody waits
    nothing is held back. A tenant that had nobody waiting and comes back is lifted to the smallest counter of those that wait (of the one that
    left last, if none does): it cannot save up idle time.

    Service is charged while it happens: prompt tokens when they are planned, output tokens when a window is made, from what is planned
    of the tenant's running requests by then, and the rest when they end. Tokens found in the prefix cache cost nothing, and neither
    does computing a preempted request again: its tenant did not ask for that. While two tenants both wait, their counters
    differ by at most a constant: a prompt, and 2 × the output tokens of all that one can have running (Theorem 4.4 there), over the
    smaller weight. Inside one window a request counts as its prompt only.

    A waiting tenant stands once in a heap, by a counter that may be out of date; counters only rise, so the top is brought up to date until
    it is right. O(log tenants) an operation; a window also asks once for each running request of the tenants it brings up to date.
    """

    time_dependent = False

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self._weights = weights or {}
        self._tenants: dict[str | None, _Tenant] = {}
        self._preempted: deque[Sequence] = deque()
        self._listed: list[_Listed] = []  # heap
        self._entries = 0
        self._newcomers: dict[
            _Tenant, None
        ] = {}  # they wait since the last window, and are lifted at the next
        self._left_last: _Tenant | None = None
        self._window = 0
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._preempted
        for tenant in self._tenants.values():
            yield from tenant.waiting

    def push(self, sequence: Sequence) -> None:
        """Take in a new request."""
        tenant = self._tenant(sequence)
        if not tenant.waiting:
            self._newcomers[tenant] = None
        tenant.waiting[sequence] = None
        self._size += 1

    def push_front(self, sequence: Sequence) -> None:
        """Take back a preempted one, which goes before all others."""
        self._preempted.appendleft(sequence)
        self._size += 1

    def remove(self, sequence: Sequence) -> None:
        """Forget one that gave up."""
        self._take(sequence)

    def drop(self, admitted: Collection[Sequence]) -> None:
        """Note that these of the last window were admitted: what they generate from now on is charged."""
        for sequence in admitted:
            self._take(sequence)
            self._tenant(sequence).running[sequence] = sequence.generated

    def window(self, limit: int, now_s: float, view: QueueView) -> list[Sequence]:
        """Return the first `limit` in order of service: as if each were admitted, and its prompt charged, before the next is chosen."""
        del now_s
        self._window += 1
        self._lift_newcomers(view)
        order = list(islice(self._preempted, limit))
        looked_at: list[_Listed] = []
        upcoming: list[_Upcoming] = []  # heap: the next requests of tenants that are in the order already
        top = self._top(view)
        while len(order) < limit and (top or upcoming):
            if top and (not upcoming or top[:2] < upcoming[0][:2]):
                looked_at.append(heapq.heappop(self._listed))
                counter, tenant = top[0], top[3]
                rest = iter(tenant.waiting)
                sequence = next(rest)
                top = self._top(view)
            else:
                counter, _, sequence, tenant, rest = heapq.heappop(upcoming)
            order.append(sequence)
            following = next(rest, None)
            if following is not None:
                counter += PROMPT_COST * sequence.prefill_tokens / tenant.weight
                heapq.heappush(upcoming, (counter, following.order, following, tenant, rest))
        for entry in looked_at:
            heapq.heappush(self._listed, entry)
        return order

    def served(self, sequence: Sequence, prefill_tokens: int, decode_tokens: int) -> None:
        """Charge prompt tokens; without any, the request runs no more and has generated `decode_tokens` in all."""
        tenant = self._tenant(sequence)
        if prefill_tokens:
            if not sequence.preemptions:
                tenant.units += PROMPT_COST * prefill_tokens
            return
        tenant.units += OUTPUT_COST * (decode_tokens - tenant.running.pop(sequence, 0))

    def expired(self, now_s: float) -> list[Sequence]:
        """Turn nobody away."""
        del now_s
        return []

    def _tenant(self, sequence: Sequence) -> _Tenant:
        name = sequence.request.adapter
        tenant = self._tenants.get(name)
        if tenant is None:
            weight = (
                1.0 if name is None else self._weights.get(name.partition("#")[0], 1.0)
            )  # what the server loads again is name#7
            self._tenants[name] = tenant = _Tenant(weight)
        return tenant

    def _take(self, sequence: Sequence) -> None:
        tenant = self._tenant(sequence)
        if sequence in tenant.waiting:
            del tenant.waiting[sequence]
            if not tenant.waiting:
                tenant.entry = 0
                self._left_last = tenant
        else:
            self._preempted.remove(sequence)
        self._size -= 1

    def _charge(self, tenant: _Tenant, view: QueueView) -> None:
        """Charge the output tokens planned of a tenant's running requests, once a window."""
        if tenant.charged_in == self._window:
            return
        tenant.charged_in = self._window
        for sequence, charged in tenant.running.items():
            planned = view.planned_tokens(sequence)
            tenant.units += OUTPUT_COST * (planned - charged)
            tenant.running[sequence] = planned

    def _top(self, view: QueueView) -> _Listed | None:
        """Bring the first of the heap up to date and return it; None when nobody is listed."""
        listed = self._listed
        while listed:
            top = listed[0]
            counter, order, number, tenant = top
            if tenant.entry != number:
                heapq.heappop(listed)
                continue
            if tenant.charged_in != self._window:
                self._charge(tenant, view)
            key = tenant.key()
            if key <= (counter, order):
                return top
            heapq.heapreplace(listed, (*key, number, tenant))
        return None

    def _lift_newcomers(self, view: QueueView) -> None:
        newcomers = [tenant for tenant in self._newcomers if tenant.waiting]
        self._newcomers.clear()
        if not newcomers:
            return
        level = 0.0
        top = self._top(view)
        if top is not None:
            level = top[0]
        elif self._left_last is not None:
            self._charge(self._left_last, view)
            level = self._left_last.counter
        for tenant in newcomers:
            self._charge(tenant, view)
            tenant.lift += max(0.0, level - tenant.counter)
            self._entries += 1
            tenant.entry = self._entries
            heapq.heappush(self._listed, (*tenant.key(), tenant.entry, tenant))
