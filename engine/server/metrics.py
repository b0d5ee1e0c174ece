"""What /metrics tells: vLLM's names where they mean the same, and ours, `loraplan:…`, for adapters and the shared pool."""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from engine.server.tickets import Ticket
from engine.snapshot import Snapshot

TTFT_BUCKETS_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TOKEN_BUCKETS_S = (
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5),
    *(0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
LATENCY_BUCKETS_S = (
    *(0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
FROM_ENGINE = {
    "preemptions": ("vllm:num_preemptions", "Requests preempted."),
    "prefix_queried_tokens": (
        "vllm:prefix_cache_queries",
        "Prompt tokens looked up in the prefix cache.",
    ),
    "prefix_hit_tokens": ("vllm:prefix_cache_hits", "Prompt tokens found there."),
    "adapter_loads": ("loraplan:adapter_loads", "Adapters copied to the GPU."),
    "adapter_evictions": ("loraplan:adapter_evictions", "Adapters that left the GPU for others."),
}
LENGTH_BUCKETS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))


class Metrics:
    """The server's metrics, in a registry of its own. An observer of the engine, on the event loop."""

    def __init__(self, model: str, max_adapters: int) -> None:
        self._registry = CollectorRegistry()
        self._model = model
        self._max_adapters = str(max_adapters)
        self._using: Tally[str] = (
            Tally()
        )  # unfinished requests by adapter, and of those that have no token yet
        self._before_first_token: Tally[str] = Tally()
        self._counters()
        self._histograms()
        self._gauges()
        self._last: Tally[tuple[str, int]] = Tally()

    def _make(
        self, kind: type[Any], name: str, help_text: str, labels: Iterable[str] = (), **options: Any
    ) -> Any:
        metric = kind(name, help_text, ["model_name", *labels], registry=self._registry, **options)
        return metric if labels else metric.labels(self._model)

    def _counters(self) -> None:
        make = self._make
        self._prompt_tokens = make(Counter, "vllm:prompt_tokens", "Prompt tokens of requests that began.")
        self._output_tokens = make(Counter, "vllm:generation_tokens", "Tokens generated.")
        self._success = make(
            Counter, "vllm:request_success", "Requests that ended, by reason.", ["finished_reason"]
        )
        self._rejected = make(
            Counter, "loraplan:requests_rejected", "Requests turned away, by HTTP status.", ["status"]
        )
        self._queries = make(Counter, "loraplan:adapter_queries", "Ended requests that named an adapter.")
        self._hits = make(Counter, "loraplan:adapter_hits", "Of those, the ones that waited for no load.")
        self._failures = make(Gauge, "loraplan:engine_failures", "Times that the engine was started anew.")
        self._from_engine = {
            name: make(Counter, metric, help_text, ["engine"])
            for name, (metric, help_text) in FROM_ENGINE.items()
        }

    def _histograms(self) -> None:
        def make(name: str, help_text: str, buckets: tuple[float, ...]) -> Any:
            return self._make(Histogram, name, help_text, buckets=buckets)

        self._ttft = make("vllm:time_to_first_token_seconds", "Arrival to first token.", TTFT_BUCKETS_S)
        self._gap = make("vllm:inter_token_latency_seconds", "From one token to the next.", TOKEN_BUCKETS_S)
        self._per_token = make(
            "vllm:request_time_per_output_token_seconds",
            "Mean time of a request's tokens but its first.",
            TOKEN_BUCKETS_S,
        )
        self._latency = make("vllm:e2e_request_latency_seconds", "Arrival to end.", LATENCY_BUCKETS_S)
        self._prompt_length = make(
            "vllm:request_prompt_tokens", "Prompt tokens of a request.", LENGTH_BUCKETS
        )
        self._output_length = make(
            "vllm:request_generation_tokens", "Tokens generated for a request.", LENGTH_BUCKETS
        )

    def _gauges(self) -> None:
        make = self._make
        self._running = make(Gauge, "vllm:num_requests_running", "Requests that hold pages.", ["engine"])
        self._waiting = make(
            Gauge, "vllm:num_requests_waiting", "Requests that wait to be admitted.", ["engine"]
        )
        self._kv_usage = make(
            Gauge, "vllm:kv_cache_usage_perc", "Share of the pool that KV holds; 1 is all of it.", ["engine"]
        )
        self._lora_info = Gauge(
            "vllm:lora_requests_info",
            "Adapters of unfinished requests; the value is the time of this report.",
            ["max_lora", "waiting_lora_adapters", "running_lora_adapters"],
            registry=self._registry,
        )
        self._pages = make(Gauge, "loraplan:pages", "Pages of the pool by use.", ["engine", "use"])
        self._adapters = make(Gauge, "loraplan:adapters", "Adapters by place.", ["engine", "place"])

    # ---- the observer ----

    def submitted(self, ticket: Ticket) -> None:
        """Count a request as waiting."""
        self._count(ticket, +1, self._using)
        self._count(ticket, +1, self._before_first_token)

    def token(self, ticket: Ticket, gap_s: float | None) -> None:
        """Time a token."""
        self._output_tokens.inc()
        if gap_s is not None:
            self._gap.observe(gap_s)
            return
        assert ticket.first_token_s is not None
        self._ttft.observe(ticket.first_token_s - ticket.arrived_s)
        self._prompt_tokens.inc(len(ticket.job.prompt))
        self._count(ticket, -1, self._before_first_token)

    def ended(self, ticket: Ticket) -> None:
        """Time a request."""
        assert ticket.ending is not None and ticket.ended_s is not None
        self._count(ticket, -1, self._using)
        if ticket.first_token_s is None:
            self._count(ticket, -1, self._before_first_token)
        self._success.labels(self._model, ticket.ending.reason).inc()
        if ticket.job.served_as is not None:
            self._queries.inc()
            self._hits.inc(not ticket.waited_for_adapter)
        if ticket.ending.reason not in ("length", "stop"):
            return
        self._latency.observe(ticket.ended_s - ticket.arrived_s)
        self._prompt_length.observe(len(ticket.job.prompt))
        self._output_length.observe(ticket.num_tokens)
        if ticket.num_tokens > 1 and ticket.first_token_s is not None and ticket.last_token_s is not None:
            self._per_token.observe((ticket.last_token_s - ticket.first_token_s) / (ticket.num_tokens - 1))

    @staticmethod
    def _count(ticket: Ticket, change: int, tally: Tally[str]) -> None:
        name = ticket.job.served_as
        if name is not None:
            tally[name] += change
            if not tally[name]:
                del tally[name]

    def rejected(self, status: int) -> None:
        """Count a request that was turned away."""
        self._rejected.labels(self._model, str(status)).inc()

    # ---- the page ----

    def page(
        self, snapshots: Mapping[int, Snapshot], failures: int, now_s: Callable[[], float] = time.time
    ) -> bytes:
        """Return what Prometheus reads. snapshots: of each replica; one that is not there has no gauges."""
        self._failures.set(failures)
        for gauge in (self._running, self._waiting, self._kv_usage, self._pages, self._adapters):
            gauge.clear()
        for engine, snapshot in snapshots.items():
            self._gauge(str(engine), snapshot)
            self._advance(engine, snapshot)
        self._lora_info.clear()
        waiting, using = sorted(self._before_first_token), sorted(self._using)
        running = [name for name in using if self._using[name] > self._before_first_token.get(name, 0)]
        self._lora_info.labels(self._max_adapters, ",".join(waiting), ",".join(running)).set(now_s())
        return generate_latest(self._registry)

    def _gauge(self, engine: str, snapshot: Snapshot) -> None:
        self._running.labels(self._model, engine).set(snapshot.running)
        self._waiting.labels(self._model, engine).set(snapshot.waiting)
        self._kv_usage.labels(self._model, engine).set(snapshot.kv_pages / snapshot.num_pages)
        for use in ("free", "kv", "cached", "adapter"):
            self._pages.labels(self._model, engine, use).set(getattr(snapshot, f"{use}_pages"))
        self._adapters.labels(self._model, engine, "gpu").set(snapshot.resident_adapters)
        self._adapters.labels(self._model, engine, "registered").set(snapshot.registered_adapters)

    def _advance(self, engine: int, snapshot: Snapshot) -> None:
        """Add what an engine counted since the last page; its counts start again when it is started anew."""
        for name, metric in self._from_engine.items():
            count, last = getattr(snapshot, name), self._last[name, engine]
            metric.labels(self._model, str(engine)).inc(count - last if count >= last else count)
            self._last[name, engine] = count
