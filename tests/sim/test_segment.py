"""Equal steps in closed form: the same instants as one by one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.segment import DecodeRun, Segment

runs = st.builds(
    DecodeRun,
    first_s=st.floats(1e-4, 2.0),
    slope_s=st.sampled_from([0.0, 1e-7, 1e-3]) | st.floats(0, 0.1),
    steps=st.integers(1, 600),
)


@given(run=runs, host_s=st.floats(0, 2.5), start_s=st.floats(0, 1e5))
def test_starts_are_the_sums_of_the_steps_before(run, host_s, start_s):
    segment = Segment(run, host_s, start_s)
    assert 1 <= segment.steps <= run.steps
    gpu_s = run.first_s + run.slope_s * np.arange(segment.steps)
    starts_s = start_s + np.concatenate([[0.0], np.maximum(gpu_s, host_s).cumsum()])
    found_s = [segment.start_of(step) for step in range(segment.steps + 1)]
    np.testing.assert_allclose(found_s, starts_s, rtol=1e-12, atol=1e-9)
    assert segment.gpu_s(segment.steps) == pytest.approx(gpu_s.sum())


@given(run=runs, host_s=st.sampled_from([0.0, 0.3]), start_s=st.floats(0, 1e5), share=st.floats(-0.1, 1.0))
def test_the_first_step_from_an_instant_on(run, host_s, start_s, share):
    segment = Segment(run, host_s, start_s)
    at_s = start_s + share * (segment.start_of(segment.steps) - start_s)
    step = segment.first_from(at_s)
    assert segment.start_of(step) >= at_s
    assert step == 0 or segment.start_of(step - 1) < at_s


@given(run=runs, start_s=st.floats(0, 1e5), step=st.integers(0, 50))
def test_an_instant_at_which_a_step_starts_is_that_steps(run, start_s, step):
    segment = Segment(run, 0.0, start_s)
    at_s = segment.start_of(step)
    assert segment.start_of(segment.first_from(at_s)) == at_s


def test_what_the_host_hides_is_a_segment_of_its_own():
    segment = Segment(DecodeRun(1.0, 0.5, 10), 2.0, 0.0)  # 1, 1.5 | 2, 2.5, …
    assert segment.steps == 2
    assert [segment.start_of(step) for step in range(3)] == [0.0, 2.0, 4.0]
    assert segment.gpu_s(2) == 2.5
    assert Segment(DecodeRun(1.0, 0.5, 10), 1.0, 0.0).steps == 10
    assert Segment(DecodeRun(1.0, 0.0, 10), 2.0, 0.0).steps == 10
