"""The compiled price of a step is the fitted envelope's."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.additive import Additive, Ramp
from sim.envelope import Envelope
from sim.price import Price

NAMES = ("rows", "kv_tokens", "kv_max")
slopes = st.floats(0, 10)


@st.composite
def limits(draw):
    """A constant, and for each size straight or broken lines."""
    ramps = []
    for index in range(len(NAMES)):
        knots = sorted(draw(st.lists(st.integers(1, 5000), max_size=3, unique=True)))
        edges = [0.0, *map(float, knots), np.inf]
        ramps += [
            Ramp(index, edges[i], edges[i + 1], draw(slopes))
            for i in range(len(edges) - 1)
            if draw(st.booleans())
        ]
    return Additive(draw(slopes), tuple(ramps))


envelopes = st.lists(limits(), min_size=1, max_size=3).map(lambda found: Envelope(tuple(found)))
sizes = st.tuples(st.integers(0, 300), st.integers(0, 6000), st.integers(0, 6000))


@settings(max_examples=300)
@given(model=envelopes, at=sizes)
def test_a_point_is_priced_as_the_envelope_says(model, at):
    expected = model.many(np.array([at], dtype=float))[0]
    np.testing.assert_allclose(Price(model, NAMES).at(*at), expected, rtol=1e-12)


@settings(max_examples=300)
@given(model=envelopes, at=sizes, steps=st.integers(1, 300))
def test_the_line_holds_for_as_many_steps_as_it_says(model, at, steps):
    price, grows = Price(model, NAMES), (0, at[0], 1)
    slope, straight = price.line(at, grows, steps)
    assert 1 <= straight <= steps and slope >= 0
    ahead = np.arange(straight)
    points = np.array(at, dtype=float) + ahead[:, None] * np.array(grows)
    np.testing.assert_allclose(price.at(*at) + slope * ahead, model.many(points), rtol=1e-9, atol=1e-9)


def test_a_line_ends_where_a_steeper_limit_takes_over_and_at_a_knot():
    flat, steep = Additive(10.0, ()), Additive(0.0, (Ramp(1, 0.0, np.inf, 1.0),))
    assert Price(Envelope((flat, steep)), NAMES).line((1, 4, 0), (0, 1, 1), 100) == (0.0, 7)
    assert Price(Envelope((flat, steep)), NAMES).line((1, 11, 0), (0, 1, 1), 100) == (1.0, 100)
    bent = Envelope((Additive(0.0, (Ramp(2, 0.0, 8.0, 1.0), Ramp(2, 8.0, np.inf, 2.0))),))
    assert Price(bent, NAMES).line((1, 0, 3), (0, 1, 1), 100) == (1.0, 6)
    assert Price(bent, NAMES).line((1, 0, 8), (0, 1, 1), 100) == (2.0, 100)
