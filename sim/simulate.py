"""Serve a trace in simulated time."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from engine.adapter import AdapterSpec, adapters_of_trace
from engine.blueprint import Blueprint, blueprint
from engine.config import ServingConfig
from engine.merge_choice import with_hot_adapter
from engine.prefix_keys import BlockKeys
from sim.bottleneck import bottleneck, facts_of, utilisation_of
from sim.clock import Clock
from sim.cluster import Arrivals, Cluster
from sim.observe import RequestLog, StepRow
from sim.replica import Replica, StepTimes
from sim.result import Column, SimResult
from sim.scenario import Scenario
from traces import Trace
from traces.metrics import Slo, metrics

ABORT_EVERY = 64  # requests between two questions whether to go on


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a simulation is: what a caller decides by whether to go on."""

    now_s: float
    arrived: int
    finished: int
    refused: int

    @property
    def unfinished(self) -> int:
        return self.arrived - self.finished - self.refused


class _AbortedError(Exception):
    pass


def simulate(
    trace: Trace,
    config: ServingConfig,
    costs: StepTimes,
    *,
    adapters: Mapping[str, AdapterSpec] | None = None,
    slo: Slo | None = None,
    plan: Blueprint | None = None,
    seed: int = 0,
    record_steps: bool = False,
    fast_forward: bool = True,
    abort: Callable[[Progress], bool] | None = None,
    replica: Callable[..., Replica] = Replica,
    until_s: float | None = None,
    scenario: Scenario | None = None,
) -> SimResult:
    """Serve `trace` under `config` at `costs`, until the last request has ended.

    adapters: what the trace's adapters are; None takes dense LoRA of the trace's ranks. slo: what attainment
    is measured against. plan: the blueprint where the caller has it already; it must be of this config and
    these adapters. seed: of randomness; there is none so far. abort: asked every ABORT_EVERY arrivals; when
    it says true the simulation ends there, with `aborted` set. fast_forward: equal steps in one event; the
    result is the same without. replica: what drives a scheduler (`sim.vllm_replica` drives vLLM's). until_s:
    end the simulation there, whoever is left. scenario: replicas that fail, and traffic that swells. Raises UserError where the
    configuration or the scenario cannot work or an adapter is not given.
    """
    del seed
    if scenario is not None:
        trace = scenario.arrivals_of(trace)
    if plan is None:
        config = with_hot_adapter(config, _adapters_asked(trace))
        plan = blueprint(config, adapters_of_trace(trace.adapters, adapters))
    clock = Clock()
    log = RequestLog(len(trace))
    steps: list[StepRow] | None = [] if record_steps else None
    cluster = Cluster(
        clock,
        plan,
        costs,
        log,
        steps=steps,
        fast_forward=fast_forward,
        replica=replica,
        scenario=scenario,
    )
    keys = BlockKeys(config.page_tokens) if config.prefix_caching else None
    Arrivals(clock, cluster, trace, _asker(abort, log), keys)
    try:
        with _without_collector():
            clock.run(until=until_s)
        aborted = False
        if cluster.num_unfinished and until_s is None:
            raise RuntimeError(f"{cluster.num_unfinished} requests wait for nothing: the scheduler is stuck")
    except _AbortedError:
        aborted = True
    return _result(trace, plan, cluster, slo, clock.now, aborted, steps)


def _adapters_asked(trace: Trace) -> Iterator[str | None]:
    names = [*trace.columns.adapter_names, None]  # index -1 is the base
    return (names[index] for index in trace.columns.adapter_index.tolist())


@contextmanager
def _without_collector() -> Iterator[None]:
    """Pause the collector of cycles: a simulation makes none, whatever its length, and looking for them takes a tenth of its time."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _asker(abort: Callable[[Progress], bool] | None, log: RequestLog) -> Callable[[int, float], None] | None:
    if abort is None:
        return None

    def ask(arrived: int, now_s: float) -> None:
        if arrived % ABORT_EVERY == 0 and abort(Progress(now_s, arrived, log.finished, len(log.refused))):
            raise _AbortedError

    return ask


def _result(
    trace: Trace,
    plan: Blueprint,
    cluster: Cluster,
    slo: Slo | None,
    end_s: float,
    aborted: bool,
    steps: list[StepRow] | None,
) -> SimResult:
    columns = _columns(trace, plan.adapters, cluster.log)
    loads = sum(replica.scheduler.residency.loads for replica in cluster.replicas)
    values = metrics(columns, slo, adapter_loads=loads)
    duration_s = end_s - float(trace.columns.arrival_s[0])
    use = utilisation_of(plan, cluster, duration_s)
    facts = facts_of(columns, cluster)
    return SimResult(
        metrics=values,
        columns=columns,
        utilisation=use,
        bottleneck=bottleneck(use, facts),
        facts=facts,
        refused=Counter(cluster.log.refused.values()),
        adapter_loads=loads,
        duration_s=duration_s,
        aborted=aborted,
        steps=None if steps is None else tuple(steps),
        merging=_merging(cluster),
    )


def _merging(cluster: Cluster) -> dict[str, int | str] | None:
    if cluster.switches is None:
        return None
    modes = [replica.scheduler.merging for replica in cluster.replicas]
    switches = sum(mode.policy.switches for mode in modes if mode is not None)
    return {"switches": switches, "switch_costs": cluster.switches.provenance}


def _columns(trace: Trace, adapters: Mapping[str, AdapterSpec], log: RequestLog) -> dict[str, Column]:
    source = trace.columns
    names = np.array([*source.adapter_names, None], dtype=object)
    ranks = np.array([*(adapters[name].rank for name in source.adapter_names), None], dtype=object)
    refused = np.full(len(trace), None, dtype=object)
    for row, reason in log.refused.items():
        refused[row] = reason
    return {
        "id": np.array(source.ids, dtype=object),
        "arrival_s": source.arrival_s,
        "scheduled_s": np.array(log.scheduled_s),
        "first_token_s": np.array(log.first_token_s),
        "finish_s": np.array(log.finish_s),
        "prompt_tokens": source.prompt_tokens,
        "output_tokens": source.output_tokens,
        "adapter": names[source.adapter_index],
        "rank": ranks[source.adapter_index],
        "load_wait_s": np.array(log.load_wait_s),
        "preemptions": np.array(log.preemptions),
        "cached_tokens": np.array(log.cached_tokens),
        "refused": refused,
    }
