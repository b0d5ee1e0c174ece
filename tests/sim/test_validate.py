"""What `sim validate` says of records whose errors are known, as they are of machines that are slower by so much."""

import json
import xml.dom.minidom
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from engine.adapter import AdapterSpec
from engine.config import ServingConfig
from engine.errors import UserError
from sim.__main__ import main
from sim.agreement import by_group, by_request, by_step, kind_of
from sim.costs import StepCosts, costs_for
from sim.intervals import Interval, PacedSteps, family_of, intervals, stretch_of
from sim.noise import noise_of, twins
from sim.profile import parse_profile
from sim.records import recorded_run, recorded_steps
from sim.simulate import simulate
from sim.validate import METRICS, judge, outcome_of, validate
from sim.validation_page import page_lines
from sim.verdict import TARGETS, shortfalls, verdicts
from tests.sim import synthetic
from traces import Trace
from traces.assign import Assignment, assign
from traces.run_record import RunRecord, write_run
from traces.synth import S_LORA, synthesize

RATE = 12.0
PROFILE = parse_profile(synthetic.profile_json(), "as profiled")


def costs_of(config):
    return costs_for(PROFILE, config)


def costs_of_run(run):
    return costs_of(run.config)


def workload(requests=50, mix=(8, 32), seed=0, rate=RATE):
    how = Assignment(rule="R1", adapters=6, zipf_s=0.9, rank_mix=mix, seed=seed)
    return assign(synthesize(replace(S_LORA, rate_rps=rate), requests, seed), how)


def record(folder, trace, *, pace=1.0, config=None, adapters=None, load=0.6, replica=False):
    """Write the record of an engine whose steps take `pace` times as long as the profile says."""
    config = config or ServingConfig()
    costs = PacedSteps(costs_of(config), pace)
    result = simulate(trace, config, costs, adapters=adapters, record_steps=True)
    specs = adapters or {name: AdapterSpec(name=name, rank=rank) for name, rank in trace.adapters.items()}
    steps = pd.DataFrame(
        {"start_s": row.start_s, "duration_s": costs.step_s(row.shape), **row.shape.to_json()}
        | ({"replica": row.replica} if replica else {})
        for row in result.steps
    )
    requests = result.requests.drop(columns="refused")
    if replica:
        requests["replica"] = 0
    listed = [
        {"name": spec.name, "kind": spec.kind, "rank": spec.rank, "nblocks": spec.nblocks}
        for spec in specs.values()
    ]
    run = {"config": config.to_json(), "adapters": listed, "load": load, "gpu_name": "a GPU"}
    write_run(folder, RunRecord(run=run, requests=requests, steps=steps))
    return recorded_run(folder)


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    return record(tmp_path_factory.mktemp("slow") / "run", workload(), pace=1.1)


def test_steps_are_priced_by_their_recorded_shapes(slow):
    rows = {row["kind"]: row for row in by_step(slow, costs_of(slow.config))}
    assert set(rows) >= {"all", "decode", "mixed"}
    assert sum(row["steps"] for kind, row in rows.items() if kind != "all") == rows["all"]["steps"]
    for row in rows.values():
        assert row["bias_pct"] == pytest.approx(100 * (1 / 1.1 - 1), abs=0.2)  # durations are microseconds
        assert row["total_error_pct"] == pytest.approx(100 * (1 / 1.1 - 1), abs=0.1)
    assert kind_of(3, 0) == "decode" and kind_of(3, 1) == "mixed" and kind_of(0, 1) == "prompt"


def test_a_record_without_shapes_has_no_steps_to_price(slow):
    assert recorded_steps(replace(slow, steps=pd.DataFrame([{"duration_s": 1.0}]))) == []
    assert by_step(replace(slow, steps=pd.DataFrame([{"duration_s": 1.0}])), costs_of(slow.config)) == []


def test_requests_are_compared_one_by_one(slow):
    result = simulate(slow.trace, slow.config, costs_of(slow.config), adapters=slow.adapters)
    rows = {row["metric"]: row for row in by_request(slow, result, "50to80")}
    assert set(rows) == {"ttft_s", "tpot_s", "e2e_s"}
    assert rows["e2e_s"]["requests"] == len(slow.trace)
    assert rows["e2e_s"]["correlation"] > 0.99
    assert rows["tpot_s"]["bias_pct"] == pytest.approx(100 * (1 / 1.1 - 1), abs=2)
    exact = by_request(replace(slow, requests=result.requests), result, "50to80")
    assert all(row["correlation"] == pytest.approx(1) for row in exact)
    assert all(row["median_abs_error_pct"] == pytest.approx(0, abs=1e-9) for row in exact)


def test_groups_are_by_rank_and_by_thirds_of_popularity(slow):
    result = simulate(slow.trace, slow.config, costs_of(slow.config), adapters=slow.adapters)
    rows = list(by_group(slow, result, "50to80"))
    names = list(dict.fromkeys((row.by, row.group) for row in rows))
    assert names == [
        ("rank", "rank 8"),
        ("rank", "rank 32"),
        ("popularity", "hot"),
        ("popularity", "middle"),
        ("popularity", "rare"),
    ]
    for by in ("rank", "popularity"):
        counts = {row.group: row.requests for row in rows if row.by == by}
        assert sum(counts.values()) == len(slow.trace)
    hot = next(row for row in rows if row.group == "hot")
    assert hot.requests >= len(slow.trace) / 3
    alone = replace(slow, requests=slow.requests.assign(rank=16.0, adapter="a"))
    assert list(by_group(alone, result, "50to80")) == []


def test_twins_are_records_of_one_trace_and_their_difference_is_the_noise(slow, tmp_path):
    again = record(tmp_path / "again", workload(), pace=1.21)
    other = record(tmp_path / "other", workload(seed=1), pace=1.1)
    pairs = twins([slow, again, other])
    assert [(a.name, b.name) for a, b in pairs] == [("run", "again")]
    noise = noise_of(pairs, METRICS)
    assert noise["pairs"] == 1
    assert noise["summary"]["tpot_p50_s"]["median_pct"] == pytest.approx(9.5, abs=1.5)
    assert noise_of([], METRICS) == {"pairs": 0, "rows": [], "summary": {}}


def row_of(metric, error, level="50to80"):
    return {"metric": metric, "error_pct": error, "load_level": level}


def test_targets_give_way_to_twice_the_noise():
    rows = [row_of("tpot_p50_s", error) for error in (1.0, -5.0, 4.0)]
    strict = next(v for v in verdicts(rows, {"summary": {}}) if v["metric"] == "tpot_p50_s")
    assert (strict["value_pct"], strict["allowed_pct"], strict["met"]) == (4.0, 3.0, False)
    noise = {"summary": {"tpot_p50_s": {"median_pct": 2.5, "worst_pct": 4.0}}}
    eased = next(v for v in verdicts(rows, noise) if v["metric"] == "tpot_p50_s")
    assert (eased["allowed_pct"], eased["met"]) == (5.0, True)
    untold = [v for v in verdicts([], {"summary": {}}) if v["met"] is None]
    assert len(untold) == len(TARGETS)


def test_saturated_runs_count_where_the_target_says():
    rows = [row_of("ttft_p50_s", 90.0, "saturated"), row_of("throughput_rps", 4.0, "saturated")]
    rows += [row_of("ttft_p50_s", 2.0), row_of("throughput_rps", 0.1)]
    found = {(v["metric"], v["statistic"], v["where"]): v for v in verdicts(rows, {"summary": {}})}
    assert found["ttft_p50_s", "median", "below saturation"]["value_pct"] == 2.0
    assert found["throughput_rps", "worst", "saturated runs"]["met"] is False
    assert found["throughput_rps", "worst", "all runs"]["met"] is True


def test_what_a_collection_lacks_is_said():
    assert shortfalls(30, 5, 90.0) == []
    assert len(shortfalls(4, 1, None)) == 3
    assert "hold 60 %" in shortfalls(30, 5, 60.0)[0]


# ---- intervals ----


def test_an_interval_holds_a_machine_that_is_off_by_what_whole_steps_were_off():
    trace, config = workload(), ServingConfig()
    errors = np.linspace(-0.05, 0.05, 101)
    costs = costs_of(config)
    costs.report = replace(costs.report, step_errors=errors, step_shapes=(synthetic.shape(rows=4),) * 101)
    found = intervals(trace, config, costs, ["tpot_p50_s", "throughput_rps", "ttft_p50_s"])
    tpot = found["tpot_p50_s"]
    assert tpot.low == pytest.approx(tpot.value / 1.05, rel=0.02)
    assert tpot.high == pytest.approx(tpot.value / 0.95, rel=0.02)
    assert (
        found["throughput_rps"].high / found["throughput_rps"].low < 1.05
    )  # below saturation: what is offered
    assert tpot.provenance in ("interpolated", "extrapolated")
    again = intervals(trace, config, costs, ["tpot_p50_s"])
    assert again["tpot_p50_s"] == tpot  # by seed


def test_outside_what_was_measured_intervals_are_wider(monkeypatch):
    trace, config = workload(requests=12), ServingConfig()
    widths = {}
    for kind in ("interpolated", "extrapolated"):
        monkeypatch.setattr(StepCosts, "provenance", lambda costs, shape, kind=kind: kind)
        found = intervals(trace, config, costs_of(config), ["tpot_p50_s"])["tpot_p50_s"]
        widths[found.provenance] = found.high / found.low - 1
    assert widths["extrapolated"] > max(0.25, 2 * widths["interpolated"])


def test_scores_and_stretches_agree():
    interval = Interval(10.0, 9.0, 12.0, "measured")
    assert interval.stretched(interval.score(13.0)).high == pytest.approx(13.0)
    assert interval.stretched(interval.score(8.0)).low == pytest.approx(8.0)
    assert interval.holds(9.0) and not interval.holds(8.9)
    assert Interval(10.0, 10.0, 10.0, "measured").stretched(1.0).high == pytest.approx(10.02, abs=0.01)
    assert family_of("output_tokens_per_s") == "throughput" and family_of("e2e_p95_s") == "e2e"


def test_a_stretch_covers_what_it_has_not_seen_nine_times_of_ten():
    rng = np.random.default_rng(0)
    scores = np.abs(rng.normal(size=(400, 30)))
    held = [row[0] <= stretch_of(row[1:]) for row in scores]
    assert 0.86 < np.mean(held) < 0.98
    assert stretch_of([1.0] * 5) is None


# ---- the whole ----


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    """Records of TP 1 twice, TP 2 block-diagonal and by S-LoRA, and of two replicas."""
    folder = tmp_path_factory.mktemp("runs")
    trace = workload(requests=25, mix=(16,))
    record(folder / "one", trace, pace=1.05)
    record(folder / "one-again", trace, pace=1.02)
    blocks = {name: AdapterSpec(name=name, kind="bd_lora", rank=16, nblocks=2) for name in trace.adapters}
    two = ServingConfig(tp=2, lora_sharding="block_diagonal")
    record(folder / "blocks", trace, config=two, adapters=blocks, pace=0.97)
    record(folder / "slora", trace, config=ServingConfig(tp=2, lora_sharding="slora"), pace=1.04)
    pair = ServingConfig(replicas=2, router="round_robin")
    record(folder / "pair", trace, config=pair, replica=True, load=1.2)
    return folder


@pytest.fixture(scope="module")
def outcome(collection):
    return validate(collection, costs_of_run)


def test_every_kind_of_record_is_loaded_and_simulated(outcome):
    assert outcome["runs"] == 5
    facts = {fact["run"]: fact for fact in outcome["run_facts"]}
    assert facts["blocks"]["tp"] == 2 and facts["blocks"]["lora_sharding"] == "block_diagonal"
    assert facts["pair"]["replicas"] == 2 and facts["pair"]["load_level"] == "saturated"
    rows = {(row["run"], row["metric"]): row for row in outcome["rows"]}
    assert len(rows) == 5 * len(METRICS)
    assert rows["blocks", "tpot_p50_s"]["error_pct"] == pytest.approx(100 * (1 / 0.97 - 1), abs=1.5)
    assert rows["pair", "e2e_p95_s"]["error_pct"] == pytest.approx(0, abs=0.01)
    steps = {row["run"]: row for row in outcome["steps"] if row["kind"] == "all"}
    assert steps["slora"]["total_error_pct"] == pytest.approx(100 * (1 / 1.04 - 1), abs=0.2)
    assert outcome["noise"]["pairs"] == 1
    assert 0 <= outcome["coverage"]["stretched_pct"] <= 100


def test_a_run_is_not_stretched_by_its_own_twin(collection):
    runs = [recorded_run(collection / name, collection) for name in ("one", "one-again")]
    found = outcome_of([judge(run, costs_of_run) for run in runs])
    assert not any("stretched_within" in row for row in found["rows"])
    assert found["coverage"]["stretched_pct"] is None
    assert any("too few runs" in line for line in found["shortfalls"])


def test_the_page_tells_every_run_and_its_tables_are_whole(outcome):
    lines = list(page_lines(outcome, "a command", outcome))
    for run in ("one", "one-again", "blocks", "slora", "pair"):
        assert any(line.startswith(f"| {run} |") for line in lines)
    widths = None
    for line in lines:
        widths = (widths or line.count("|")) if line.startswith("|") else None
        assert widths is None or line.count("|") == widths
    assert any("5 records" in line for line in lines) and any("Lacking" in line for line in lines)


def test_one_command_writes_page_and_plot(collection, tmp_path, capsys):
    profile = tmp_path / "profile.json"
    profile.write_text(json.dumps(synthetic.profile_json()))
    runs = tmp_path / "runs"
    record(runs / "<odd> & name", workload(requests=8))
    arguments = ["validate", "--runs", str(runs), "--profile", str(profile)]
    assert main([*arguments, "--docs", str(tmp_path / "docs"), "--format", "json"]) == 0
    first = json.loads(capsys.readouterr().out)
    (tmp_path / "also.json").write_text(json.dumps(first))
    assert main([*arguments, "--docs", str(tmp_path / "docs"), "--also", str(tmp_path / "also.json")]) == 0
    shown = capsys.readouterr().out
    assert "noise floor" in shown and "step by step" in shown
    page = (tmp_path / "docs" / "validation.md").read_text()
    assert "Slices of real traces" in page and "validation.svg" in page
    xml.dom.minidom.parse(str(tmp_path / "docs" / "validation.svg"))
    assert main([*arguments, "--also", str(tmp_path / "also.json")]) == 2
    assert "--also goes with --docs" in capsys.readouterr().err
    (tmp_path / "also.json").write_text("[]")
    assert main([*arguments, "--docs", str(tmp_path), "--also", str(tmp_path / "also.json")]) == 2
    assert "also.json" in capsys.readouterr().err


def test_an_empty_folder_is_told(tmp_path):
    with pytest.raises(UserError, match="holds no run record"):
        validate(tmp_path, costs_of_run)


def test_a_trace_and_its_record_are_the_same(slow):
    assert isinstance(slow.trace, Trace)
    assert slow.trace.columns.arrival_s == pytest.approx(workload().columns.arrival_s, abs=1e-6)
    assert slow.machine == "a GPU"
