"""What GPUs exchange, by hand-computed sums; and steps measured under tensor parallelism, which correct what is composed."""

import json

import numpy as np
import pytest

from engine.config import ServingConfig
from engine.errors import UserError
from engine.model_shape import MODEL_CATALOGUE
from sim.costs import costs_for, fit_costs
from sim.curve import fit_curve
from sim.exchange import exchange_of, exchanges_of
from sim.parallel import nearest, parse_parallel
from sim.profile import PROFILES, load_profile, parse_profile
from tests.sim import synthetic

MODEL = MODEL_CATALOGUE["llama-3.1-8b"]
SIZES = np.array([1e4, 1e5, 1e6, 1e7, 1e8])


def line(alpha_us, us_per_mb):
    return fit_curve(SIZES, alpha_us + us_per_mb * SIZES / 1e6, "linear")


CURVES = {
    (2, "all_reduce"): line(10.0, 4.0),
    (2, "all_gather"): line(8.0, 2.0),
    (2, "nccl_add_norm"): line(11.0, 4.0),
    (2, "peer_add_norm"): line(5.0, 3.0),
}


def compose(tp=2, exchange="local", collectives="nccl", link=1.0):
    return exchanges_of(CURVES, MODEL, tp, exchange, collectives, 2, "test", link)


def test_one_gpu_exchanges_nothing():
    alone = exchanges_of({}, MODEL, 1, "local", "fast", 2, "test")
    assert alone.base_us(64, 64) == alone.lora_us(64, 1e6) == 0


def test_the_base_sums_every_row_parallel_linear_and_gathers_logits():
    size, logits = 1000 * 8192, 10 * 128256 // 2 * 2
    expected = 65 * (11.0 + 4.0 * size / 1e6) + 8.0 + 2.0 * logits / 1e6
    assert compose().base_us(1000, 10) == pytest.approx(expected)
    fast = 65 * (5.0 + 3.0 * size / 1e6) + 8.0 + 2.0 * logits / 1e6
    assert compose(collectives="fast").base_us(1000, 10) == pytest.approx(fast)


def test_steps_too_large_for_peers_go_by_nccl():
    tokens = (17 << 20) // 8192
    assert compose(collectives="fast").base_us(tokens, 0) == compose().base_us(tokens, 0)


@pytest.mark.parametrize(("tp", "depth", "moved"), [(2, 1, 1), (4, 2, 1.5), (8, 3, 1.75)])
def test_more_gpus_take_a_deeper_tree_and_more_of_a_ring(tp, depth, moved):
    size = 500 * 8192
    alpha = 11.0 + 4.0 * 1e4 / 1e6  # as measured at the fewest bytes
    sums = 65 * (alpha * depth + 4.0 * (size - 1e4) / 1e6 * moved)
    gather = (8.0 + 0.02) * depth
    assert compose(tp=tp).base_us(500, 0) == pytest.approx(sums + gather)


def test_messages_of_s_lora():
    """A token of rank 16 on all linears: 16 × 2 bytes a message; a layer has two gathers and two sums, or five gathers as published."""
    token_bytes = 16 * 2 * 32 * sum(a + b for a, b in MODEL.linear_shapes(1).values()) / 2
    tokens = 1 << 17  # so that bytes count
    message = tokens * 32
    gather, reduce = 8.0 + 2.0 * message / 1e6, 10.0 + 4.0 * message / 1e6
    assert compose(exchange="slora").lora_us(tokens, token_bytes) == pytest.approx(
        32 * (2 * gather + 2 * reduce)
    )
    published = compose(exchange="slora_published").lora_us(tokens, token_bytes)
    assert published == pytest.approx(32 * (5 * gather + 2 * reduce))
    assert compose(exchange="local").lora_us(tokens, token_bytes) == 0


def test_another_link_stretches_bytes_and_not_latency():
    one, two = (compose(link=link).base_us(1000, 0) for link in (1.0, 2.0))
    moved = 65 * 4.0 * (1000 * 8192 - 1e4) / 1e6
    assert two - one == pytest.approx(moved)


def test_configurations_say_what_they_exchange():
    assert exchange_of(ServingConfig(tp=1, lora_sharding="slora")) == "local"
    assert exchange_of(ServingConfig(tp=2, lora_sharding="block_diagonal")) == "local"
    assert exchange_of(ServingConfig(tp=2, lora_sharding="slora_published")) == "slora_published"


# ---- measured steps ----


def parallel_json(factor=1.5, tp=2, lora_sharding="base"):
    """A profile at TP `tp` whose steps take `factor` times what is composed."""
    profile = parse_profile(synthetic.profile_json(), "synthetic")
    costs = fit_costs(profile, tp, collectives="nccl")
    shapes = synthetic.step_shapes()
    rows = [
        {
            "lora_sharding": lora_sharding if shape.lora_adapters else "base",
            "collectives": "nccl",
            "gpu_us": factor * costs.step_s(shape) * 1e6,
            "shape": shape.to_json(),
        }
        for shape in shapes
    ]
    rows.append({"case": "burst", "rps": 3.0})
    return {"schema_version": 1, "model": "llama-3.1-8b", "tp": tp, "steps": rows, "collective": []}


def test_whole_steps_correct_what_is_composed():
    profile = parse_profile(synthetic.profile_json(), "synthetic", [(parallel_json(), "parallel")])
    plain = parse_profile(synthetic.profile_json(), "synthetic")
    shape = synthetic.shape(rows=20, kv=300, adapters=4)
    corrected = fit_costs(profile, 2, collectives="nccl")
    assert corrected.step_s(shape) == pytest.approx(
        1.5 * fit_costs(plain, 2, collectives="nccl").step_s(shape), rel=0.03
    )
    assert sum(corrected.parts_s(shape).values()) == pytest.approx(corrected.step_s(shape))
    assert corrected.provenance(shape) == "interpolated"
    assert corrected.provenance(profile.parallel[0].steps[3]) == "measured"
    assert fit_costs(profile, 4, collectives="nccl").provenance(shape) == "extrapolated"
    assert fit_costs(profile, 2, collectives="fast").provenance(shape) == "extrapolated"
    # One GPU's correction is its own.
    assert fit_costs(profile).step_s(shape) == fit_costs(plain).step_s(shape)


def test_the_nearest_steps_are_of_the_same_way_to_exchange_then_model_then_gpus():
    parsed = [
        steps
        for tp, sharding in ((2, "base"), (4, "base"), (2, "slora"))
        for steps in parse_parallel(parallel_json(tp=tp, lora_sharding=sharding), "p")[0]
    ]
    pick = lambda *wanted: nearest(parsed, *wanted)  # noqa: E731
    assert pick(MODEL, 8, "local", "nccl").tp == 4
    assert pick(MODEL, 8, "slora", "nccl").exchange == "slora"
    assert pick(MODEL_CATALOGUE["llama-3.1-70b"], 2, "local", "fast").tp == 2
    assert nearest([], MODEL, 2, "local", "nccl") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "schema_version 1"),
        ({"tp": "2"}, "tp='2' must be a int"),
        ({"steps": [{"lora_sharding": "x", "gpu_us": 1.0, "shape": {}}]}, r"steps\[0\]: lora_sharding='x'"),
        ({"steps": [{"lora_sharding": "slora", "gpu_us": 1.0, "shape": 3}]}, r"steps\[0\]"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(change, message):
    with pytest.raises(UserError, match=message):
        parse_parallel(parallel_json() | change, "file")


def test_the_shipped_steps_are_described_within_a_few_percent():
    """Held-out median error of whole steps; predictions at TP 2 rest on it."""
    profile = load_profile(PROFILES / "llama-3.1-8b.h200.json")
    found = {(steps.model.name, steps.exchange) for steps in profile.parallel}
    assert {("llama-3.1-8b", "local"), ("llama-3.1-70b", "slora")} <= found
    for sharding in ("block_diagonal", "slora", "slora_published"):
        config = ServingConfig(tp=2, lora_sharding=sharding)
        report = costs_for(profile, config).report
        assert np.median(np.abs(report.step_errors)) < 0.04, sharding


def test_shipped_profiles_of_tensor_parallelism_are_whole():
    for path in PROFILES.glob("*.tp*.json"):
        data = json.loads(path.read_text(encoding="utf-8"))
        assert {"commit", "date", "command", "driver", "gpu_name"} <= set(data), path
