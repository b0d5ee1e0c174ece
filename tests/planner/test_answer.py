"""What a plan says beside its configuration: what breaks first, whose SLO is missed, the runner-up; --explain and --verify."""

import json
from pathlib import Path

import pytest

from engine.config import ServingConfig
from planner.cli import main
from planner.headroom import Resource, adapter_room, first_to_break
from planner.recommend import pareto_front
from planner.trial import Trial
from sim.validate import RUNS
from tests.planner.fake import even_trace
from tests.sim.synthetic import profile_json
from traces import save


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("answer")
    (folder / "profile.json").write_text(json.dumps(profile_json()))
    save(even_trace(4.0, count=60, prompt=300, output=10), folder / "trace.jsonl")
    (folder / "config.json").write_text(json.dumps({"max_num_seqs": 64, "max_model_len": 1024}))
    return folder


def test_the_fullest_breaks_first() -> None:
    low, high = Resource(name="PCIe", used=0.2, how=""), Resource(name="KV pages", used=0.8, how="")
    unbound = Resource(name="host memory", used=float("nan"), how="")
    assert first_to_break([high, low, unbound]) is high
    assert first_to_break([unbound]) is None
    assert low.headroom == pytest.approx(4.0)
    assert unbound.to_json()["used"] is None


def test_larger_adapters_leave_room_for_fewer() -> None:
    room = adapter_room(ServingConfig(), None)
    assert [item.rank for item in room] == [8, 16, 32, 64, 128]
    counts = [item.alone for item in room]
    assert counts == sorted(counts, reverse=True) and counts[0] > 10 * counts[-1]
    assert all(item.beside_kv == item.alone for item in room)


def test_the_front_has_no_one_who_is_beaten() -> None:
    def trial(rate: float, gpus: int) -> Trial:
        return Trial(config=ServingConfig(replicas=gpus), piece="trace", sustainable_rps=rate)

    one, two, worse, four = trial(10, 1), trial(20, 2), trial(15, 3), trial(30, 4)
    assert pareto_front([four, worse, one, two]) == [one, two, four]


def test_explain(files, capsys) -> None:
    given = ["--trace", str(files / "trace.jsonl"), "--profile", str(files / "profile.json")]
    given += ["--explain", str(files / "config.json")]
    assert main([*given, "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["config"]["max_num_seqs"] == 64
    assert 0 < found["sustainable_rps"] <= found["arithmetic_bound_rps"]
    assert {item["name"] for item in found["resources"]} >= {
        "compute", "memory bandwidth", "KV pages", "adapter loads", "PCIe", "host memory",
    }  # fmt: skip
    assert found["breaks_first"] in {item["name"] for item in found["resources"]}
    assert found["adapters_missing_slo"] == {} and len(found["adapters_per_replica"]) == 5
    assert main([*given, "--rate-scale", "300", "--ttft-ms", "30"]) == 1, "at this rate it misses"
    out = capsys.readouterr().out
    assert "breaks first" in out and "miss the attainment" in out
    assert main([*given[:4], "--explain", str(files / "missing.json")]) == 2


def test_pareto_and_exports_and_a_report(files, capsys, tmp_path) -> None:
    given = ["--trace", str(files / "trace.jsonl"), "--gpus", "3", "--profile", str(files / "profile.json")]
    given += [
        "--max-num-seqs",
        "128",
        "--max-num-batched-tokens",
        "1024",
        "--workers",
        "1",
        "--tp",
        "1",
        "--quiet",
    ]
    given += [
        "--scheduler",
        "fcfs",
        "--merge",
        "never",
        "--router",
        "least_loaded",
        "--placement",
        "everywhere",
    ]
    more = [
        "--objective",
        "pareto",
        "--export",
        "ours,vllm",
        "--format",
        "json",
        "--output-dir",
        str(tmp_path / "out"),
    ]
    assert main([*given, *more]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [choice["config"]["replicas"] for choice in plan["pareto"]] == [1, 2, 3]
    rates = [choice["sustainable_rps"] for choice in plan["pareto"]]
    assert rates == sorted(rates)
    assert plan["runner_up"] is None or plan["runner_up"]["would_take"]
    assert (tmp_path / "out" / "exports" / "vllm.sh").read_text() == plan["exports"]["vllm"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.startswith("<!doctype html>") and "<svg" in page
    assert "http://" not in page and "https://" not in page and "<script" not in page


@pytest.mark.slow
@pytest.mark.parametrize("name", ["r16x32-half", "flood-tp1"])  # of a flood all requests come at one instant
def test_verify_a_recorded_run(capsys, name) -> None:
    run = RUNS / name
    code = main(["--verify", str(run), "--format", "json"])
    found = json.loads(capsys.readouterr().out)
    assert code == (0 if found["within"] else 1)
    assert found["same_config"] and len(found["rows"]) == 11
    for row in found["rows"]:
        inside = row["predicted"]["low"] <= row["measured"] <= row["predicted"]["high"]
        assert row["within"] == inside
    by_name = {row["metric"]: row for row in found["rows"]}
    assert by_name["throughput_rps"]["within"]


def test_verify_bad_input(files, capsys) -> None:
    assert main(["--verify", str(files / "nowhere")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert main(["--verify", str(RUNS / "r16x32-half"), "--config", str(files / "profile.json")]) == 2
