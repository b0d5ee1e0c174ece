"""Nobody is lost and no page is: at every plan, arrivals = finished + turned away + queued + running. And equal runs are equal."""

import gc

import numpy as np
import pytest

from engine.residency import AdapterFootprint
from sim.cluster import Cluster
from sim.observe import Observer
from sim.replica import Replica
from sim.scenario import Failure, Scenario
from sim.simulate import simulate
from tests.sim.constant import ConstantCosts, small_plan, trace_of

FOOTPRINTS = {
    f"a{i}": AdapterFootprint(pages=1 + i, weight_bytes=10 * (i + 1), copy_bytes=10 * (i + 1))
    for i in range(4)
}
COSTS = ConstantCosts(step=0.1, kv=0.001, token=0.003, host=0.05, load=0.2, byte=0.005)


def workload(seed, requests=120):
    rng = np.random.default_rng(seed)
    at_s = np.cumsum(rng.exponential(0.4, requests))
    return trace_of(
        *(
            (
                float(t),
                int(rng.integers(1, 60)),
                int(rng.integers(1, 30)),
                str(rng.choice(["a0", "a1", "a2", "a3"])),
            )
            for t in at_s
        )
    )


VARIANTS = {
    "short of pages": ({"pages": 16}, None),
    "fair": ({"pages": 24, "scheduler": "fair", "max_adapters_per_step": 2}, None),
    "turned away": ({"pages": 24, "scheduler": "slo", "ttft_slo_s": 2.0}, None),
    "replicas": ({"pages": 16, "replicas": 3, "router": "adapter_affinity"}, None),
    "failures": (
        {"pages": 24, "replicas": 2},
        Scenario(
            failures=(
                Failure(replica=0, at_s=10.0, recovers_at_s=20.0),
                Failure(replica=1, at_s=25.0, recovers_at_s=26.0),
            )
        ),
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("fast_forward", [True, False])
def test_arrivals_are_finished_turned_away_queued_or_running_at_every_plan(
    variant, fast_forward, monkeypatch
):
    changes, scenario = VARIANTS[variant]
    sent, seen, clusters = set(), [], []
    build, submit, planned = Cluster.__init__, Replica.submit, Observer.planned

    def remember(cluster, *arguments, **options):
        build(cluster, *arguments, **options)
        clusters.append(cluster)

    def count(replica, request, now_s):
        try:
            submit(replica, request, now_s)
        finally:
            sent.add(request.request_id)

    def check(observer, scheduler, now_s):
        planned(observer, scheduler, now_s)
        scheduler.check_integrity()
        (cluster,) = clusters
        ended = cluster.log.finished + len(cluster.log.refused)
        waiting = [(found.num_waiting, found.num_running) for found in _schedulers(cluster)]
        assert len(sent) == ended + cluster.num_unfinished
        assert cluster.num_unfinished == sum(map(sum, waiting))
        seen.append(now_s)

    monkeypatch.setattr(Cluster, "__init__", remember)
    monkeypatch.setattr(Replica, "submit", count)
    monkeypatch.setattr(Observer, "planned", check)
    plan = small_plan(footprints=FOOTPRINTS, **changes)
    trace = workload(1)
    result = simulate(trace, plan.config, COSTS, plan=plan, fast_forward=fast_forward, scenario=scenario)
    assert len(seen) > len(trace)
    assert seen == sorted(seen)  # time goes forward
    finished = np.isfinite(result.columns["finish_s"]).sum()
    assert finished + sum(result.refused.values()) == len(trace) == len(sent)


def _schedulers(cluster):
    return [found.scheduler for found in cluster._serving if found is not None]


def test_a_request_that_can_never_run_is_counted_once():
    plan = small_plan(pages=2)
    result = simulate(trace_of((0.0, 60, 4), (0.0, 1, 1)), plan.config, COSTS, plan=plan)
    assert sum(result.refused.values()) == 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_seeds_give_equal_results_to_the_bit(variant):
    changes, scenario = VARIANTS[variant]
    first, second = (
        simulate(
            workload(2),
            small_plan(footprints=FOOTPRINTS, **changes).config,
            COSTS,
            plan=small_plan(footprints=FOOTPRINTS, **changes),
            scenario=scenario,
            seed=3,
        )
        for _ in range(2)
    )
    for name, column in first.columns.items():
        if column.dtype != object:
            assert np.array_equal(column, second.columns[name], equal_nan=True)
    assert first.to_json() == second.to_json()


def test_the_collector_is_paused_while_it_simulates_and_no_longer():
    found = []
    plan = small_plan(footprints=FOOTPRINTS, pages=24)

    def note(progress):
        found.append(gc.isenabled())

    simulate(workload(4), plan.config, COSTS, plan=plan, abort=note)
    assert found and not any(found)
    assert gc.isenabled()

    def stop(progress):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        simulate(workload(4), plan.config, COSTS, plan=plan, abort=stop)
    assert gc.isenabled()


@pytest.mark.slow
def test_a_simulation_leaves_no_cycles_that_grow_with_it():
    left = []
    for requests in (50, 500):
        plan = small_plan(footprints=FOOTPRINTS, pages=24)
        trace = workload(5, requests)
        gc.collect()
        gc.disable()
        try:
            simulate(trace, plan.config, COSTS, plan=plan)
            left.append(gc.collect())
        finally:
            gc.enable()
    assert left[1] < left[0] + 100
