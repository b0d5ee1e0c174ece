"""`plan --engine vllm`: slots, rank, sequences and GPUs chosen by vLLM's simulation, and the flags that serve them."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest

from engine.adapter import AdapterSpec
from planner.cli import main
from planner.vllm import VllmEngine, vllm_flags, vllm_space
from sim.vllm_profile import find_vllm_profile, load_vllm_profile
from tests.sim.constant import trace_of
from traces import save


@pytest.fixture(scope="module")
def profile():
    return load_vllm_profile(find_vllm_profile("llama-3.1-8b"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm")
    save(trace_of(*((0.25 * i, 120, 12, f"a{i % 6}") for i in range(80))), folder / "trace.jsonl")
    (folder / "adapters.jsonl").write_text(
        "".join(json.dumps({"name": f"a{i}", "rank": 12}) + "\n" for i in range(6))
    )
    return folder


def space_of(profile, rank=8, slots=(8, 64), **changes):
    trace = trace_of(*((float(i), 100, 10, f"a{i % 100}") for i in range(200)))
    adapters = {f"a{i}": AdapterSpec(name=f"a{i}", rank=rank) for i in range(100)}
    options = {"gpus": 2, "tp": (1,), "max_num_seqs": (128,), "max_loras": slots, "context": 8192}
    return vllm_space(profile, trace, adapters, **(options | changes)), adapters


def test_every_adapter_is_padded_to_a_rank_that_vllm_takes(profile):
    space, adapters = space_of(profile, rank=12)
    possible, impossible = VllmEngine(profile).settings(space, adapters)
    assert not impossible
    assert {config.max_adapter_rank for config in possible} == {16}
    assert {config.max_adapters for config in possible} == {8, 64}


def test_slots_that_leave_too_little_kv_are_infeasible_and_say_why(profile):
    space, adapters = space_of(profile, rank=128, slots=(8, 64))
    possible, impossible = VllmEngine(profile).settings(space, adapters)
    assert [config.max_adapters for config in possible] == [8]
    assert "64 slots of rank 128" in impossible[0].reason


def test_there_are_no_more_slots_than_adapters(profile):
    space, _ = space_of(profile, slots=(8, 500))
    assert space.max_loras == (8, 100)


def test_flags_are_vllms(profile):
    space, adapters = space_of(profile)
    config = space.base.with_changes(replicas=2, max_adapters=8)
    flags = vllm_flags(config, adapters)
    assert flags[:3] == ["vllm", "serve", "llama-3.1-8b"]
    pairs = dict(pairwise(flags))
    assert pairs["--max-loras"] == "8" and pairs["--max-lora-rank"] == "8"
    assert pairs["--max-cpu-loras"] == "100" and pairs["--data-parallel-size"] == "2"
    assert "--enable-lora" not in vllm_flags(config, {})


def arguments(files, *more):
    base = ["--trace", str(files / "trace.jsonl"), "--gpus", "1", "--engine", "vllm", "--workers", "1"]
    limits = [
        "--tp",
        "1",
        "--max-num-seqs",
        "64",
        "--max-loras",
        "2,6",
        "--adapters",
        str(files / "adapters.jsonl"),
    ]
    return [*base, *limits, "--top", "1", *more]


def test_a_plan_for_vllm(files, capsys, tmp_path):
    out = tmp_path / "out"
    assert main(arguments(files, "--format", "json", "--output-dir", str(out))) == 0
    plan = json.loads(capsys.readouterr().out)
    chosen = plan["recommended"]
    assert plan["engine"] == "vllm"
    assert chosen["config"]["max_adapters"] == 6, "with as many slots as adapters nothing is loaded twice"
    assert f"--max-loras {chosen['config']['max_adapters']}" in plan["exports"]["recommended"]
    memory = dict(chosen["memory_per_gpu_bytes"])
    assert sum(memory.values()) == 2 * memory["total"]
    assert chosen["predicted"]["tpot_p50_s"]["low"] < chosen["predicted"]["tpot_p50_s"]["value"]
    assert not any("vLLM" in said for said in plan["warnings"])
    from sim.__main__ import main as sim

    given = ["--trace", str(files / "trace.jsonl"), "--config", str(out / "recommended.json")]
    given += [
        "--profile",
        str(find_vllm_profile("llama-3.1-8b")),
        "--adapters",
        str(files / "adapters.jsonl"),
    ]
    assert sim(["run", *given, "--format", "json"]) == 0
    again = json.loads(capsys.readouterr().out)["metrics"]
    assert again["tpot_p50_s"] == pytest.approx(chosen["predicted"]["tpot_p50_s"]["value"])


def test_what_cannot_be_planned_is_one_line(files, capsys, tmp_path, profile):
    (tmp_path / "ours.json").write_text('{"schema_version": 1}')
    for more in (
        ["--profile", str(tmp_path / "ours.json")],
        ["--model", "llama-2-13b"],
        ["--gpu", "a100"],
        ["--max-loras", "x"],
        ["--gpu-memory-utilization", "2"],
    ):
        assert main(arguments(files, *more)) == 2, more
        assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: ")


def test_without_room_for_any_slots_there_is_no_plan(files, capsys, profile, tmp_path):
    small = replace(profile, memory=replace(profile.memory, gpu_bytes=20 * 2**30))
    small.save(tmp_path / "small.json")
    assert main(arguments(files, "--profile", str(tmp_path / "small.json"))) == 1
    assert "no feasible configuration" in capsys.readouterr().err
