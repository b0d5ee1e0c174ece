"""The `plan` command: answers, files, exit codes, one line for bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from engine.config import ServingConfig
from planner.cli import main
from tests.planner.fake import even_trace
from tests.sim.synthetic import profile_json
from traces import save

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("plan")
    (folder / "profile.json").write_text(json.dumps(profile_json()))
    save(even_trace(4.0, count=120, prompt=300, output=30), folder / "trace.jsonl")
    (folder / "empty.jsonl").write_text("")
    (folder / "array.jsonl").write_text("[1]\n")
    row: dict[str, Any] = {"id": 0, "arrival_s": 0.0, "prompt_tokens": 5, "output_tokens": 5}
    bad: dict[str, dict[str, Any]] = {
        "negative": {"prompt_tokens": -5},
        "fraction": {"prompt_tokens": 0.5},
        "nan": {"arrival_s": float("nan")},
        "rank0": {"adapter": "a", "rank": 0},
    }
    for name, change in bad.items():
        (folder / f"{name}.jsonl").write_text(json.dumps(row | change) + "\n")
    rows = [row | {"adapter": "a", "rank": 8}, row | {"id": 1, "arrival_s": 1.0, "adapter": "a", "rank": 16}]
    (folder / "ranks.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "unsorted.jsonl").write_text("\n".join(map(json.dumps, reversed(rows))))
    (folder / "others.jsonl").write_text(json.dumps({"name": "other", "rank": 8}) + "\n")
    blocks = [{"name": f"a{i}", "kind": "dynamic", "rank": 8, "num_experts": 99} for i in range(5)]
    (folder / "blocks.jsonl").write_text("\n".join(map(json.dumps, blocks)))
    (folder / "full").mkdir()
    (folder / "full" / "mine.txt").write_text("precious")
    return folder


def arguments(files: Path, *more: str) -> list[str]:
    """A small search; what is given later wins."""
    base = ["--trace", str(files / "trace.jsonl"), "--gpus", "2", "--profile", str(files / "profile.json")]
    limits = ["--max-num-seqs", "128", "--max-num-batched-tokens", "1024", "--workers", "1"]
    return [*base, *limits, *more]


@pytest.fixture(scope="module")
def planned(files) -> tuple[Path, dict[str, Any]]:
    """A plan's output folder and its JSON."""
    out = files / "out"
    command = [
        sys.executable,
        "-m",
        "planner",
        *arguments(files),
        "--format",
        "json",
        "--output-dir",
        str(out),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return out, json.loads(done.stdout)


def test_json_has_the_whole_object(planned) -> None:
    _, plan = planned
    wanted = {"recommended", "fewest_gpus", "alternatives", "slo", "assumptions", "warnings", "trials"}
    assert wanted <= set(plan)
    for choice in (plan["recommended"], plan["fewest_gpus"], *plan["alternatives"]):
        assert {
            "config",
            "predicted",
            "sustainable_rps",
            "memory_per_gpu_bytes",
            "bottleneck",
            "cost_usd_per_hour",
        } <= set(choice)
        for value in choice["predicted"].values():
            assert set(value) == {"value", "low", "high", "provenance"}
            assert value["provenance"] in ("measured", "interpolated", "extrapolated")
            assert value["value"] is None or value["low"] <= value["value"] <= value["high"]
        memory = choice["memory_per_gpu_bytes"]
        assert sum(memory.values()) == 2 * memory["total"]
        assert min(memory.values()) >= 0
        if choice["config"]["tp"] > 1:
            assert choice["predicted"]["ttft_p95_s"]["provenance"] == "extrapolated"
    assert plan["slo"]["ttft_s"] == 0.5 and plan["slo"]["attainment"] == 0.95
    for item in plan["retraining"]:
        rates = item["sustainable_rps_a_replica"]
        assert rates["retrained"] >= 0.97 * rates["now"] > 0  # less to read, and no more to exchange
    assert {item["change"] for item in plan["retraining"]} >= {"half the rank"}
    assert plan["recommended"]["config"]["replicas"] == 2
    assert plan["fewest_gpus"]["config"]["replicas"] == plan["fewest_gpus"]["config"]["tp"] == 1


def test_the_folder_holds_what_engine_and_simulator_take(planned, files, capsys) -> None:
    from sim.__main__ import main as sim

    out, plan = planned
    assert json.loads((out / "plan.json").read_text()) == plan
    rows = [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()]
    assert rows == plan["trials"]
    assert ServingConfig.load(out / "recommended.json").to_json() == plan["recommended"]["config"]
    assert ServingConfig.load(out / "fewest_gpus.json").gpus == 1
    for number, choice in enumerate(plan["alternatives"], start=1):
        assert ServingConfig.load(out / "alternatives" / f"{number}.json").to_json() == choice["config"]
    config, profile = str(out / "fewest_gpus.json"), str(files / "profile.json")
    assert (
        sim(
            [
                "run",
                "--trace",
                str(files / "trace.jsonl"),
                "--config",
                config,
                "--profile",
                profile,
                "--format",
                "json",
            ]
        )
        == 0
    )
    simulated = json.loads(capsys.readouterr().out)["metrics"]["ttft_p95_s"]
    assert plan["fewest_gpus"]["predicted"]["ttft_p95_s"]["value"] == pytest.approx(simulated)


def test_overwrite_replaces_a_plan_and_nothing_else(planned, files, capsys) -> None:
    out, _ = planned
    assert main(arguments(files, "--output-dir", str(out))) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(arguments(files, "--output-dir", str(out), "--overwrite", "--objective", "min-gpus")) == 0
    assert ServingConfig.load(out / "recommended.json").gpus == 1
    assert main(arguments(files, "--output-dir", str(files / "full"), "--overwrite")) == 2
    assert (files / "full" / "mine.txt").read_text() == "precious"
    assert not [path.name for path in files.iterdir() if path.name.startswith(".")]


def test_the_table_is_plain_text_within_120_columns(files, capsys) -> None:
    assert main(arguments(files, "--quiet", "--top", "1")) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "\x1b" not in out
    lines = out.splitlines()
    assert max(len(line) for line in lines if not line.startswith("  python")) <= 120
    assert any(line.startswith("recommended") for line in lines)
    assert "python -m sim run" in out and "python -m engine replay" in out


def test_the_defaults_are_said_where_no_slo_is_given(files, capsys) -> None:
    assert main(arguments(files, "--timeout-s", "0.000001")) == 1
    err = capsys.readouterr().err
    assert "TTFT ≤ 500 ms, TPOT ≤ 50 ms" in err
    assert err.splitlines()[-1].startswith("error: time was up")


@pytest.mark.parametrize("flags", [["--rate-scale", "300"], ["--e2e-ms", "60"], ["--tpot-ms", "0.1"]])
def test_what_nothing_can_meet_is_1_with_the_nearest_miss(files, capsys, flags) -> None:
    assert main(arguments(files, "--gpus", "1", "--format", "json", *flags)) == 1
    out, err = capsys.readouterr()
    plan = json.loads(out)
    assert plan["recommended"] is None and plan["fewest_gpus"] is None
    if "0.1" in flags:
        assert plan["nearest_miss"] is None
        assert "TPOT may be 0.1 ms" in err
    else:
        assert plan["nearest_miss"]["misses"] in ("TTFT", "E2E")
        assert "no feasible configuration within 1 GPUs" in err and "what binds" in err


@pytest.mark.parametrize("bound", ["0.1", "7"])
def test_the_table_says_why_there_is_no_plan_though_it_is_quiet(files, capsys, bound) -> None:
    assert main(arguments(files, "--gpus", "1", "--quiet", "--tpot-ms", bound, "--rate-scale", "300")) == 1
    out, err = capsys.readouterr()
    assert err == "" and out.count("No feasible configuration") == 1
    assert ("TPOT may be 0.1 ms" in out) == (bound == "0.1")
    assert ("nearest miss" in out and "what binds" in out) == (bound == "7")
    assert out.count("a decode step of one sequence") <= 1  # settings that fail alike are said once


@pytest.mark.slow
def test_several_kinds_of_gpu_are_compared(files, capsys) -> None:
    given = [
        "--trace",
        str(files / "trace.jsonl"),
        "--gpus",
        "1",
        "--gpu",
        "h200,h100,h200,a10g",
        "--merge",
        "never",
    ]
    given += ["--max-num-seqs", "64", "--max-num-batched-tokens", "512", "--workers", "1", "--tpot-ms", "40"]
    assert main([*given, "--format", "json"]) == 0
    out, err = capsys.readouterr()
    plans = json.loads(out)["by_gpu"]
    assert list(plans) == ["h200", "h100", "a10g"]
    rates = [plans[kind]["recommended"]["sustainable_rps"] for kind in ("h200", "h100")]
    assert rates[0] > rates[1] > 4.0
    assert plans["a10g"]["recommended"] is None and "TPOT" in plans["a10g"]["why_not"]
    assert [line for line in err.splitlines() if line.startswith("planning for")] == [
        "planning for h200",
        "planning for h100",
        "planning for a10g",
    ]
    assert any("scaled to h100 by specification" in line for line in plans["h100"]["warnings"])
    assert not any("beyond the measured sizes" in line for line in plans["h100"]["warnings"])
    assert main([*given, "--quiet"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table[1:4]] == ["h200", "h100", "a10g"]
    assert "highest rate: h200" in table and any(line.startswith("cheapest per token: h") for line in table)


def test_a_burst_that_is_over_in_time_is_warned_of(files, capsys) -> None:
    """120 requests in a second meet the SLO, and that rate cannot be sustained."""
    assert main(arguments(files, "--gpus", "1", "--format", "json", "--rate-scale", "40")) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["recommended"]["sustainable_rps"] < plan["trace"]["rate_rps"]
    assert any("is over before its queue has grown" in warning for warning in plan["warnings"])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--gpus", "0"], "--gpus"),
        (["--gpus", "two"], "--gpus"),
        (["--tp", "3"], "tp (=3) must divide num_heads"),
        (["--tp", "0"], "tp (=0)"),
        (["--tp", "x"], "--tp=x"),
        (["--tp", "8"], "more than the 2 GPUs"),
        (["--max-num-seqs", ""], "--max-num-seqs"),
        (["--max-num-batched-tokens", "-4"], "max_num_batched_tokens=-4"),
        (["--model", "gpt-9"], "gpt-9"),
        (["--gpu", "h900"], "h900"),
        (["--frobnicate"], "--frobnicate"),
        (["--objective", "cheapest"], "cheapest"),
        (["--scheduler", "lifo"], "--scheduler: 'lifo'"),
        (["--router", ""], "--router"),
        (["--placement", "moon"], "--placement: 'moon'"),
        (["--max-adapters-per-step", "few"], "--max-adapters-per-step=few"),
        (["--merge", "always"], "--merge: 'always'"),
        (["--export", "tgi"], "--export: 'tgi'"),
        (["--explain", "x.json", "--verify", "RUN"], "exclude each other"),
        (["--config", "x.json"], "--config is for --verify"),
        (["--cluster", "tcp://127.0.0.1:1"], "--cluster and --workers exclude each other"),
        (["--gpu", "h200,h100"], "takes neither --profile"),
        (["--engine", "vllm", "--objective", "pareto"], "--objective pareto"),
        (["--engine", "vllm", "--merge", "hot"], "--merge is for --engine ours"),
        (["--max-loras", "4"], "--max-loras is for --engine vllm"),
        (["--ttft-ms", "-5"], "--ttft-ms=-5"),
        (["--tpot-ms", "0"], "--tpot-ms=0"),
        (["--e2e-ms", "nan"], "--e2e-ms=nan"),
        (["--attainment", "1.5"], "--attainment=1.5"),
        (["--percentile", "0"], "--percentile=0"),
        (["--rate-scale", "0"], "--rate-scale=0"),
        (["--timeout-s", "-1"], "--timeout-s=-1"),
        (["--trace", "{}/missing.jsonl"], "missing.jsonl: cannot be read"),
        (["--trace", "{}/empty.jsonl"], "empty.jsonl"),
        (["--trace", "{}/array.jsonl"], "array.jsonl:1"),
        (["--trace", "{}/negative.jsonl"], "negative.jsonl:1: prompt_tokens"),
        (["--trace", "{}/fraction.jsonl"], "fraction.jsonl:1: prompt_tokens"),
        (["--trace", "{}/nan.jsonl"], "nan.jsonl:1: arrival_s"),
        (["--trace", "{}/rank0.jsonl"], "rank0.jsonl:1: rank"),
        (["--trace", "{}/ranks.jsonl"], "ranks.jsonl:2"),
        (["--trace", "{}/unsorted.jsonl"], "unsorted.jsonl:2: arrival_s"),
        (["--adapters", "{}/missing.jsonl"], "missing.jsonl"),
        (["--adapters", "{}/others.jsonl"], "adapter 'a0' of the trace"),
        (["--adapters", "{}/blocks.jsonl"], "blocks.jsonl:1: num_experts (=99)"),
        (["--profile", "{}/missing.json"], "missing.json"),
        (["--profile", "{}/empty.jsonl"], "not JSON"),
        (["--prices", "{}/profile.json"], "usd_per_gpu_hour"),
        (["--output-dir", "{}/full"], "is not empty"),
        (["--output-dir", "{}/trace.jsonl"], "is a file"),
        (["extra"], "extra"),
    ],
)
def test_bad_input_is_one_line_and_2(files, capsys, flags, said) -> None:
    out = files / "never"
    flags = [flag.format(files) for flag in flags]
    folder = [] if "--output-dir" in flags else ["--output-dir", str(out)]
    assert main(arguments(files, *folder, *flags)) == 2
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert len(stderr.splitlines()) == 1
    assert stderr.startswith("error: ") and said in stderr
    assert not out.exists()


def test_trace_and_gpus_are_required(capsys) -> None:
    assert main(["--gpus", "1"]) == 2
    assert "--trace" in capsys.readouterr().err


def test_plans_without_torch(files) -> None:
    """A plan is made where torch, triton and the engine's GPU half cannot be imported."""
    script = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "triton", "kernels", "transformers", "safetensors"):
            raise ImportError(name)
sys.meta_path.insert(0, Block())
from planner.cli import main
sys.exit(main({arguments(files, "--quiet")!r}))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "recommended" in done.stdout


def start(files: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    trace = ROOT / "traces" / "samples" / "sample.jsonl.gz"
    given = arguments(files, "--trace", str(trace), "--output-dir", str(out), "--top", "1", *more)
    return subprocess.Popen(
        [sys.executable, "-m", "planner", *given],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(process: subprocess.Popen[str], stage: str) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith(stage):
            return


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_ctrl_c_is_130_with_the_best_so_far_and_resumes(files) -> None:
    out = files / "interrupted"
    with start(files, out, "--workers", "2", "--format", "json") as process:
        wait_for(process, "the best settings")
        time.sleep(0.3)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        assert process.wait(timeout=30) == 130
        assert process.stderr is not None and process.stdout is not None
        assert "Traceback" not in process.stderr.read()
        best = json.loads(process.stdout.read())
    assert any("best so far" in warning for warning in best["warnings"])
    assert not (out / "plan.json").exists() and (out / "request.json").exists()
    known = len((out / "journal.jsonl").read_text().splitlines())
    assert known > 0 and len((out / "trials.jsonl").read_text().splitlines()) >= known
    trace = str(ROOT / "traces" / "samples" / "sample.jsonl.gz")
    other = arguments(files, "--trace", trace, "--output-dir", str(out), "--top", "2")
    assert main(other) == 2, "another question is not resumed"
    assert (out / "journal.jsonl").exists()
