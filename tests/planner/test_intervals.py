"""Intervals: by the fit's held-out errors, wider for what is extrapolated, never without a provenance."""

import json
from dataclasses import replace

import numpy as np
import pytest

from engine.adapter import adapters_of_trace
from engine.config import ServingConfig
from engine.errors import UserError
from engine.step import StepShape
from planner.paced import PACES, Paced, PacedJob, StepErrors, from_json, predicted, to_json
from planner.prices import load_prices
from planner.pricing import Pricing
from planner.probe import Probe, Prober
from planner.workload import Workload
from sim.fit import FitReport
from sim.intervals import Interval, intervals
from sim.profile import find_profile, load_profile
from sim.simulate import simulate
from traces import load, sample_path
from traces.metrics import Slo

WIDE = tuple(np.linspace(-0.1, 0.1, 201).tolist())
PROBE = Probe(
    scale=1.0,
    wanted=0.95,
    attainment=0.9,
    aborted=False,
    metrics={"requests": 5.0, "ttft_p95_s": 0.3, "throughput_rps": 10.0, "slo_attainment": 0.98},
    missed={},
    bottleneck="matmul",
    kv_pages_max=0.1,
    adapter_pages_max=0.1,
    step_share=0.5,
    provenance="interpolated",
    extrapolated_share=0.0,
)
PACED = Paced(
    metrics={
        "requests": (5.0, 5.0, 5.0),
        "ttft_p95_s": (0.1, 0.2, 0.4),
        "throughput_rps": (10.0, 10.0, 10.0),
        "slo_attainment": (1.0, 0.9, 0.6),
    },
    decode_share=0.7,
)


def errors(*off: float) -> StepErrors:
    shapes = (StepShape(decode_rows=1, decode_kv_tokens=9, sample_rows=1),) * len(off)
    report = FitReport(operators=(), steps=None, step_errors=np.array(off), step_shapes=shapes)
    return StepErrors(report=report)


def width(interval: Interval) -> float:
    return interval.high / interval.low


def test_the_typical_error_is_the_held_out_ninth_decile_and_wider_beyond_what_was_measured() -> None:
    # Both kinds of step draw from the same errors here, half the time each: narrower than one kind's 9 %.
    assert errors(*WIDE).typical(0.0) == pytest.approx(0.068, abs=0.006)
    assert errors(*WIDE).typical(1.0) > 3 * errors(*WIDE).typical(0.0)
    assert StepErrors(report=None).typical(0.0) == pytest.approx(0.15 / 2**0.5, rel=0.06)
    assert StepErrors(report=None, sd=0.02).typical(0.0) < 0.03


def test_a_metric_moves_as_it_did_on_the_window_around_its_own_value() -> None:
    found = predicted(PROBE, PACED, errors(*WIDE), 20.0)
    ttft = found["ttft_p95_s"]
    assert ttft.low < ttft.value == 0.3 < ttft.high
    assert ttft.high / 0.3 > 1.15  # twice as late with steps a quarter slower: it amplifies ±9 %
    assert found["throughput_rps"].high == pytest.approx(10.0, rel=0.005)
    assert found["slo_attainment"].high == 1.0 and 0.85 < found["slo_attainment"].low < 0.96
    assert found["requests"].low == found["requests"].high == 5.0
    rate = found["sustainable_rps"]
    assert 18.0 < rate.low < 20.0 < rate.high < 22.5
    assert all(item.provenance == "interpolated" for item in found.values())


def test_extrapolation_widens_every_interval() -> None:
    outside = replace(PROBE, extrapolated_share=1.0, provenance="extrapolated")
    near, far = (predicted(probe, PACED, errors(*WIDE), 20.0) for probe in (PROBE, outside))
    for name in ("ttft_p95_s", "sustainable_rps"):
        assert width(far[name]) > 1.3 * width(near[name]) and far[name].provenance == "extrapolated"


@pytest.mark.slow
def test_it_is_the_simulators_own_interval() -> None:
    """On a trace no longer than the window both simulate the same requests."""
    trace = load(sample_path()).head(150)
    config = ServingConfig(max_model_len=4096)
    pricing = Pricing(load_profile(find_profile(config)))
    specs = adapters_of_trace(trace.adapters)
    prober = Prober(workload=Workload.of(trace), slo=Slo(), adapters=specs, price=pricing, simulate=simulate)
    probe = prober(config, "trace", 1.0, watch=True)
    ours = predicted(
        probe, PacedJob(config=config).run(prober), StepErrors(report=pricing(config).report), 1.0
    )
    names = ("ttft_p95_s", "tpot_p50_s", "e2e_p95_s")
    for name, theirs in intervals(trace, config, pricing(config), names, adapters=specs).items():
        assert ours[name].value == theirs.value
        assert (ours[name].low, ours[name].high) == pytest.approx((theirs.low, theirs.high), rel=0.05)


def test_what_is_known_survives_the_journal() -> None:
    assert from_json(json.loads(json.dumps(to_json(PACED)))) == PACED
    assert len(PACES) == 3


def test_what_cannot_be_told_is_null() -> None:
    value = Interval(float("nan"), float("nan"), float("inf"), "interpolated").to_json()
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
