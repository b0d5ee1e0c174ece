"""The benchmark of merging and experts: everything but the CUDA graphs, on small shapes."""

import pytest
import torch

from kernels import sgmm_ref, switch_bench
from kernels.graph_time import WrongResultError

CUDA = torch.cuda.is_available()


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(switch_bench, "DEVICE", "cuda" if CUDA else "cpu")
    monkeypatch.setattr(switch_bench, "DTYPE", torch.bfloat16 if CUDA else torch.float16)
    monkeypatch.setattr(switch_bench, "GROUPS", ((64, (64, 32)), (64, (64,))))
    monkeypatch.setattr(switch_bench, "SETS", 2)
    monkeypatch.setattr(switch_bench, "RANKS", (16,))
    monkeypatch.setattr(switch_bench, "TOKENS", (1, 3))
    monkeypatch.setattr(switch_bench, "graph_us", lambda run, replays: 8.0)


@pytest.mark.slow
def test_rows_of_both_merges_and_of_experts():
    rows = switch_bench.bench_switch(log=lambda line: None)
    assert [(row["op"], row["tokens"]) for row in rows] == [
        ("sgmm_pristine", 1), ("sgmm_in_place", 1), ("experts", 1), ("experts", 3)
    ]  # fmt: skip
    assert all(row["rank"] == 16 and row["ratio"] > 1 and row["rel_err"] < 1e-2 for row in rows)


def test_a_wrong_merge_is_not_timed(monkeypatch):
    monkeypatch.setattr(sgmm_ref, "merge_", lambda plan, route: None)
    with pytest.raises(WrongResultError, match="sgmm_pristine"):
        switch_bench.bench_merge(16, False, 1)
