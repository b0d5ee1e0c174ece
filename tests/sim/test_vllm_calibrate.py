"""The fit of a vLLM profile: from measurements whose truth is known, from the published ones, and its file."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from engine.adapter import AdapterSpec
from engine.errors import UserError
from engine.model_shape import load_model_shape
from engine.step import StepShape
from sim.__main__ import main
from sim.vllm_costs import VllmCosts
from sim.vllm_data import read_lines
from sim.vllm_fit import Observation, fit_steps
from sim.vllm_micro import fit_micro
from sim.vllm_predict import serve, server_config
from sim.vllm_profile import find_vllm_profile, load_vllm_profile, parse_vllm_profile
from sim.vllm_setup import VllmSetup, memory_on, rank_step
from sim.vllm_steps import TERMS, KernelGrid, StepFacts, terms
from sim.vllm_validate import compare_run, summary, twin_rows, validate_vllm
from sim.vllm_workload import length_tables, lengths, stream


@pytest.fixture(scope="session")
def measured() -> Path:
    root = Path(__file__).parents[2]
    folder = Path(os.environ.get("LORAPLAN_SHARED", root.parent / "shared")) / "measured_vllm"
    if not (folder / "micro.jsonl").is_file():
        pytest.skip(f"the measured vLLM runs are not at {folder} (set LORAPLAN_SHARED)")
    return folder


@pytest.fixture(scope="module")
def shipped():
    return load_vllm_profile(find_vllm_profile("llama-3.1-8b"))


GRID = KernelGrid(model=load_model_shape("llama-3.1-8b"), rank=8)


def test_the_grid_is_that_of_the_kernels():
    """32 layers; below 128 tokens a shrink has 64 splits a tile of 32 tokens for each of 7 linears, an expand 384 column tiles a tile of 64."""
    assert GRID.layer_blocks(64) == 32 * (7 * 64 * 2 + 384) + 32
    assert GRID.layer_blocks(128) == 32 * (7 * 8 * 4 + 384 * 2) + 2 * 32
    assert replace(GRID, rank=32).layer_blocks(64) == 32 * (7 * 64 * 2 * 2 + 384) + 32
    assert [GRID.padded(tokens) for tokens in (1, 3, 5, 9, 500, 513)] == [1, 4, 8, 16, 504, 513]


def test_the_fit_finds_what_the_steps_were_made_of():
    truth = dict.fromkeys(TERMS, 0.0) | {"step": 0.011, "tokens_from_0": 2e-5, "kv_tokens": 9e-8}
    truth |= {
        "slot_blocks_few": 9e-10,
        "slot_blocks_many": 8e-10,
        "adapters_few": 4e-4,
        "adapters_many": 3e-4,
    }
    observations = []
    for tokens in (1, 8, 32, 100, 128, 200, 400):
        for slots, adapters in ((0, 0), (8, 0), (64, min(tokens, 20)), (256, min(tokens, 90))):
            facts = StepFacts(
                tokens=tokens, rows=tokens, kv_tokens=tokens * (100 + slots), adapters=adapters, slots=slots
            )
            seconds = sum(truth[name] * value for name, value in zip(TERMS, terms(facts, GRID), strict=True))
            observations.append(
                Observation(name=f"{tokens} {slots}", group="all", seconds=seconds, mix=((1.0, facts),))
            )
    fit = fit_steps(observations, {8: GRID})
    assert fit.errors["in_sample_mape"] < 1e-6
    assert fit.seconds["slot_blocks_few"] == pytest.approx(9e-10, rel=1e-3)
    assert fit.seconds["adapters_few"] == pytest.approx(4e-4, rel=1e-3)


def test_costs_are_the_terms(shipped):
    costs = VllmCosts(shipped, max_loras=64, max_lora_rank=8)
    facts = StepFacts(tokens=300, rows=52, kv_tokens=20_000, prompt_tokens=250, adapters=20, slots=64)
    shape = StepShape(
        decode_rows=50,
        decode_kv_tokens=19_750,
        prefill_tokens=250,
        prefill_kv_tokens=250,
        sample_rows=52,
        lora_adapters=20,
    )
    wanted = sum(shipped.seconds[name] * value for name, value in zip(TERMS, terms(facts, GRID), strict=True))
    assert costs.step_s(shape) == pytest.approx(wanted, rel=1e-9)
    assert sum(costs.parts_s(shape).values()) == pytest.approx(wanted, rel=1e-9)
    run = costs.decode_run(StepShape(decode_rows=10, decode_kv_tokens=1000, sample_rows=10), 5)
    later = costs.step_s(StepShape(decode_rows=10, decode_kv_tokens=1040, sample_rows=10))
    assert run.first_s + 4 * run.slope_s == pytest.approx(later)


def test_a_profile_is_read_as_it_was_written(shipped, tmp_path):
    shipped.save(tmp_path / "p.json")
    assert load_vllm_profile(tmp_path / "p.json").to_json() == shipped.to_json()
    data = shipped.to_json()
    for change, said in (
        ({"kind": "ours"}, "kind"),
        ({"load_s": -1}, "load_s"),
        ({"seconds": data["seconds"] | {"other": 1}}, "other"),
        ({"memory": {}}, "memory"),
        ({"block_tokens": 0}, "block_tokens"),
    ):
        with pytest.raises(UserError, match=said):
            parse_vllm_profile(data | change, "x.json")


def test_the_shipped_profile_is_what_calibrate_makes(measured, shipped):
    found = fit_micro(measured).to_json()
    assert found["seconds"] == pytest.approx(shipped.to_json()["seconds"], rel=1e-4, abs=1e-15)
    assert found["errors"]["held_out_mape"] < 0.03
    assert found["errors"]["kv_tokens_worst"] < 0.02


def test_one_request_alone_takes_longer_the_more_slots_there_are(shipped):
    """README of the measurements: 13.4 ms at 8 slots, 20.9 ms at 300."""
    shape = StepShape(decode_rows=1, decode_kv_tokens=300, sample_rows=1, lora_adapters=1)
    few, many = (
        VllmCosts(shipped, max_loras=slots, max_lora_rank=8).step_s(shape) * 1e3 for slots in (8, 300)
    )
    assert few == pytest.approx(13.4, rel=0.05)
    assert many == pytest.approx(20.9, rel=0.05)


@pytest.mark.parametrize(
    ("slots", "rank", "code"),
    [
        (224, 16, None),
        (256, 16, "kv_smaller_than_max_model_len"),
        (96, 32, None),
        (224, 32, "no_kv_blocks"),
        (352, 32, "cuda_oom"),
    ],
)
def test_starting_up_is_arithmetic(shipped, slots, rank, code):
    setup = VllmSetup(config=server_config(shipped, slots, rank), profile=shipped, adapters={})
    reason = setup.why_not()
    assert (None if reason is None else reason[0]) == code


def test_more_gpus_share_weights_and_cost_exchanges(shipped):
    shape = StepShape(decode_rows=1, decode_kv_tokens=300, sample_rows=1)
    one, two = (VllmCosts(shipped, max_loras=0, max_lora_rank=8, tp=tp).step_s(shape) for tp in (1, 2))
    assert 0.4 * one < two < one
    assert memory_on(shipped, 2).weights_bytes < 0.6 * shipped.memory.weights_bytes
    assert rank_step(9) == 16
    with pytest.raises(UserError):
        rank_step(1000)


def test_lengths_have_the_means_asked_for_and_go_against_each_other(measured):
    prompts, outputs = lengths(length_tables(measured / "lengths.json"), 50_000, 223.0, 196.0)
    assert prompts.mean() == pytest.approx(223, rel=0.02)
    assert outputs.mean() == pytest.approx(196, rel=0.02)
    together = (prompts * outputs).mean() / (prompts.mean() * outputs.mean())
    assert together == pytest.approx(0.671, abs=0.03)


def run_named(measured, part):
    return next((place, row) for place, row in read_lines(measured / "runs.jsonl") if part in row["run"])


def test_the_stream_has_as_many_requests_as_were_sent(measured):
    place, row = run_named(measured, "0.05_0.025/slots128_adapters128_rank16")
    trace = stream(row, length_tables(measured / "lengths.json"), place, 3600.0)
    assert len(trace) == row["sent"]["seed_emulation"]


def test_a_run_is_predicted(measured, shipped):
    place, row = run_named(measured, "rates_0.1_0.05_0.025/slots16_adapters16_rank16")
    outcome = compare_run((place, row), profile=shipped, tables=length_tables(measured / "lengths.json"))
    errors = {item.metric: abs(item.error_pct) for item in outcome.comparisons}
    assert outcome.predicted_start and outcome.predicted_starved is False
    assert errors["throughput_rps"] < 2 and errors["tpot_mean_s"] < 15 and errors["running_mean"] < 15
    again = compare_run((place, row), profile=shipped, tables=length_tables(measured / "lengths.json"))
    assert again == outcome


def test_equal_steps_at_once_change_nothing(measured, shipped):
    place, row = run_named(measured, "rates_0.1_0.05_0.025/slots8_adapters256_rank16")
    trace = stream(row, length_tables(measured / "lengths.json"), place, 60.0)
    adapters = {name: AdapterSpec(name=name, rank=rank) for name, rank in trace.adapters.items()}
    # What comes within a run of equal steps makes the walk past waiting requests longer only from the next run on.
    profile = replace(shipped, scan_s=0.0)
    setup = VllmSetup(config=server_config(shipped, 8, 16), profile=profile, adapters=adapters)
    fast, slow = (serve(setup, trace, adapters=adapters, fast_forward=flag) for flag in (True, False))
    for name in ("first_token_s", "finish_s"):
        assert abs(fast.columns[name] - slow.columns[name]).max() < 1e-6


def test_validate_reads_the_folder(measured, shipped):
    def small(row):
        return row["status"] != "ok" or (row["n_adapters"] == 8 and not row["client_saturated"])

    outcome = validate_vllm(measured, shipped, keep=small, workers=1)
    assert outcome["start"]["right_pct"] == 100
    assert set(outcome["rows"][0]) == {"run", "metric", "load_level", "measured", "predicted", "error_pct"}
    assert {"unsaturated", "unstarved", "all"} <= set(outcome["summary"])
    assert {"median_abs_error_pct", "worst_abs_error_pct", "bias_pct"} <= set(
        outcome["summary"]["all"]["tpot_mean_s"]
    )


def test_the_twin_is_scored_as_the_readme_does(measured):
    runs = [row for _, row in read_lines(measured / "runs.jsonl")]
    found = summary(twin_rows(runs))["unstarved"]
    assert found["throughput_rps"]["mape_pct"] == pytest.approx(0.6, abs=0.05)
    assert found["itl_mean_s"]["mape_pct"] == pytest.approx(16.3, abs=0.1)


def test_bad_input_is_one_line(tmp_path, capsys):
    (tmp_path / "micro.jsonl").write_text('{"kind": "kv_capacity"}\n{"kind"\n')
    for arguments in (
        ["calibrate"],
        ["calibrate", "--from", "vllm-measurements"],
        ["calibrate", "--from", "vllm-measurements", str(tmp_path)],
        ["calibrate", "--from", "vllm-measurements", str(tmp_path / "none")],
        ["calibrate", "--from", "vllm-measurements", str(tmp_path), "--model", "qwen2.5-7b"],
        ["calibrate", "--endpoint", "nonsense"],
        ["calibrate", "--endpoint", "http://127.0.0.1:1", "--minutes", "0"],
        ["calibrate", "--endpoint", "http://127.0.0.1:1"],
    ):
        assert main(arguments) == 2, arguments
        assert capsys.readouterr().err.strip().startswith("error: ")


def test_the_command_writes_a_profile(measured, tmp_path, capsys):
    out = tmp_path / "p.json"
    assert (
        main(
            ["calibrate", "--from", "vllm-measurements", str(measured), "--out", str(out), "--format", "json"]
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out)["kind"] == "vllm"
    profile = load_vllm_profile(out)
    assert (
        VllmSetup(config=server_config(profile, 384, 32), profile=profile, adapters={}).why_not() is not None
    )
