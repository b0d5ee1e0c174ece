"""Replicas behind the engine's own router."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from engine.blueprint import Blueprint
from engine.placement import places_of
from engine.prefix_keys import BlockKeys
from engine.requests import Request
from engine.router import Router
from engine.scheduler import RefusedError
from engine.sequence import Sequence
from sim.clock import ARRIVAL, Clock
from sim.loads import LoadQueue
from sim.observe import Observer, RequestLog, StepRow
from sim.replica import Replica, StepTimes
from traces import Trace
from traces.columns import TraceColumns

ROWS_AT_ONCE = 4096


class Cluster:
    """The replicas of a configuration; `submit` routes a request to one of them."""

    def __init__(
        self,
        clock: Clock,
        plan: Blueprint,
        costs: StepTimes,
        log: RequestLog,
        *,
        steps: list[StepRow] | None = None,
        fast_forward: bool = True,
        replica: Callable[..., Replica] = Replica,
    ) -> None:
        self.log = log
        self._router = Router(plan.config.router, plan.config.replicas, places_of(plan.config, plan.adapters))
        self.replicas = [
            replica(
                clock,
                plan.new_scheduler(),
                costs,
                Observer(index, log, costs.parts_s, steps),
                self._end_handler(index),
                loads=_load_queue(plan, costs),
                fast_forward=fast_forward,
            )
            for index in range(plan.config.replicas)
        ]

    def submit(self, request: Request, now_s: float) -> None:
        """Route and queue a request; one that can never run is noted with the reason."""
        tokens = request.prompt_tokens + request.output_tokens
        index = self._router.route(request.adapter, tokens)
        try:
            self.replicas[index].submit(request, now_s)
        except RefusedError as error:
            self._router.finished(index, tokens)
            assert isinstance(request.request_id, int)
            self.log.refused[request.request_id] = str(error)

    @property
    def num_unfinished(self) -> int:
        return sum(replica.scheduler.num_unfinished for replica in self.replicas)

    def _end_handler(self, index: int) -> Callable[[Sequence], None]:
        def ended(sequence: Sequence) -> None:
            request = sequence.request
            self._router.finished(index, request.prompt_tokens + request.output_tokens)

        return ended


def _load_queue(plan: Blueprint, costs: StepTimes) -> LoadQueue:
    bounded = plan.host_capacity_bytes is not None
    return LoadQueue(costs.load_s, plan.new_host_cache() if bounded else None, ranks=plan.config.tp)


class Arrivals:
    """Feeds a trace into a cluster, one arrival at a time.

    A request's id in the simulation is its row in the trace. keys: makes what pages are known by from the
    trace's prefix blocks; None, or a trace without any: nothing is shared.
    """

    def __init__(
        self,
        clock: Clock,
        cluster: Cluster,
        trace: Trace,
        on_arrival: Callable[[int, float], None] | None,
        keys: BlockKeys | None = None,
    ) -> None:
        columns = trace.columns
        self._blocks = columns.prefix_blocks
        self._keys = keys if self._blocks is not None else None
        self._requests = self._read(columns)
        self._clock = clock
        self._cluster = cluster
        self._on_arrival = on_arrival
        self._next = next(self._requests)
        clock.call_at(self._next.arrival_s, ARRIVAL, self._arrive)

    def _read(self, columns: TraceColumns) -> Iterator[Request]:
        """Yield the requests, a block of rows at a time: all rows as Python numbers would take 100 bytes a request."""
        names = [*columns.adapter_names, None]  # index BASE_MODEL = -1 is the last
        for first in range(0, len(columns.ids), ROWS_AT_ONCE):
            rows = slice(first, first + ROWS_AT_ONCE)
            numbers = zip(
                columns.arrival_s[rows].tolist(),
                columns.prompt_tokens[rows].tolist(),
                columns.output_tokens[rows].tolist(),
                columns.adapter_index[rows].tolist(),
                strict=True,
            )
            for row, (arrival_s, prompt_tokens, output_tokens, adapter) in enumerate(numbers, first):
                name = names[adapter]
                keys = None if self._keys is None else self._page_keys(row, name, prompt_tokens)
                yield Request(row, arrival_s, prompt_tokens, output_tokens, name, keys)

    def _page_keys(self, row: int, adapter: str | None, prompt_tokens: int) -> tuple[int, ...] | None:
        if self._keys is None or self._blocks is None:
            return None
        return self._keys.keys(adapter, self._blocks[row] or (), prompt_tokens)

    def _arrive(self, _: int) -> None:
        """Submit the next request, and those after it that come before anything else happens."""
        request = self._next
        while True:
            now_s = request.arrival_s
            self._cluster.submit(request, now_s)
            if self._on_arrival is not None:
                assert isinstance(request.request_id, int)
                self._on_arrival(request.request_id + 1, now_s)
            following = next(self._requests, None)
            if following is None:
                return
            request = self._next = following
            if not self._clock.advance_to(request.arrival_s):
                self._clock.call_at(request.arrival_s, ARRIVAL, self._arrive)
                return
