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
from sim.clock import ARRIVAL, FAILURE, Clock
from sim.loads import LoadQueue
from sim.merge_costs import switches_of
from sim.observe import Observer, RequestLog, StepRow
from sim.replica import Replica, StepTimes
from sim.scenario import Scenario
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
        scenario: Scenario | None = None,
    ) -> None:
        self.log = log
        self._router = Router.of(plan.config, places_of(plan.config, plan.adapters))
        self.switches = switches = switches_of(plan)

        def new_replica(index: int) -> Replica:
            return replica(
                clock,
                plan.new_scheduler(),
                costs,
                Observer(index, log, costs.parts_s, steps),
                self._end_handler(index),
                loads=_load_queue(plan, costs),
                fast_forward=fast_forward,
                **({} if switches is None else {"switches": switches}),
            )

        self._new_replica = new_replica
        self._serving: list[Replica | None] = [new_replica(index) for index in range(plan.config.replicas)]
        self.replicas = [found for found in self._serving if found is not None]  # all that ever were
        # What was sent and has not ended, by id; kept only where a replica may fail.
        self._errands: dict[int | str, tuple[Request, int]] | None = None
        if scenario is not None and scenario.failures:
            scenario.check_replicas(plan.config.replicas)
            self._errands = {}
            for at_s, fails, index in scenario.events():
                clock.call_at(at_s, FAILURE, self._fail if fails else self._recover, index)
        self._clock = clock

    def submit(self, request: Request, now_s: float) -> None:
        """Route and queue a request; one that can never run is noted with the reason."""
        prompt, output = request.prompt_tokens, request.output_tokens
        index = self._router.route(request.adapter, prompt, output, now_s)
        serving = self._serving[index]
        assert serving is not None
        try:
            serving.submit(request, now_s)
        except RefusedError as error:
            self._router.finished(index, prompt + output, request.adapter)
            assert isinstance(request.request_id, int)
            self.log.refused[request.request_id] = str(error)
            return
        if self._errands is not None:
            self._errands[request.request_id] = request, index

    @property
    def num_unfinished(self) -> int:
        return sum(found.scheduler.num_unfinished for found in self._serving if found is not None)

    def _end_handler(self, index: int) -> Callable[[Sequence], None]:
        def ended(sequence: Sequence) -> None:
            request = sequence.request
            tokens = request.prompt_tokens + request.output_tokens
            self._router.finished(index, tokens, request.adapter)
            if self._errands is not None:
                del self._errands[request.request_id]

        return ended

    def _fail(self, index: int) -> None:
        """Lose a replica: what it had not finished goes to the others, from the start and in the order in which it was sent."""
        lost, errands = self._serving[index], self._errands
        assert lost is not None and errands is not None
        lost.stop()
        self._serving[index] = None
        self._router.remove(index)
        orphans = [request for request, replica in errands.values() if replica == index]
        for request in orphans:
            del errands[request.request_id]
            self._router.finished(index, request.prompt_tokens + request.output_tokens, request.adapter)
        for request in orphans:
            self.submit(request, self._clock.now)

    def _recover(self, index: int) -> None:
        """Let a replica serve again, with nothing on its GPU."""
        back = self._new_replica(index)
        self._serving[index] = back
        self.replicas.append(back)
        self._router.restore(index)


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
