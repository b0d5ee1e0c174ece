"""A replica's timeline, to the instant, on cases computed by hand; and what holds on any."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import ServingConfig
from engine.residency import AdapterFootprint
from sim.costs import fit_costs
from sim.profile import parse_profile
from sim.simulate import Progress, simulate
from tests.sim import synthetic
from tests.sim.constant import ConstantCosts, small_plan, trace_of
from traces.assign import Assignment, assign
from traces.synth import S_LORA, synthesize

ADAPTERS = ("a0", "a1", "a2", "a3")


def run(trace, plan, costs, **options):
    return simulate(trace, plan.config, costs, plan=plan, **options)


def instants(result):
    columns = result.columns
    return list(zip(columns["first_token_s"].tolist(), columns["finish_s"].tolist(), strict=True))


@pytest.mark.parametrize("fast_forward", [True, False])
def test_one_request_makes_a_token_a_step(fast_forward):
    result = run(trace_of((5.0, 5, 3)), small_plan(), ConstantCosts(), fast_forward=fast_forward)
    assert instants(result) == [(6.0, 8.0)]
    assert result.columns["scheduled_s"].tolist() == [5.0]
    assert result.duration_s == 3.0


def test_the_first_step_waits_for_the_host_and_later_ones_hide_it():
    result = run(trace_of((0.0, 5, 3)), small_plan(), ConstantCosts(step=1.0, host=0.25))
    assert instants(result) == [(1.25, 3.25)]


def test_a_step_lasts_at_least_the_hosts_turn():
    result = run(trace_of((0.0, 5, 3)), small_plan(), ConstantCosts(step=1.0, host=2.0))
    assert instants(result) == [(4.0, 8.0)]
    assert result.utilisation.gpu_share == pytest.approx(3 / 8)


@pytest.mark.parametrize("fast_forward", [True, False])
def test_an_arrival_is_planned_when_the_next_step_starts_and_runs_in_the_one_after(fast_forward):
    # Steps run 0–1, 1–2, …; at 2 the step 3–4 is planned, so a prompt that comes at 1.5 is in 3–4.
    result = run(
        trace_of((0.0, 4, 20), (1.5, 4, 2)), small_plan(), ConstantCosts(), fast_forward=fast_forward
    )
    assert instants(result) == [(1.0, 20.0), (4.0, 5.0)]
    assert result.columns["scheduled_s"].tolist() == [0.0, 2.0]


@pytest.mark.parametrize("fast_forward", [True, False])
def test_an_arrival_at_the_instant_of_a_plan_is_seen_by_it(fast_forward):
    result = run(
        trace_of((0.0, 4, 20), (2.0, 4, 2)), small_plan(), ConstantCosts(), fast_forward=fast_forward
    )
    assert instants(result)[1] == (4.0, 5.0)


def test_requests_that_come_together_to_an_idle_replica_share_its_first_step():
    result = run(trace_of((1.0, 4, 1), (1.0, 4, 1)), small_plan(), ConstantCosts())
    assert instants(result) == [(2.0, 2.0), (2.0, 2.0)]


def test_equal_steps_grow_by_a_kv_token_a_row():
    # Prefill 1; then decode steps at 5, 6, 7 KV tokens.
    result = run(trace_of((0.0, 4, 4)), small_plan(), ConstantCosts(step=1.0, kv=1.0), record_steps=True)
    assert result.steps is not None
    assert [(row.start_s, row.duration_s) for row in result.steps] == [(0, 1), (1, 6), (7, 7), (14, 8)]
    assert [row.shape.decode_kv_tokens for row in result.steps] == [0, 5, 6, 7]
    assert [row.shape.decode_kv_max for row in result.steps] == [0, 5, 6, 7]


def test_loads_queue_on_the_link_first_in_first_out():
    footprints = {
        name: AdapterFootprint(pages=1, weight_bytes=10 * (i + 1), copy_bytes=10 * (i + 1))
        for i, name in enumerate(ADAPTERS)
    }
    trace = trace_of((0.0, 4, 1, "a1"), (0.0, 4, 1, "a0"), (0.0, 4, 1, "a2"))
    # a1 takes 1 + 2, a0 1 + 1, a2 1 + 3 seconds, one after the other: they end at 3, 5 and 9.
    result = run(trace, small_plan(footprints=footprints), ConstantCosts(step=0.5, load=1.0, byte=0.1))
    assert instants(result) == [(3.5, 3.5), (5.5, 5.5), (9.5, 9.5)]
    assert result.columns["load_wait_s"].tolist() == [3.0, 5.0, 9.0]
    assert result.metrics["adapter_loads"] == 3
    assert result.metrics["adapter_hit_rate"] == 0.0


@pytest.mark.parametrize("fast_forward", [True, False])
def test_a_load_that_ends_while_others_decode_is_seen_when_the_next_step_starts(fast_forward):
    footprints = {"a0": AdapterFootprint(pages=1, weight_bytes=1, copy_bytes=1)}
    trace = trace_of((0.0, 4, 20), (0.5, 4, 1, "a0"))
    # Planned at 1, so the load runs 1–6.5; seen at 7, in the step 8–9.
    result = run(trace, small_plan(footprints=footprints), ConstantCosts(load=5.5), fast_forward=fast_forward)
    assert instants(result)[1] == (9.0, 9.0)


def test_a_resident_adapter_is_a_hit():
    footprints = {"a0": AdapterFootprint(pages=1, weight_bytes=1, copy_bytes=1)}
    trace = trace_of((0.0, 4, 1, "a0"), (9.0, 4, 1, "a0"))
    result = run(trace, small_plan(footprints=footprints), ConstantCosts(load=1.0))
    assert instants(result) == [(2.0, 2.0), (10.0, 10.0)]
    assert result.metrics["adapter_hit_rate"] == 0.5
    assert result.adapter_loads == 1


def test_what_can_never_run_is_refused_with_the_reason_and_misses_the_slo():
    result = run(trace_of((0.0, 60, 5), (0.0, 4, 2)), small_plan(), ConstantCosts(step=0.01))
    assert result.refused == {"65 tokens exceed max_model_len=64": 1}
    assert result.columns["refused"].tolist() == ["65 tokens exceed max_model_len=64", None]
    assert np.isnan(result.columns["finish_s"][0])
    assert result.metrics["requests"] == 2
    assert result.metrics["slo_attainment"] == 0.5


def test_two_replicas_share_the_requests():
    plan = small_plan(replicas=2, max_num_seqs=1, router="round_robin")
    result = run(trace_of((0.0, 4, 1), (0.0, 4, 1), (0.0, 4, 1)), plan, ConstantCosts())
    # The third one's plan is made when the first starts, so it follows without a gap.
    assert instants(result) == [(1.0, 1.0), (1.0, 1.0), (2.0, 2.0)]


def test_a_caller_may_end_a_hopeless_run():
    seen: list[Progress] = []

    def hopeless(progress: Progress) -> bool:
        seen.append(progress)
        return progress.unfinished > 100

    trace = trace_of(*((0.001 * number, 4, 10) for number in range(300)))
    result = run(trace, small_plan(), ConstantCosts(), abort=hopeless)
    assert result.aborted
    assert seen[-1].unfinished > 100
    assert result.metrics["requests"] == 300


def test_mean_wait_of_a_queue_with_constant_service_is_that_of_m_d_1():
    """W = ρ / (2 (1 − ρ)) · service (Pollaczek–Khinchine); its statistical error from batch means."""
    count, load = 30_000, 0.7
    rng = np.random.default_rng(1)
    arrivals_s = rng.exponential(1 / load, count).cumsum()
    # One slot, one token: the slot is taken until the step completes, so a service is the step and nothing
    # overlaps.
    plan = small_plan(max_num_seqs=1, max_num_batched_tokens=16)
    trace = trace_of(*((float(at_s), 1, 1) for at_s in arrivals_s))
    result = run(trace, plan, ConstantCosts(step=1.0))
    waits_s = result.columns["finish_s"] - result.columns["arrival_s"] - 1.0
    batches = waits_s.reshape(20, -1).mean(axis=1)
    error_s = batches.std(ddof=1) / np.sqrt(len(batches))
    expected_s = load / (2 * (1 - load))
    assert abs(waits_s.mean() - expected_s) < 3 * error_s
    assert error_s < 0.1 * expected_s


workloads = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.1, 0.3, 1.0, 2.5, 7.0]) | st.floats(0, 20),  # gap to the one before
        st.integers(1, 40),
        st.integers(1, 24),
        st.sampled_from([None, "a0", "a1", "a2", "a3"]),
    ),
    min_size=1,
    max_size=25,
)
FOOTPRINTS = {
    f"a{i}": AdapterFootprint(pages=1 + i, weight_bytes=10 * (i + 1), copy_bytes=10 * (i + 1))
    for i in range(4)
}


def trace_with_gaps(workload):
    at_s, rows = 0.0, []
    for gap_s, prompt, output, adapter in workload:
        at_s += gap_s
        rows.append((at_s, prompt, output, adapter))
    return trace_of(*rows)


@settings(max_examples=150, deadline=None)
@given(
    workload=workloads,
    pages=st.integers(5, 30),
    page_tokens=st.sampled_from([4, 16]),
    budget=st.sampled_from([4, 16]),
    cap=st.sampled_from([None, 1, 2]),
    replicas=st.sampled_from([1, 1, 2]),
    costs=st.sampled_from(
        [
            ConstantCosts(),
            ConstantCosts(host=0.3),
            ConstantCosts(step=0.1, kv=0.01, token=0.003, host=0.25, load=0.7, byte=0.05),
            ConstantCosts(step=0.5, kv=0.003, host=0.1, load=6.0, byte=0.1),
            ConstantCosts(step=0.5, kv=0.003, host=0.1, load=6.0, byte=0.1, straight=3),
            ConstantCosts(step=0.1, kv=0.01, token=0.003, host=0.375, load=0.7, straight=5),
        ]
    ),
    policy=st.sampled_from(["fcfs", "fcfs", "clustered", "fair"]),
    eviction=st.sampled_from(["lru", "gdsf"]),
)
def test_fast_forward_changes_nothing_and_every_request_ends_or_is_refused(
    workload, pages, page_tokens, budget, cap, replicas, costs, policy, eviction
):
    trace = trace_with_gaps(workload)
    changes = {"page_tokens": page_tokens, "max_num_batched_tokens": budget, "max_adapters_per_step": cap}
    changes |= {"scheduler": policy, "adapter_eviction": eviction}
    fast, slow = (
        run(
            trace,
            small_plan(pages, FOOTPRINTS, replicas=replicas, **changes),
            costs,
            record_steps=True,
            fast_forward=fast_forward,
        )
        for fast_forward in (True, False)
    )
    for name in ("scheduled_s", "first_token_s", "finish_s", "load_wait_s"):
        np.testing.assert_allclose(fast.columns[name], slow.columns[name], rtol=0, atol=1e-9, equal_nan=True)
    assert fast.columns["preemptions"].tolist() == slow.columns["preemptions"].tolist()
    assert fast.steps is not None and slow.steps is not None
    assert sorted((row.replica, round(row.start_s, 6), str(row.shape)) for row in fast.steps) == sorted(
        (row.replica, round(row.start_s, 6), str(row.shape)) for row in slow.steps
    )
    assert fast.adapter_loads == slow.adapter_loads
    _check_conservation(fast, len(trace))
    again = run(trace, small_plan(pages, FOOTPRINTS, replicas=replicas, **changes), costs)
    assert again.columns["finish_s"].tobytes() == fast.columns["finish_s"].tobytes()


@pytest.mark.parametrize("rate_rps", [5.0, 30.0, 80.0])
def test_fast_forward_changes_nothing_under_fitted_costs(rate_rps):
    """Broken lines, two limits and the host's turn: segments end at all of them."""
    data = synthetic.profile_json(tps=(1,))
    for row in data["operators"]["attention_decode"]:
        row["us"] = 5 + max(0.3 * row["rows"], 0.001 * row["kv_tokens"])
    costs = fit_costs(parse_profile(data, "two limits"))
    trace = synthesize(replace(S_LORA, rate_rps=rate_rps), 250, seed=3)
    trace = assign(trace, Assignment(rule="R1-slora", adapters=40, rank_mix=(8, 16, 64), seed=0))
    config = ServingConfig(num_pages=6000)
    fast, slow = (
        simulate(trace, config, costs, record_steps=True, fast_forward=fast_forward)
        for fast_forward in (True, False)
    )
    for name in ("scheduled_s", "first_token_s", "finish_s", "load_wait_s"):
        np.testing.assert_allclose(fast.columns[name], slow.columns[name], rtol=0, atol=1e-9)
    assert [row.shape for row in fast.steps] == [row.shape for row in slow.steps]
    for name in ("start_s", "duration_s"):
        times_s = [[getattr(row, name) for row in result.steps] for result in (fast, slow)]
        np.testing.assert_allclose(times_s[0], times_s[1], rtol=0, atol=1e-9)
    for name in ("step_share", "gpu_share", "batch_mean", "link_share"):
        assert getattr(fast.utilisation, name) == pytest.approx(getattr(slow.utilisation, name), rel=1e-9)
    assert fast.facts == pytest.approx(slow.facts)


def _check_conservation(result, count):
    done = ~np.isnan(result.columns["finish_s"])
    refused = np.array([reason is not None for reason in result.columns["refused"]])
    assert (done != refused).all()
    assert done.sum() + sum(result.refused.values()) == count
    columns = {name: values[done] for name, values in result.columns.items()}
    assert (columns["arrival_s"] <= columns["scheduled_s"]).all()
    assert (columns["scheduled_s"] < columns["first_token_s"]).all()
    assert (columns["first_token_s"] <= columns["finish_s"]).all()
    assert (columns["load_wait_s"] >= 0).all()
