"""Intervals: wider for what is extrapolated, wider near saturation, never without a provenance."""

import json

import numpy as np
import pytest

from engine.errors import UserError
from planner.intervals import Prediction, error_of, predictions, rate, step_error
from planner.prices import load_prices
from sim.fit import FitReport


def report(*errors: float) -> FitReport:
    return FitReport(operators=(), steps=None, step_errors=np.array(errors))


def test_the_error_is_the_held_out_ninth_decile() -> None:
    assert step_error(report(*np.linspace(-0.1, 0.1, 201))) == pytest.approx(0.09)
    assert step_error(report(0.001)) == 0.02
    assert step_error(report()) == 0.15


def test_extrapolation_widens() -> None:
    assert error_of(0.04, 0.0) == 0.04
    assert error_of(0.04, 1.0) == pytest.approx(0.15)
    assert error_of(0.08, 1.0) == pytest.approx(0.24)
    assert error_of(0.04, 0.5) == pytest.approx(0.095)


def test_load_amplifies_latencies_but_not_the_offered_rate() -> None:
    values = {"ttft_p95_s": 0.2, "throughput_rps": 10.0, "slo_attainment": 0.9, "requests": 5.0}
    found = predictions(values, "interpolated", 0.1, load=0.5)
    assert (found["ttft_p95_s"].low, found["ttft_p95_s"].high) == pytest.approx((0.16, 0.24))
    assert (found["throughput_rps"].low, found["throughput_rps"].high) == pytest.approx((9.5, 10.5))
    assert (found["slo_attainment"].low, found["slo_attainment"].high) == pytest.approx((0.88, 0.92))
    assert found["requests"].low == found["requests"].high == 5.0
    assert all(item.provenance == "interpolated" for item in found.values())
    assert rate(11.0, "extrapolated", 0.1).low == pytest.approx(10.0)


def test_what_cannot_be_told_is_null() -> None:
    value = Prediction(float("nan"), float("nan"), float("inf"), "interpolated").to_json()
    assert value == {"value": None, "low": None, "high": None, "provenance": "interpolated"}


def test_prices(tmp_path) -> None:
    assert load_prices(None)["h200"] > 0
    path = tmp_path / "prices.json"
    path.write_text(json.dumps({"usd_per_gpu_hour": {"H200": 3}}))
    assert load_prices(path) == {"h200": 3.0}
    for bad in ("[]", "{", '{"usd_per_gpu_hour": {"h200": -1}}', '{"usd_per_gpu_hour": {"h200": "1"}}'):
        path.write_text(bad)
        with pytest.raises(UserError, match=r"prices\.json"):
            load_prices(path)
