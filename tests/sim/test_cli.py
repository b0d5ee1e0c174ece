"""The command line: JSON contracts, and one clear line with exit code 2 for bad input."""

import json

import pandas as pd
import pytest

from engine.config import ServingConfig
from sim.__main__ import main
from sim.costs import costs_for
from sim.profile import load_profile
from sim.simulate import simulate
from sim.validate import METRICS, at_once, load_level, recorded_run, validate
from tests.sim import synthetic
from tests.sim.constant import trace_of
from traces import save
from traces.run_record import RunRecord, write_run


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    (folder / "profile.json").write_text(json.dumps(synthetic.profile_json()))
    (folder / "config.json").write_text("{}")
    trace = trace_of(*((0.05 * i, 100 + i, 20 + i % 7, f"a{i % 3}" if i % 4 else None) for i in range(60)))
    save(trace, folder / "trace.jsonl")
    return folder


def sim(*arguments):
    return main([str(argument) for argument in arguments])


def out_json(capsys, *arguments):
    assert sim(*arguments, "--format", "json") == 0
    return json.loads(capsys.readouterr().out)


def run_arguments(files, **changes):
    options = {
        "trace": files / "trace.jsonl",
        "config": files / "config.json",
        "profile": files / "profile.json",
    }
    return [part for name, value in (options | changes).items() for part in (f"--{name}", value)]


def test_run_prints_the_metrics(files, capsys):
    result = out_json(capsys, "run", *run_arguments(files))
    assert result["metrics"]["requests"] == 60
    assert result["metrics"]["adapter_loads"] == 3
    assert 0 < result["utilisation"]["step_share"] <= 1
    assert isinstance(result["bottleneck"], str)
    assert sim("run", *run_arguments(files)) == 0
    assert "ttft_p50_s" in capsys.readouterr().out


def test_run_says_where_metrics_should_lie(files, capsys):
    result = out_json(capsys, "run", *run_arguments(files), "--intervals")
    found = result["intervals"]["tpot_p50_s"]
    assert found["low"] < result["metrics"]["tpot_p50_s"] == found["value"] < found["high"]
    assert found["provenance"] in ("measured", "interpolated", "extrapolated")
    assert sim("run", *run_arguments(files), "--intervals") == 0
    assert "where it should lie" in capsys.readouterr().out


def test_run_takes_adapters(files, capsys, tmp_path):
    lines = [json.dumps({"name": f"a{i}", "rank": 128}) for i in range(3)]
    (tmp_path / "adapters.jsonl").write_text("\n".join(lines))
    small = out_json(capsys, "run", *run_arguments(files))
    large = out_json(capsys, "run", *run_arguments(files, adapters=tmp_path / "adapters.jsonl"))
    assert large["metrics"]["tpot_p50_s"] > small["metrics"]["tpot_p50_s"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trace": "none.jsonl"}, "none.jsonl: cannot be read"),
        ({"config": "none.json"}, "none.json: cannot be read"),
        ({"profile": "none.json"}, "none.json: cannot be read"),
        ({"adapters": "none.jsonl"}, "none.jsonl: cannot be read"),
        ({"bogus": 1}, "No such option: --bogus"),
        ({"seed": -1}, "seed"),
        ({"format": "xml"}, "format"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(files, capsys, changes, message):
    assert sim("run", *run_arguments(files, **changes)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"tp": 3}', "tp (=3) must divide"),
        ('{"model": "nobody"}', "nobody"),
        ('{"bogus": 1}', "unknown key 'bogus'"),
        ('{"model": "llama-3.1-70b"}', "does not fit"),
    ],
)
def test_a_configuration_that_cannot_work_is_told(files, capsys, tmp_path, config, message):
    (tmp_path / "config.json").write_text(config)
    assert sim("run", *run_arguments(files, config=tmp_path / "config.json")) == 2
    assert message in capsys.readouterr().err


def test_fit_reports_operators_and_whole_steps(files, capsys):
    rows = out_json(capsys, "fit", "--profile", files / "profile.json")["rows"]
    assert rows[-1]["name"] == "whole step"
    assert sim("fit", "--profile", files / "profile.json") == 0
    assert "held out" in capsys.readouterr().out


def test_bench_reports_three_loads(files, capsys):
    rows = out_json(capsys, "bench", "--requests", 200, "--profile", files / "profile.json")["rows"]
    assert [row["load"] for row in rows] == ["10%", "75%", "saturated"]
    assert all(row["requests"] == 200 and row["requests_per_s"] > 0 for row in rows)


@pytest.fixture(scope="module")
def runs(files, tmp_path_factory):
    """A record as the engine would write it, of a machine 10 % slower than the profile says."""
    folder = tmp_path_factory.mktemp("runs")
    config = ServingConfig()
    slow = load_profile_scaled(1.1)
    trace = trace_of(*((0.05 * i, 100 + i, 20 + i % 7, f"a{i % 3}") for i in range(60)))
    result = simulate(trace, config, costs_for(slow, config))
    steps = pd.DataFrame([{"start_s": 0.0, "duration_s": 1.0}])
    adapters = [{"name": f"a{i}", "kind": "lora", "rank": 16, "nblocks": 1, "path": None} for i in range(3)]
    for name, extra in (("given", {"load": 0.6}), ("told/by_rate", {})):
        run = {"config": config.to_json(), "adapters": adapters, **extra}
        write_run(folder / name, RunRecord(run=run, requests=result.requests, steps=steps))
    return folder


def load_profile_scaled(factor):
    from sim.profile import parse_profile

    data = synthetic.profile_json(correction=factor)
    return parse_profile(data, "slower")


def test_validate_compares_every_run_and_metric(files, runs, capsys):
    outcome = out_json(capsys, "validate", "--runs", runs, "--profile", files / "profile.json")
    assert outcome["runs"] == 2
    assert len(outcome["rows"]) == 2 * len(METRICS)
    rows = {(row["run"], row["metric"]): row for row in outcome["rows"]}
    assert rows["given", "tpot_p50_s"]["error_pct"] == pytest.approx(100 * (1 / 1.1 - 1), abs=1)
    assert rows["given", "tpot_p50_s"]["load_level"] == "50to80"
    assert rows["told/by_rate", "ttft_p50_s"]["load_level"] in ("under50", "50to80", "80to95", "saturated")
    summary = outcome["summary"]
    assert {"all", "50to80"} <= set(summary)
    assert summary["all"]["tpot_p50_s"]["median_abs_error_pct"] == pytest.approx(9.1, abs=1)
    assert summary["all"]["tpot_p50_s"]["bias_pct"] < 0
    assert sim("validate", "--runs", runs, "--profile", files / "profile.json") == 0
    assert "given" in capsys.readouterr().out


def test_a_recorded_run_is_rebuilt(runs):
    run = recorded_run(runs / "given")
    assert len(run.trace) == 60
    assert run.trace.columns.adapter_names == ("a0", "a1", "a2")
    assert run.adapters["a1"].rank == 16
    assert (at_once(run.trace).columns.arrival_s == 0).all()


def test_validate_tells_bad_records(files, runs, capsys, tmp_path):
    assert sim("validate", "--runs", tmp_path, "--profile", files / "profile.json") == 2
    assert "holds no run record" in capsys.readouterr().err
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    assert sim("validate", "--runs", tmp_path, "--profile", files / "profile.json") == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_load_levels():
    assert [load_level(load) for load in (0.1, 0.5, 0.8, 0.95, 3.0)] == [
        "under50",
        "50to80",
        "80to95",
        "saturated",
        "saturated",
    ]


def test_validate_is_a_plain_function(files, runs):
    profile = load_profile(files / "profile.json")
    found = validate(runs, lambda run: costs_for(profile, run.config), with_intervals=False)
    assert found["runs"] == 2 and found["coverage"]["bootstrap_pct"] is None
