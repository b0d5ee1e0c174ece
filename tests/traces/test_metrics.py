"""Metrics computed by hand."""

import math

import numpy as np
import pytest

from traces import TraceError
from traces.metrics import Slo, metrics

NAN = math.nan
REQUESTS = {
    "arrival_s": [0.0, 1.0, 2.0, 3.0],
    "scheduled_s": [0.0, 1.5, 2.0, NAN],
    "first_token_s": [1.0, 2.0, 2.25, NAN],
    "finish_s": [5.0, 2.0, 4.25, NAN],
    "prompt_tokens": [40, 10, 50, 70],
    "output_tokens": [5, 1, 3, 7],
    "adapter": ["a", None, "b", "a"],
    "load_wait_s": [0.0, 0.0, 0.5, 0.0],
    "preemptions": [0, 0, 2, 0],
    "cached_tokens": [0, 0, 32, 0],
}


def test_metrics_by_hand():
    values = metrics(REQUESTS, Slo(ttft_s=1.0, tpot_s=1.0), adapter_loads=2)
    assert list(values) == [
        "requests",
        "throughput_rps",
        "output_tokens_per_s",
        *(f"{name}_{at}_s" for name in ("ttft", "tpot", "e2e") for at in ("mean", "p50", "p95", "p99")),
        "slo_attainment",
        "adapter_loads",
        "adapter_hit_rate",
        "preemptions",
        "prefix_hit_rate",
    ]
    assert values["requests"] == 4
    assert values["throughput_rps"] == 3 / 5
    assert values["output_tokens_per_s"] == 9 / 5
    assert values["ttft_mean_s"] == pytest.approx((1 + 1 + 0.25) / 3)
    assert values["ttft_p50_s"] == 1.0
    assert values["tpot_mean_s"] == 1.0  # (5 − 1) / 4 and (2.25 − 0.25) / 2; one token has none
    assert values["e2e_p50_s"] == 2.25
    assert values["e2e_p95_s"] == pytest.approx(2.25 + 0.9 * (5 - 2.25))
    assert values["slo_attainment"] == 3 / 4  # the refused request misses it
    assert values["adapter_loads"] == 2
    assert values["adapter_hit_rate"] == 1 / 2
    assert values["preemptions"] == 2
    assert values["prefix_hit_rate"] == 32 / 100  # the refused request's prompt does not count


def test_attainment_needs_every_bound():
    assert metrics(REQUESTS, Slo(ttft_s=0.5, tpot_s=1.0))["slo_attainment"] == 1 / 4
    assert metrics(REQUESTS, Slo(ttft_s=1.0, tpot_s=0.5))["slo_attainment"] == 1 / 4
    assert metrics(REQUESTS, Slo(ttft_s=1.0, tpot_s=1.0, e2e_s=2.0))["slo_attainment"] == 1 / 4


def test_what_cannot_be_told_is_nan():
    nothing = {name: values[3:] for name, values in REQUESTS.items()}
    values = metrics(nothing)
    assert values["requests"] == 1
    assert values["slo_attainment"] == 0.0
    assert all(
        math.isnan(values[name])
        for name in ("throughput_rps", "ttft_p50_s", "adapter_hit_rate", "prefix_hit_rate")
    )


def test_a_data_frame_is_taken_too():
    pandas = pytest.importorskip("pandas")
    assert metrics(pandas.DataFrame(REQUESTS))["throughput_rps"] == 3 / 5
    assert np.isclose(metrics(pandas.DataFrame(REQUESTS))["adapter_hit_rate"], 0.5)


@pytest.mark.parametrize(
    "bounds", [{"ttft_s": -1.0}, {"tpot_s": 0.0}, {"e2e_s": NAN}, {"percentile": 0}, {"attainment": 1.5}]
)
def test_a_bad_slo_names_the_bound(bounds):
    with pytest.raises(TraceError, match=next(iter(bounds))):
        Slo(**bounds)
