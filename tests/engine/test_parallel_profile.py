"""The profile of tensor parallelism, tried on a CPU: its rows are what the simulator reads."""

import json

import pytest
import torch

from engine.__main__ import main
from engine.config import ServingConfig
from engine.parallel_profile import Mode, ParallelPlan, parallel_adapters, profile_parallel
from sim.parallel import parse_parallel
from tests.engine.tiny import save_model, tiny_model


def test_adapters_are_of_each_kind():
    plan = ParallelPlan(ranks=(16,), adapters=2)
    two, eight = parallel_adapters(plan, 2), parallel_adapters(plan, 8)
    assert {(spec.rank, spec.nblocks) for spec in two.values()} == {
        (16, 1),
        (16, 2),
        (24, 2),
        (32, 2),
        (16, 8),
    }
    assert {(spec.rank, spec.nblocks) for spec in eight.values()} == {(16, 1), (16, 8), (32, 8), (64, 8)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the command would find its GPU and start to measure")
@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--tp", "2"], "needs a GPU and none is visible"),
        (["--tp", "2", "--ranks", "16,x"], "--ranks takes numbers as in 16,64"),
    ],
)
def test_what_stands_in_the_way_is_one_line(flags, line, tmp_path, capsys):
    assert main(["profile", "--out", str(tmp_path / "out"), *flags]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and said[0].startswith("error: ") and line in said[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("tp", [2, 4])
def test_ranks_measure_steps_and_serve_bursts(tmp_path, tp):
    model = save_model(
        tiny_model("llama", num_key_value_heads=4, num_attention_heads=8, hidden_size=128, head_dim=16),
        tmp_path / "model",
    )
    config = ServingConfig(
        model=str(model),
        tp=tp,
        backend="reference",
        dtype="float32",
        max_num_seqs=8,
        max_num_batched_tokens=32,
        max_model_len=256,
        page_tokens=64,
        num_pages=900,
    )
    plan = ParallelPlan(
        modes=(
            Mode(lora_sharding="block_diagonal", collectives="fast"),
            Mode(lora_sharding="slora", collectives="fast"),
        ),
        batches=(1, 4),
        ranks=(16,),
        adapters=3,
        grid=2,
        requests=4,
        burst_adapters=2,
        burst_tokens=(2, 12),
        kv_tokens=60,
    )
    target = tmp_path / f"tiny.h200.tp{tp}.json"
    profile_parallel(config, plan, target, progress=lambda _: None)
    data = json.loads(target.read_text(encoding="utf-8"))
    steps, _ = parse_parallel(data, "tiny")
    assert {(found.exchange, found.tp) for found in steps} == {("local", tp), ("slora", tp)}
    assert all(len(found.steps) == len(found.steps_us) for found in steps)
    bursts = [row for row in data["steps"] if row["case"] == "burst"]
    assert [row["lora_sharding"] for row in bursts] == [
        "base",
        "replicated",
        "block_diagonal",
        "block_diagonal",
        "slora",
    ]
    assert all(row["rps"] > 0 for row in bursts)
