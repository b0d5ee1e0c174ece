"""Merging in simulated time: the scheduler's own choices, and what switches cost."""

import numpy as np
import pytest

from engine.adapter import AdapterSpec
from engine.blueprint import blueprint
from engine.config import ServingConfig
from engine.errors import UserError
from engine.model_shape import MODEL_CATALOGUE
from engine.residency import AdapterFootprint
from sim.merge_costs import BOUND, switch_bound, switches_of
from sim.simulate import simulate
from tests.sim.constant import ConstantCosts, small_plan, trace_of

FOOTPRINTS = {name: AdapterFootprint(pages=2, weight_bytes=10, copy_bytes=10) for name in ("a0", "a1")}


def skewed(count=40, seed=0):
    rng = np.random.default_rng(seed)
    names = rng.choice(["a0", "a0", "a0", "a1", None], count)
    arrivals = np.cumsum(rng.exponential(2.0, count))
    rows = zip(arrivals, rng.integers(1, 30, count), rng.integers(1, 30, count), names, strict=True)
    return trace_of(*((float(at), int(prompt), int(output), name) for at, prompt, output, name in rows))


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_fast_forward_changes_nothing(alpha):
    plan = small_plan(48, FOOTPRINTS, merge="dynamic", merge_alpha=alpha, merge_beta=0.3)
    results = [
        simulate(
            skewed(),
            plan.config,
            ConstantCosts(step=1.0, kv=0.01),
            plan=plan,
            fast_forward=forward,
            record_steps=True,
        )
        for forward in (True, False)
    ]
    assert results[0].metrics == pytest.approx(results[1].metrics, nan_ok=True)
    assert [row.shape for row in results[0].steps] == [row.shape for row in results[1].steps]
    assert any(row.shape.lora_tokens == 0 and row.shape.tokens for row in results[0].steps)


def test_a_switch_is_paid_for(tmp_path):
    plan = small_plan(48, FOOTPRINTS, merge="dynamic")
    never = small_plan(48, FOOTPRINTS)
    trace = trace_of((0.0, 4, 3, "a0"))
    took = [simulate(trace, p.config, ConstantCosts(), plan=p).duration_s for p in (plan, never)]
    merging = simulate(trace, plan.config, ConstantCosts(), plan=plan).to_json()["merging"]
    assert merging == {"switches": 1, "switch_costs": "measured (merge.h200.json)"}
    assert took[0] == pytest.approx(took[1] + switches_of(plan).between(None, "a0"))
    unmeasured = switches_of(plan, tmp_path)
    assert unmeasured.provenance == BOUND
    assert unmeasured.between(None, "a0") == pytest.approx(6.58e-3, rel=0.01)  # 2 · 13.96 GB at 4,241 GB/s
    assert unmeasured.between("a0", None) == pytest.approx(6.58e-3, rel=0.01)
    assert switches_of(never) is None


def test_large_ranks_are_bound_by_operations():
    model = MODEL_CATALOGUE["llama-3.1-8b"]
    bound = switch_bound(model, (256,) * 7, 2, merges=True)
    assert bound.operations == pytest.approx(2 * 256 * 6.98e9, rel=0.01)
    assert (
        switch_bound(model, (256, 0, 0, 0, 0, 0, 0), 2, merges=False).moved_bytes == 2 * 32 * 4096 * 4096 * 2
    )


def test_measured_costs_are_taken_where_there_are_any(tmp_path):
    plan = small_plan(48, FOOTPRINTS, merge="dynamic")
    row = '{"rank": %d, "merge_over_bound": %f, "restore_over_bound": %f}'
    file = tmp_path / "merge.h200.json"
    file.write_text('{"rows": [' + row % (16, 1.5, 1.25) + "," + row % (128, 3.0, 1.25) + "]}")
    switches = switches_of(plan, tmp_path)
    assert switches.provenance == "measured (merge.h200.json)"
    assert switches.between(None, "a0") == pytest.approx(1.5 * 6.58e-3, rel=0.01)
    assert switches.between("a0", None) == pytest.approx(1.25 * 6.58e-3, rel=0.01)
    file.write_text("{}")
    with pytest.raises(UserError, match="not switch costs"):
        switches_of(plan, tmp_path)


def test_hot_takes_the_traces_own_adapter_and_its_rows_cost_no_lora():
    config = ServingConfig(max_num_seqs=4, max_model_len=128, merge="hot")
    trace = trace_of((0.0, 4, 3, "a0"), (0.0, 4, 3, "a0"), (9.0, 4, 3, "a1"), (99.0, 4, 3))
    specs = {name: AdapterSpec(name=name, rank=16) for name in ("a0", "a1")}
    result = simulate(trace, config, ConstantCosts(), adapters=specs, record_steps=True)
    own = blueprint(config.with_changes(merge="never"), specs).footprints["a0"].weight_bytes
    by_start = {row.start_s: row.shape.lora_bytes for row in result.steps}
    assert [lora for at, lora in by_start.items() if at < 9] == [0] * 3
    assert {lora for at, lora in by_start.items() if 9 <= at < 99} == {2 * own}  # a1 − a0
    assert {lora for at, lora in by_start.items() if at >= 99} == {own}  # − a0
