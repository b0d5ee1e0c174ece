"""Fits recover what they were made from, cannot go negative, and say where they stop knowing."""

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import ServingConfig
from engine.errors import UserError
from engine.model_shape import MODEL_CATALOGUE
from engine.step import StepShape
from sim.additive import Additive
from sim.costs import costs_for, fit_costs
from sim.curve import fit_curve
from sim.envelope import Envelope, best_envelope
from sim.observe import decode_ahead
from sim.profile import find_profile, load_profile, parse_profile
from tests.sim import synthetic

PROFILE = parse_profile(synthetic.profile_json(), "synthetic")
COSTS = fit_costs(PROFILE)
SHAPES = [
    synthetic.shape(rows=20, kv=300, adapters=10),
    synthetic.shape(rows=200, kv=900, adapters=150, rank=8),
    synthetic.shape(rows=100, kv=300, prefill=512, chunks=2, adapters=50),
    synthetic.shape(prefill=1000, chunks=1),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_profile_of_known_coefficients_is_recovered(shape):
    assert COSTS.step_s(shape) == pytest.approx(synthetic.step_us(shape) * 1e-6, rel=0.01)


def test_transfers_and_host_turns_are_recovered():
    assert COSTS.load_s(84_000_000) == pytest.approx(synthetic.transfer_us(84_000_000) * 1e-6, rel=1e-6)
    shape = synthetic.shape(rows=100, kv=300, prefill=512, chunks=2)
    assert COSTS.host_s(shape) == pytest.approx(synthetic.host_us(100, 2) * 1e-6, rel=1e-6)


def test_the_report_tells_errors_in_sample_and_held_out():
    assert COSTS.report.steps is not None
    assert COSTS.report.steps.held_out_worst_error < 0.01
    assert {fit.name for fit in COSTS.report.operators} >= {
        "matmul qkv tp1",
        "lora tp1 tiles of 16",
        "transfer",
        "host",
    }
    assert all(fit.worst_error < 0.02 for fit in COSTS.report.operators)
    assert len(COSTS.report.step_errors) == len(PROFILE.steps)


def test_whole_steps_correct_what_operators_do_not_see():
    slower = fit_costs(parse_profile(synthetic.profile_json(correction=1.25), "synthetic"))
    for shape in SHAPES:
        assert slower.step_s(shape) == pytest.approx(1.25 * COSTS.step_s(shape), rel=0.02)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_parts_add_up_to_the_step(shape, tp):
    costs = fit_costs(PROFILE, tp)
    assert sum(costs.parts_s(shape).values()) == pytest.approx(costs.step_s(shape), rel=1e-12)


def knotted_profile():
    """A profile whose decode attention has two limits, or knees, so that a run of steps is not one straight
    line.
    """
    data = synthetic.profile_json(tps=(1,))
    for row in data["operators"]["attention_decode"]:
        row["us"] = 5 + max(0.3 * row["rows"], 0.001 * row["kv_tokens"])
    return parse_profile(data, "two limits")


@pytest.mark.parametrize("profile", [PROFILE, knotted_profile()])
@pytest.mark.parametrize("steps", [1, 2, 500])
def test_a_run_of_decode_steps_costs_what_its_steps_cost(profile, steps):
    costs = fit_costs(profile)
    for shape in (synthetic.shape(rows=37, kv=100, adapters=20), synthetic.shape(rows=200, kv=20)):
        done = 0
        while done < steps:  # stretch by stretch
            run = costs.decode_run(decode_ahead(shape, done), steps - done)
            assert 1 <= run.steps <= steps - done
            one_by_one = [costs.step_s(decode_ahead(shape, done + ahead)) for ahead in range(run.steps)]
            together = run.first_s + run.slope_s * np.arange(run.steps)
            np.testing.assert_allclose(together, one_by_one, rtol=0, atol=1e-15)
            done += run.steps


sizes = st.integers(0, 10**6)


@settings(max_examples=200, deadline=None)
@given(
    rows=st.integers(0, 5000),
    kv=sizes,
    prefill=sizes,
    chunks=st.integers(0, 500),
    num_bytes=st.integers(0, 10**12),
)
def test_no_step_costs_nothing_and_more_never_costs_less(rows, kv, prefill, chunks, num_bytes):
    shape = StepShape(
        decode_rows=rows,
        decode_kv_tokens=rows * kv,
        decode_kv_max=kv,
        prefill_tokens=prefill,
        prefill_chunks=chunks,
        prefill_pairs=prefill * prefill // 2,
        prefill_kv_tokens=prefill,
        prefill_kv_max=prefill,
        lora_tokens=rows,
        lora_adapters=min(rows, 10),
        lora_bytes=num_bytes,
        lora_token_bytes=num_bytes,
    )
    assert COSTS.step_s(shape) > 0
    longer = replace(shape, decode_kv_tokens=shape.decode_kv_tokens + 100, lora_bytes=num_bytes + 10**6)
    assert COSTS.step_s(longer) >= COSTS.step_s(shape)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 1000), st.integers(0, 1000), st.floats(0.1, 1e4)), min_size=3, max_size=30
    )
)
def test_sums_of_ramps_are_never_negative_whatever_was_measured(rows):
    features = np.array([[a, b] for a, b, _ in rows], dtype=float)
    choice = best_envelope(features, np.array([us for _, _, us in rows]))
    for limit in choice.model.limits:
        assert limit.constant >= 0
        assert all(ramp.slope > 0 for ramp in limit.ramps)
    assert (choice.model.many(np.array([[0.0, 0.0], [1e6, 1e6]])) >= 0).all()


def test_a_time_that_one_of_two_limits_decides_is_found():
    grid = np.array(
        [(tokens, size) for tokens in range(1, 400, 23) for size in range(1, 400, 29)], dtype=float
    )
    y = 5 + np.maximum(0.3 * grid[:, 0], 0.2 * grid[:, 1])
    choice = best_envelope(grid, y)
    assert choice.method.startswith("max of")
    assert np.abs(choice.held_out / y - 1).max() < 0.01


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 1000), st.floats(0.1, 1e4)), min_size=1, max_size=30),
    st.sampled_from(["linear", "pchip"]),
)
def test_curves_are_monotone_and_positive_whatever_was_measured(rows, kind):
    curve = fit_curve(np.array([x for x, _ in rows], dtype=float), np.array([us for _, us in rows]), kind)
    values = curve.many(np.linspace(1, 3000, 200))
    assert (values > 0).all()
    assert (np.diff(values) >= -1e-9 * values[1:]).all()


def test_a_step_is_padded_to_its_graph():
    assert COSTS.step_s(synthetic.shape(rows=129)) == pytest.approx(
        COSTS.step_s(synthetic.shape(rows=136)), rel=0.02
    )
    parts = [COSTS.parts_s(synthetic.shape(rows=rows))["matmul"] for rows in (129, 136, 137)]
    assert parts[0] == parts[1] < parts[2]


def test_a_step_that_no_graph_is_large_enough_for_takes_as_long_as_its_launches():
    """On an H200 eager steps with adapters took 55 to 166 ms, those without what the GPU needs."""
    data = synthetic.profile_json()
    for tokens in range(1100, 2000, 50):
        shape = synthetic.shape(prefill=tokens, chunks=1, adapters=1)
        data["steps"].append({"shape": shape.to_json(), "gpu_us": 90e3})
        shape = synthetic.shape(prefill=tokens, chunks=1)
        data["steps"].append({"shape": shape.to_json(), "gpu_us": synthetic.step_us(shape)})
    costs = fit_costs(parse_profile(data, "eager"))
    for shape in SHAPES:
        assert costs.step_s(shape) == pytest.approx(COSTS.step_s(shape), rel=1e-3)
    eager = synthetic.shape(prefill=1200, chunks=1, adapters=1)
    assert costs.step_s(eager) == pytest.approx(90e-3)
    assert sum(costs.parts_s(eager).values()) == pytest.approx(90e-3)
    assert costs.provenance(eager) == "extrapolated"
    base = synthetic.shape(prefill=1200, chunks=1)
    assert costs.step_s(base) == pytest.approx(synthetic.step_us(base) * 1e-6, rel=0.02)


def test_provenance_says_measured_interpolated_or_extrapolated():
    assert COSTS.provenance(PROFILE.steps[10]) == "measured"
    assert COSTS.provenance(SHAPES[0]) == "interpolated"
    assert COSTS.provenance(synthetic.shape(rows=200, kv=30_000)) == "extrapolated"
    assert fit_costs(PROFILE, 2).provenance(SHAPES[0]) == "extrapolated"
    other = costs_for(PROFILE, ServingConfig(model="llama-3.2-3b"))
    assert other.provenance(SHAPES[0]) == "extrapolated"


def test_more_gpus_split_the_work_and_pay_for_collectives():
    shape = synthetic.shape(rows=64, kv=500)
    by_tp = [fit_costs(PROFILE, tp).parts_s(shape) for tp in (1, 2, 4, 8)]
    assert [parts["matmul"] for parts in by_tp] == sorted((parts["matmul"] for parts in by_tp), reverse=True)
    assert [parts["collectives"] for parts in by_tp] == sorted(parts["collectives"] for parts in by_tp)
    assert by_tp[0]["collectives"] == 0
    # Two all-reduces a layer and one more, of 64 tokens × 8 KiB = 512 KiB between 2 GPUs: 12.4 to 17.8 µs each. And the logits of 64 rows, 8 MB.
    assert 65 * 12.4e-6 + 35.7e-6 < by_tp[1]["collectives"] < 65 * 17.8e-6 + 77.9e-6


def test_another_model_scales_with_its_bytes():
    shape = synthetic.shape(rows=1, kv=100)
    ratio = fit_costs(PROFILE, model=MODEL_CATALOGUE["llama-3.1-70b"]).step_s(shape) / COSTS.step_s(shape)
    assert 6 < ratio < 12


def test_envelopes_scale():
    model = Envelope((Additive(1.0, ()), Additive(2.0, ())))
    assert model.scaled(3.0).many(np.zeros((1, 1))).tolist() == [6.0]


def test_costs_can_be_sent_to_another_process():
    again = pickle.loads(pickle.dumps(COSTS))
    assert again.step_s(SHAPES[1]) == COSTS.step_s(SHAPES[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("operators"), "operators must be an object"),
        (lambda data: data.update(schema_version=2), "schema_version=2 must be 1"),
        (lambda data: data["operators"].pop("lora"), "operators.lora must be a list"),
        (lambda data: data["operators"]["sample"][1].update(us=-1.0), r"operators.sample\[1\]: us=-1.0"),
        (
            lambda data: data["operators"]["matmul"][3].pop("tokens"),
            r"operators.matmul\[3\]: tokens is missing",
        ),
        (lambda data: data["operators"]["matmul"][3].update(linear="x"), "linear='x' must be one of"),
        (lambda data: data["steps"][2]["shape"].pop("lora_bytes"), r"steps\[2\].shape: lora_bytes=None"),
        (lambda data: data["steps"][2].update(gpu_us=float("nan")), r"steps\[2\]: gpu_us=nan"),
        (
            lambda data: [row.update(tp=2) for row in data["operators"]["lora"]],
            "lora has no measurement at tp=1",
        ),
        (lambda data: data.update(model="nobody"), "nobody"),
        (lambda data: data.update(host=[]), "host must be a list"),
    ],
)
def test_a_bad_profile_is_told_by_file_and_place(change, message):
    data = json.loads(json.dumps(synthetic.profile_json(tps=(1,))))
    change(data)
    with pytest.raises(UserError, match=message):
        parse_profile(data, "p.json")


def test_missing_and_broken_profiles_are_told(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        load_profile(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        load_profile(tmp_path / "bad.json")
    with pytest.raises(UserError, match="gpu 'b300' is not known"):
        find_profile(ServingConfig(gpu="b300"))


def test_another_gpu_scales_with_its_specification():
    shape = synthetic.shape(rows=1, kv=100)
    config = ServingConfig(gpu="a100-80")
    assert find_profile(config).name == "llama-3.1-8b.h200.json"
    slower = costs_for(PROFILE, config)
    ratio = slower.step_s(shape) / COSTS.step_s(shape)
    assert 0.9 * 4.8 / 2.039 < ratio < 4.8 / 2.039  # one row: memory's bandwidth, but for latencies
    prompt = synthetic.shape(prefill=2000, chunks=1)
    assert slower.step_s(prompt) / COSTS.step_s(prompt) > ratio  # operations, of which it does fewer
    assert slower.load_s(10**8) == pytest.approx(2 * COSTS.load_s(10**8), rel=0.02)  # PCIe 4 against 5
    assert slower.provenance(SHAPES[0]) == "extrapolated"
