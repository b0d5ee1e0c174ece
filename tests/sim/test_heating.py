"""The falling clock: parameters found again from series that were made with them, and steps of a cool and of a hot GPU."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import ServingConfig
from sim.costs import costs_for
from sim.heating import Heat, Heating, Series, fit_heating
from sim.profile import PROFILES, load_profile
from sim.simulate import simulate
from tests.sim.constant import ConstantCosts
from traces import Trace, TraceRequest

HEATING = Heating(tau_s=0.04, drive=1.6, tokens=(128.0, 512.0, 1024.0), slowdowns=(0.0, 0.16, 0.13))


def series(tokens, cool_s, decodes=0, decode_s=0.005, rounds=60):
    """What a GPU of these parameters would show."""
    heat, now_s, us = Heat(HEATING), 0.0, []
    for _ in range(rounds):
        times = [heat.run(cool_s, tokens, now_s), *[decode_s] * decodes]
        now_s += sum(times)
        us += [1e6 * time_s for time_s in times]
    return Series(tokens, decodes, np.array(us))


def test_a_step_slows_down_once_the_power_has_averaged_out():
    heat = Heat(HEATING)
    times = []
    for _ in range(8):
        times.append(heat.run(0.02, 1024, sum(times)))
    assert times[0] == 0.02
    assert times[-1] == pytest.approx(0.02 * 1.13)
    assert times == sorted(times)
    cooled = heat.run(0.02, 1024, sum(times) + 10.0)
    assert cooled == 0.02, "after ten seconds without prompts it is cool again"
    assert heat.run(0.02, 100, sum(times) + 10.1) == 0.02, "few tokens do not slow down"


def test_parameters_are_found_again():
    watched = [series(128, 0.0054), series(512, 0.011), series(1024, 0.021)]
    watched += [series(1024, 0.021, decodes, rounds=40) for decodes in (1, 2, 4)]
    found = fit_heating(watched)
    assert found.tokens == HEATING.tokens
    np.testing.assert_allclose(found.slowdowns, HEATING.slowdowns, atol=0.01)
    for one in watched:  # what it predicts is what matters: τ and drive alone are not told apart well
        heat, now_s = Heat(found), 0.0
        cool_s = one.us[:: one.decodes + 1].min() * 1e-6
        for index, us in enumerate(one.us.tolist()):
            if index % (one.decodes + 1) == 0:
                assert heat.run(cool_s, one.tokens, now_s) * 1e6 == pytest.approx(us, rel=0.04)
            now_s += us * 1e-6


def test_nothing_watched_or_nothing_that_slows_down_is_no_heating():
    assert fit_heating([]) is None
    assert fit_heating([series(1024, 0.02, decodes=2)]) is None, "only between decodes"
    assert fit_heating([Series(1024, 0, np.full(50, 20e3))]) is None


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(1e-4, 0.1), st.integers(1, 4096), st.floats(0.0, 0.2)), min_size=1, max_size=30
    )
)
def test_a_step_takes_between_its_cool_and_its_hot_time(steps):
    heat, now_s = Heat(HEATING), 0.0
    for cool_s, tokens, gap_s in steps:
        now_s += gap_s
        took_s = heat.run(cool_s, tokens, now_s)
        assert cool_s <= took_s <= cool_s * (1 + HEATING.slowdown(tokens)) * (1 + 1e-12)
        now_s += took_s


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(1e-4, 0.3), st.floats(0.0, 0.3)), min_size=1, max_size=30))
def test_recorded_steps_may_start_before_the_last_one_is_said_to_end(steps):
    heat, now_s = Heat(HEATING), 0.0
    for cool_s, next_s in steps:
        assert cool_s <= heat.run(cool_s, 1024, now_s) <= cool_s * 1.13 * (1 + 1e-12)
        now_s += next_s


def test_the_simulator_runs_prompts_on_a_gpu_that_heats_up():
    requests = [
        TraceRequest(id=n, arrival_s=0.0, prompt_tokens=1024, output_tokens=1, adapter=None) for n in range(6)
    ]
    config = ServingConfig(prefix_caching=False)
    cool = simulate(Trace(requests, "prompts"), config, ConstantCosts(step=0.02))
    hot = simulate(Trace(requests, "prompts"), config, ConstantCosts(step=0.02, heating=HEATING))
    heat, now_s = Heat(HEATING), 0.0
    for _ in requests:
        now_s += heat.run(0.02, 1024, now_s)
    assert cool.duration_s == pytest.approx(6 * 0.02)
    assert hot.duration_s == pytest.approx(now_s)
    assert hot.duration_s > cool.duration_s


def test_without_steps_of_several_gpus_those_heat_up_too():
    profile = replace(load_profile(PROFILES / "llama-3.1-8b.h200.json"), parallel=())
    assert costs_for(profile, ServingConfig(tp=2)).heating is not None, (
        "it was corrected by steps of one, cooled"
    )


def test_the_shipped_profile_knows_how_its_gpu_slows_down():
    profile = load_profile(PROFILES / "llama-3.1-8b.h200.json")
    found = costs_for(profile, ServingConfig()).heating
    assert 0.005 < found.tau_s < 0.5
    assert 0.05 < found.slowdown(1024) < 0.3
    assert costs_for(profile, ServingConfig(tp=2)).heating is None, (
        "whole steps at TP 2 were measured as they are"
    )
