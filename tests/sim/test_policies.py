"""Scheduling policies in simulated time: fast-forward changes nothing, and who is turned away is in the result."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.residency import AdapterFootprint
from sim.simulate import simulate
from tests.sim.constant import ConstantCosts, small_plan, trace_of

ADAPTERS = ("a0", "a1", "a2", "a3")
FOOTPRINTS = {name: AdapterFootprint(pages=1, weight_bytes=1, copy_bytes=1) for name in ADAPTERS}
COSTS = ConstantCosts(step=1.0, token=0.01, kv=0.001, load=1.5)

arrivals_strategy = st.lists(
    st.tuples(
        st.floats(0, 12, allow_nan=False).map(lambda gap: round(gap, 2)),
        st.integers(1, 30),
        st.integers(1, 30),
        st.sampled_from([None, *ADAPTERS]),
    ),
    min_size=1,
    max_size=25,
)


@settings(max_examples=80, deadline=None)
@given(
    arrivals=arrivals_strategy,
    policy=st.sampled_from(["clustered", "fair", "slo"]),
    pages=st.integers(8, 30),
    cap=st.sampled_from([None, 1, 2]),
)
def test_fast_forward_changes_nothing_under_any_policy(arrivals, policy, pages, cap):
    # No arrival may fall on the end of a step, all of which lie on thousandths after one: which comes first would be a matter of rounding.
    instants = np.cumsum([row[0] for row in arrivals]).round(2) + 1.37e-5 * np.arange(len(arrivals))
    trace = trace_of(*((at_s, *row[1:]) for at_s, row in zip(instants.tolist(), arrivals, strict=True)))
    plan = small_plan(
        pages,
        FOOTPRINTS,
        scheduler=policy,
        max_adapters_per_step=cap,
        ttft_slo_s=20.0,
        adapter_weights={"a1": 3.0},
    )
    fast, slow = (simulate(trace, plan.config, COSTS, plan=plan, fast_forward=on) for on in (True, False))
    for name in ("scheduled_s", "first_token_s", "finish_s"):
        np.testing.assert_allclose(fast.columns[name], slow.columns[name], rtol=1e-9, err_msg=name)
    assert fast.columns["refused"].tolist() == slow.columns["refused"].tolist()
    refused = np.array([reason is not None for reason in fast.columns["refused"]])
    assert (np.isfinite(fast.columns["finish_s"]) != refused).all()


@pytest.mark.parametrize("fast_forward", [True, False])
def test_who_is_turned_away_is_refused_with_the_reason(fast_forward):
    plan = small_plan(scheduler="slo", ttft_slo_s=10.0)
    trace = trace_of(*[(0.0, 4, 40)] * 4, *[(1.0, 4, 40)] * 2)
    result = simulate(trace, plan.config, ConstantCosts(), plan=plan, fast_forward=fast_forward)
    assert result.metrics["requests"] == 6
    assert result.refused == {"its first token could not come within 10.0 s": 2}
    assert np.isnan(result.columns["first_token_s"][4:]).all()
    assert result.duration_s == 40.0
