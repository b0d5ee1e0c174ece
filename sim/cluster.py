"""Replicas behind the engine's own router."""

from __future__ import annotations

from collections.abc import Callable

from engine.blueprint import Blueprint
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
    ) -> None:
        self.log = log
        self._router = Router(plan.config.router, plan.config.replicas)
        self.replicas = [
            Replica(
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
        names = [*columns.adapter_names, None]  # index BASE_MODEL = -1 is the last
        self._rows = enumerate(
            zip(
                columns.arrival_s.tolist(),
                columns.prompt_tokens.tolist(),
                columns.output_tokens.tolist(),
                (names[index] for index in columns.adapter_index.tolist()),
                strict=True,
            )
        )
        self._clock = clock
        self._cluster = cluster
        self._on_arrival = on_arrival
        self._next: Request | None = None
        self._advance()

    def _advance(self) -> None:
        row = next(self._rows, None)
        if row is None:
            return
        number, (arrival_s, prompt_tokens, output_tokens, adapter) = row
        self._next = Request(
            request_id=number,
            arrival_s=arrival_s,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            adapter=adapter,
            page_keys=self._page_keys(number, adapter, prompt_tokens),
        )
        self._clock.call_at(arrival_s, ARRIVAL, self._arrive)

    def _page_keys(self, row: int, adapter: str | None, prompt_tokens: int) -> tuple[int, ...] | None:
        if self._keys is None or self._blocks is None:
            return None
        return self._keys.keys(adapter, self._blocks[row] or (), prompt_tokens)

    def _arrive(self, now_s: float) -> None:
        request = self._next
        assert request is not None and isinstance(request.request_id, int)
        self._cluster.submit(request, now_s)
        if self._on_arrival is not None:
            self._on_arrival(request.request_id + 1, now_s)
        self._advance()
