"""Exports: every flag is one that the engine's recorded options have, and every export says what its predictions are worth."""

import json
import re
import shlex
from typing import Any

import pytest

from engine.adapter import AdapterSpec
from engine.config import ServingConfig
from planner.exports import ENGINES, export, options_of

CONFIG = ServingConfig(
    tp=2, replicas=3, lora_sharding="slora", scheduler="slo", ttft_slo_s=0.5, max_num_seqs=128
)
ADAPTERS = {f"a{i}": AdapterSpec(name=f"a{i}", rank=(8, 24)[i % 2]) for i in range(100)}


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "ours"])
@pytest.mark.parametrize("adapters", [ADAPTERS, {}], ids=["adapters", "none"])
@pytest.mark.parametrize("config", [CONFIG, ServingConfig(prefix_caching=False)], ids=["tp 2", "tp 1"])
def test_every_flag_is_recorded(engine, adapters, config) -> None:
    made = export(engine, config, adapters, "trace.jsonl")
    recorded = options_of(engine)
    assert made.flags and set(made.flags) <= set(recorded["options"])
    assert recorded["sources"] and recorded["version"]
    launches = [line for line in made.text.splitlines() if line.startswith("CUDA_VISIBLE_DEVICES")]
    assert not launches or len(launches) == config.replicas
    for line in launches:
        check_command(line.removesuffix(" &"), recorded["options"], recorded.get("choices", {}))


def check_command(line: str, options: list[str], choices: dict[str, list[Any]]) -> None:
    """Hold every flag of a command against recorded options, and every value against the flag's choices."""
    flag = None
    for word in shlex.split(line):
        if word.startswith("--"):
            flag = word
            assert flag in options, flag
        elif flag in choices:
            assert word in [str(choice) for choice in choices[flag]], (flag, word)


@pytest.mark.parametrize(
    ("engine", "program"), [("vllm", "vllm bench serve"), ("sglang", "python -m sglang.benchmark.serving")]
)
def test_the_benchmark_takes_its_flags(engine, program) -> None:
    text = export(engine, CONFIG, ADAPTERS, "trace.jsonl").text
    (line,) = (line for line in text.splitlines() if line.startswith(program))
    recorded = options_of(engine)
    check_command(line, recorded["bench_options"], recorded["bench_choices"])
    file = re.search(r"--dataset-path (\S+)", line)
    assert file and "python -m traces export" in text and f"--out {file[1]}" in text
    assert "adapters are drawn evenly, not by the trace" in text


def test_lists_are_of_the_versions_that_are_named() -> None:
    for engine, version in (("vllm", "0.33.0"), ("sglang", "0.5.23")):
        recorded = options_of(engine)
        assert recorded["version"] == version and len(recorded["options"]) > 400
        assert version in recorded["sources"][0]["what"]


def test_sglang_overlaps_loads_only_where_it_would_start() -> None:
    """It asserts max_loaded_loras <= 2 × max_loras_per_batch with the flag."""
    few = {name: spec for name, spec in list(ADAPTERS.items())[:8]}
    assert "--enable-lora-overlap-loading" in export("sglang", CONFIG, few, "t").text
    capped = ServingConfig(max_adapters_per_step=8)
    assert "--enable-lora-overlap-loading" not in export("sglang", capped, ADAPTERS, "t").text


def test_kserve_gives_vllm_flags_of_vllms() -> None:
    text = export("kserve", CONFIG, ADAPTERS, "t").text
    manifest = json.loads("".join(line for line in text.splitlines() if not line.startswith("#")))
    for argument in manifest["spec"]["template"]["containers"][0]["args"]:
        assert argument.split("=")[0] in options_of("vllm")["options"]
    lora = manifest["spec"]["model"]["lora"]
    assert (lora["maxRank"], lora["maxCpuAdapters"], len(lora["adapters"])) == (32, 100, 100)


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "ours"])
def test_every_export_says_whose_latencies_they_are(engine) -> None:
    made = export(engine, CONFIG, ADAPTERS, "trace.jsonl")
    assert any("predictions for loraplan's own engine" in line for line in made.warnings)
    assert any("'slo' is ours alone" in line for line in made.warnings)
    assert all(f"# {line}" in made.text for line in made.warnings)
    assert str(options_of(engine)["version"]) in made.text


def test_replicas_have_gpus_and_ports_of_their_own() -> None:
    text = export("vllm", CONFIG, ADAPTERS, "trace.jsonl").text
    assert re.findall(r"CUDA_VISIBLE_DEVICES=(\S+)", text) == ["0,1", "2,3", "4,5"]
    assert re.findall(r"--port (\d+) &", text) == ["8000", "8001", "8002"]
    assert "--max-lora-rank 32" in text and "--fully-sharded-loras" in text
    assert "vllm bench serve" in text


def test_sglang_counts_the_base_model_among_the_slots() -> None:
    text = export("sglang", ServingConfig(), {"a": AdapterSpec(name="a", rank=8)}, "t").text
    assert "--max-loras-per-batch 2" in text and "--max-loaded-loras 2" in text


def test_ours_serves_replays_and_verifies() -> None:
    made = export("ours", CONFIG, ADAPTERS, "trace.jsonl")
    for command in ("python -m engine serve", "python -m engine replay", "plan --verify RUN"):
        assert command in made.text
