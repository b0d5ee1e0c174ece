"""Replicas that fail and come back, and traffic that swells: exact timelines, conservation, and what cannot be."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import UserError
from sim.__main__ import main
from sim.scenario import Burst, Failure, RatePoint, Scenario
from sim.simulate import simulate
from tests.sim import synthetic
from tests.sim.constant import ConstantCosts, small_plan, trace_of
from traces import save
from traces.synth import S_LORA, synthesize


def run(trace, plan, scenario=None, costs=None, **options):
    return simulate(trace, plan.config, costs or ConstantCosts(), plan=plan, scenario=scenario, **options)


def failing(*failures):
    return Scenario(failures=tuple(Failure(replica=r, at_s=a, recovers_at_s=b) for r, a, b in failures))


def finishes(result):
    return result.columns["finish_s"].tolist()


@pytest.mark.parametrize("fast_forward", [True, False])
def test_what_a_failed_replica_had_starts_again_on_the_other(fast_forward):
    # One step a second, one token a step. Request 0 is on replica 0, request 1 on replica 1; each takes 4 steps.
    plan = small_plan(replicas=2, router="round_robin")
    trace = trace_of((0.0, 1, 4), (0.0, 1, 4))
    assert finishes(run(trace, plan, fast_forward=fast_forward)) == [4.0, 4.0]
    result = run(trace, plan, failing((0, 2.5, None)), fast_forward=fast_forward)
    # Seen at 3.0, when replica 1 starts its last step; that plan runs from 4.0 on.
    assert finishes(result) == [8.0, 4.0]
    assert result.columns["first_token_s"].tolist() == [5.0, 1.0]
    assert result.columns["scheduled_s"].tolist() == [3.0, 0.0]


def test_orphans_are_sent_in_their_order_and_before_who_comes_at_that_instant():
    plan = small_plan(replicas=2, router="round_robin", max_num_seqs=1)
    # Replica 0 has requests 0 and 2, replica 1 has 1; at 1.5 replica 0 fails, and request 3 comes.
    trace = trace_of((0.0, 1, 2), (0.0, 1, 2), (0.0, 1, 2), (1.5, 1, 2))
    assert finishes(run(trace, plan, failing((0, 1.5, None)))) == [4.0, 2.0, 6.0, 8.0]


def test_a_replica_that_comes_back_is_empty_and_serves():
    plan = small_plan(replicas=2, router="least_loaded", max_num_seqs=1)
    trace = trace_of((0.0, 1, 2), (0.0, 1, 2), (6.0, 1, 2), (6.0, 1, 2))
    # Request 0 waits for replica 1's slot, free at 2; from 5 on there are two replicas again.
    assert finishes(run(trace, plan, failing((0, 0.5, 5.0)))) == [4.0, 2.0, 8.0, 8.0]
    assert finishes(run(trace, plan, failing((0, 0.5, None)))) == [4.0, 2.0, 8.0, 10.0]


def test_an_adapter_is_loaded_again_where_its_replica_was_lost():
    plan = small_plan(
        replicas=2,
        router="round_robin",
        footprints={"a": _footprint(), "b": _footprint()},
    )
    trace = trace_of((0.0, 1, 6, "a"), (0.0, 1, 6, "b"))
    costs = ConstantCosts(load=1.0)
    assert run(trace, plan, costs=costs).adapter_loads == 2
    result = run(trace, plan, failing((0, 3.2, None)), costs=costs)
    assert result.adapter_loads == 3
    assert finishes(result)[1] == 7.0  # nobody waits for another's load
    assert finishes(result)[0] > 10.0


def _footprint():
    from engine.residency import AdapterFootprint

    return AdapterFootprint(pages=1, weight_bytes=10, copy_bytes=10)


@settings(max_examples=60, deadline=None)
@given(
    gaps=st.lists(st.floats(0, 3), min_size=1, max_size=25),
    times=st.lists(st.floats(0, 30), min_size=4, max_size=4, unique=True),
    policy=st.sampled_from(["round_robin", "least_loaded", "adapter_affinity"]),
    fast_forward=st.booleans(),
)
def test_nobody_is_lost_and_equal_runs_are_equal(gaps, times, policy, fast_forward):
    first, second, third, fourth = sorted(times)
    scenario = failing((0, first, second), (2, third, fourth))
    at_s = np.cumsum(gaps)
    trace = trace_of(*((float(t), 1 + i % 9, 1 + i % 7) for i, t in enumerate(at_s)))
    plan = small_plan(replicas=3, router=policy)
    costs = ConstantCosts(step=0.4, kv=0.01, host=0.1)
    result = run(trace, plan, scenario, costs, fast_forward=fast_forward)
    done = np.array(finishes(result))
    assert np.isfinite(done).all() and (done > trace.columns.arrival_s).all()
    again = run(trace, plan, scenario, costs, fast_forward=not fast_forward)
    assert again.columns["finish_s"] == pytest.approx(done, abs=1e-9)


# ---- pace ----


def arrivals(scenario, *at_s):
    return scenario.arrivals_of(trace_of(*((t, 1, 1) for t in at_s))).columns.arrival_s.tolist()


def test_a_step_of_the_rate_is_another_pace_from_there_on():
    scenario = Scenario(rates=(RatePoint(at_s=10.0, scale=1.0), RatePoint(at_s=10.0, scale=4.0)))
    assert arrivals(scenario, 0.0, 10.0, 14.0, 18.0) == pytest.approx([0.0, 10.0, 11.0, 12.0])


def test_a_ramp_is_its_integral():
    # The pace rises from 1 to 3 in 10 s, so 20 s of the trace pass in them: passed(x) = x + x² / 10.
    scenario = Scenario(rates=(RatePoint(at_s=0.0, scale=1.0), RatePoint(at_s=10.0, scale=3.0)))
    assert arrivals(scenario, 0.0, 5 + 2.5, 20.0, 26.0) == pytest.approx([0.0, 5.0, 10.0, 12.0])


def test_a_burst_takes_what_comes_later():
    scenario = Scenario(bursts=(Burst(at_s=2.0, duration_s=1.0, scale=5.0),))
    assert arrivals(scenario, 1.0, 2.0, 4.5, 7.0, 8.0) == pytest.approx([1.0, 2.0, 2.5, 3.0, 4.0])


def test_a_burst_on_a_ramp_multiplies_it_and_a_falling_ramp_is_solved_too():
    scenario = Scenario(
        rates=(RatePoint(at_s=4.0, scale=2.0), RatePoint(at_s=8.0, scale=0.5)),
        bursts=(Burst(at_s=3.0, duration_s=3.0, scale=2.0),),
    )
    fine = np.linspace(0, 12, 120_001)
    pace = np.interp(fine, [4, 8], [2.0, 0.5]) * np.where((fine >= 3) & (fine < 6), 2.0, 1.0)
    passed = np.concatenate([[0], np.cumsum((pace[1:] + pace[:-1]) / 2 * np.diff(fine))])
    wanted = np.interp([1.0, 6.5, 9.0, 15.0, 17.0], passed, fine)
    assert arrivals(scenario, 1.0, 6.5, 9.0, 15.0, 17.0) == pytest.approx(wanted.tolist(), abs=2e-4)


def test_order_and_requests_are_kept():
    trace = synthesize(S_LORA, 300, seed=0)
    scenario = Scenario(
        rates=(RatePoint(at_s=20.0, scale=0.3), RatePoint(at_s=60.0, scale=6.0)),
        bursts=(Burst(at_s=50.0, duration_s=20.0, scale=3.0),),
    )
    other = scenario.arrivals_of(trace)
    assert (np.diff(other.columns.arrival_s) >= 0).all()
    assert other.columns.prompt_tokens is trace.columns.prompt_tokens
    assert Scenario().arrivals_of(trace) is trace


# ---- files ----


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "must be an object of bursts, failures, rates"),
        ({"bogus": []}, "must be an object of bursts, failures, rates"),
        ({"failures": {}}, "failures must be a list"),
        ({"failures": [{"replica": 0.5, "at_s": 1}]}, r"failures\[0\]: replica=0.5 must be a whole number"),
        ({"failures": [{"replica": 0}]}, r"failures\[0\]: at_s=None must be a number"),
        ({"failures": [{"replica": 0, "at_s": 5, "recovers_at_s": 5}]}, "recovers_at_s=5 must be after"),
        ({"rates": [{"at_s": 0, "scale": 0}]}, r"rates\[0\]: scale=0 must be at least"),
        ({"rates": [{"at_s": 5, "scale": 1}, {"at_s": 4, "scale": 1}]}, r"rates\[1\]: at_s=4 is before"),
        ({"bursts": [{"at_s": 0, "duration_s": 1, "scale": 2, "x": 1}]}, r"bursts\[0\] must be an object of"),
        ({"bursts": [{"at_s": True, "duration_s": 1, "scale": 2}]}, r"bursts\[0\]: at_s=True must be"),
    ],
)
def test_a_bad_scenario_is_told_by_its_place(data, message):
    with pytest.raises(UserError, match=f"^s.json: .*{message}|^s.json: {message}"):
        Scenario.from_json(data, "s.json")


@pytest.mark.parametrize(
    ("failures", "message"),
    [
        ([(2, 1.0, None)], "replica=2 of 2"),
        ([(0, 1.0, None), (0, 2.0, None)], "replica 0 is down already"),
        ([(0, 1.0, 5.0), (1, 2.0, None)], "no replica is left at 2 s"),
    ],
)
def test_failures_that_cannot_be_are_told(failures, message):
    plan = small_plan(replicas=2)
    with pytest.raises(UserError, match=message):
        run(trace_of((0.0, 1, 1)), plan, failing(*failures))


def test_the_command_line(tmp_path, capsys):
    files = {name: str(tmp_path / f"{name[0]}.json") for name in ("trace", "config", "profile")}
    files["trace"] += "l"
    save(trace_of(*((0.1 * i, 50, 200) for i in range(30))), tmp_path / "t.jsonl")
    (tmp_path / "c.json").write_text('{"replicas": 2}')
    (tmp_path / "s.json").write_text(json.dumps({"failures": [{"replica": 0, "at_s": 1.0}]}))
    (tmp_path / "p.json").write_text(json.dumps(synthetic.profile_json(tps=(1,))))
    common = [
        "run",
        *(part for name in ("trace", "config", "profile") for part in (f"--{name}", files[name])),
    ]
    results = []
    for more in ([], ["--scenario", str(tmp_path / "s.json")]):
        assert main([*common, "--format", "json", *more]) == 0
        results.append(json.loads(capsys.readouterr().out)["metrics"])
    assert results[0]["requests"] == results[1]["requests"] == 30
    assert results[1]["e2e_p99_s"] > results[0]["e2e_p99_s"]
    assert main([*common, "--scenario", str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err
