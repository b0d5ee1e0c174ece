"""`python -m kernels bench`: everything but the CUDA graphs, on small shapes, so that a visit to the GPU is not spent on mending it."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from kernels import (
    __main__,
    attention_bench,
    bench_report,
    elementwise_bench,
    graph_time,
    lora_bench,
    lora_cases,
    lora_pack,
    lora_peers,
)
from kernels.lora_cases import Case
from kernels.lora_launch import lora_launch_config

SMALL = ((32, 32), (32, 16), (32, 16), (32, 32), (32, 64), (32, 64), (64, 32))
CUDA = torch.cuda.is_available()

# What shared/peers/build makes, as far as the benchmark uses it; sglang_triton fails, sglang is wrong.
FAKE_PEERS = """
VERSIONS = {"vllm": "0"}
calls = []
class Weights: pass
def random_weights(n, rank, k, widths, dtype, device, ranks, scalings, seed):
    assert len(ranks) == n == len(scalings) and max(ranks) <= rank
    calls.append((n, rank, k, tuple(widths)))
    return Weights()
def pack(peer, weights):
    return peer
def plan(peer, packed, slots, phase, **options):
    assert peer == packed
    calls.append((peer, slots.tolist(), phase, options))
    return slots
def reference(x, weights, slots, y):
    return y.float() + 1
def shrink(x, packed, plan):
    if packed == "sglang_triton":
        raise ValueError("no such\\nshape")
def expand(h, packed, plan, y):
    return y.add_(0 if packed == "sglang" else 1)
SHRINK = EXPAND = None
SHRINK = dict.fromkeys(("vllm", "sglang", "sglang_v2", "sglang_triton"), shrink)
EXPAND = dict.fromkeys(SHRINK, expand)
def capture(run, warmup):
    run()
"""


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Run on what is here, at small shapes, without graphs."""
    dtype = torch.bfloat16 if CUDA else torch.float16
    for module in (lora_bench, attention_bench, elementwise_bench, lora_peers):
        monkeypatch.setattr(module, "DEVICE", "cuda" if CUDA else "cpu")
        monkeypatch.setattr(module, "DTYPE", dtype)
    for module in (lora_bench, lora_cases, lora_peers):
        monkeypatch.setattr(module, "LLAMA_8B", SMALL)
    for module in (lora_bench, attention_bench, lora_peers):
        monkeypatch.setattr(module, "ROTATED_BYTES", 1e4)
    pack = partial(lora_pack.pack_random, shapes=SMALL, page_bytes=16384)
    monkeypatch.setattr(lora_bench, "pack_random", pack)
    monkeypatch.setattr(lora_bench, "NUM_ADAPTERS", 2)

    def few_programs(tokens, group):  # of which the interpreter runs every one
        return replace(lora_launch_config(tokens, group), shrink_programs=4, expand_programs=4)

    monkeypatch.setattr(lora_bench, "lora_launch_config", few_programs)
    for name in ("DECODE_PROGRAMS", "PREFILL_PROGRAMS"):
        monkeypatch.setattr(attention_bench, name, 4)

    for module in (lora_bench, attention_bench, elementwise_bench):
        monkeypatch.setattr(module, "graph_us", lambda run, replays: 1.0)
    monkeypatch.setattr(lora_peers, "replay_us", lambda graph, replays: 1.0)


@pytest.fixture
def peers_folder(tmp_path, monkeypatch):
    package = tmp_path / "peers" / "fake_peer_kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(FAKE_PEERS)
    monkeypatch.setattr(lora_peers, "PACKAGE", "fake_peer_kernels")
    return str(tmp_path / "peers")


@pytest.mark.parametrize("tokens", [4, 130])
def test_lora_of_one_rank(tokens):
    case = Case(rank=8, tokens=tokens, adapters=2)
    result = lora_bench.bench_lora([case], log=lambda line: None)
    assert len(result["rows"]) == 12 and len(result["layer"]) == 1
    assert list(result["rows"][0]) == [
        "op", "layer", "case", "rank", "tokens", "adapters", "us", "bound_us", "ratio", "rel_err"
    ]  # fmt: skip
    assert result["layer"][0]["us"] > 0 and result["layer"][0]["ratio"] > 1
    assert result["mixed_ranks"] is None


def test_lora_of_mixed_ranks_and_of_a_prompt_beside_decodes():
    cases = [
        Case(name="mixed", rank=16, tokens=4, adapters=4, ranks=(8, 16, 8, 16)),
        Case(name="as mixed", rank=12, tokens=4, adapters=4),
        Case(name="saturated", rank=8, tokens=22, adapters=4, counts=(1, 2, 1, 18)),
    ]
    result = lora_bench.bench_lora(cases, log=lambda line: None)
    assert [layer["rank"] for layer in result["layer"]] == ["8-16", 12, 8]
    mixed = result["mixed_ranks"]
    assert mixed["mixed_bytes"] == mixed["uniform_bytes"]
    assert mixed["time_per_byte_quotient"] == 1.0


def test_the_cases_that_the_issue_asks_for():
    mixed, uniform, saturated, popular, chunk = lora_cases.cases_of((), (), lora_cases.SPECIAL)
    assert sorted(set(mixed.adapter_ranks)) == [8, 16, 32, 64, 128] and mixed.tokens == 40
    assert sum(mixed.adapter_ranks) == 1984 and sum(uniform.adapter_ranks) == 1920
    assert sum(saturated.row_counts) == saturated.tokens == 512
    assert set(saturated.row_counts[:200]) == {1, 2} and saturated.row_counts[200:] == (256,)
    assert popular.row_counts[:3] == (24, 4, 3) and min(popular.row_counts) == 1
    assert chunk.row_counts[-1] == 192 and sum(chunk.row_counts[:-1]) == 64
    assert all(
        len(case.row_counts) == len(case.adapter_ranks) == case.adapters
        and sum(case.row_counts) == case.tokens
        for case in (mixed, saturated, popular, chunk)
    )
    assert Case(rank=8, tokens=5, adapters=2).row_counts == (2, 3)


def test_peers_beside_ours(peers_folder, monkeypatch):
    monkeypatch.setattr(lora_bench.Batch, "relative_error", lambda batch: 0.0)
    cases = [
        Case(rank=12, tokens=3, adapters=2),
        Case(name="mixed", rank=8, tokens=2, adapters=2, ranks=(4, 8)),
    ]
    result = lora_bench.bench_lora(cases, log=lambda line: None)
    peers = lora_peers.load_peers(peers_folder)
    lines = []
    rows = lora_peers.bench_peers(peers, cases, log=lines.append)
    lora_peers.add_to_layers(result["layer"], rows)
    assert len(rows) == len(cases) * 4 * len(lora_peers.PEERS) and len(lines) == len(cases)
    for layer in result["layer"]:
        times = layer["peers"]
        assert times["vllm"] == times["vllm_specialized"] == times["sglang_v2"] > 0
        assert times["sglang_triton"] is None and times["sglang_csgmv"] is None
        assert layer["peer_errors"]["sglang_triton"] == "qkv: ValueError: no such"
        assert "relative error" in layer["peer_errors"]["sglang_csgmv"]
        assert layer["best_peer"] == "vllm"
    # One rank that is no power of two is padded; tokens go to adapters as ours do.
    assert peers.kernels.calls[0] == (2, 16, 32, (32, 16, 16))
    assert ("vllm", [0, 1, 1], "decode", {}) in peers.kernels.calls
    table = bench_report.report(result)
    assert "vllm_specialized" in table and "Mixed" not in table
    assert len(set(map(len, table.splitlines()[1:]))) == 1


@pytest.mark.parametrize("package", [None, "import no_such_module_anywhere"])
def test_a_folder_without_peers(tmp_path, capsys, monkeypatch, package):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(lora_peers, "PACKAGE", "broken_peer_kernels")
    if package:
        (tmp_path / "broken_peer_kernels").mkdir()
        (tmp_path / "broken_peer_kernels" / "__init__.py").write_text(package)
    assert __main__.main(["bench", "--peers", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: kernels bench: --peers {tmp_path}: ") and error.count("\n") == 1


def test_attention():
    rows = attention_bench.bench_attention(
        log=lambda line: None,
        decode_cases=[
            (((1, 600), (1, 5)), attention_bench.Heads(heads=4, kv_heads=2, head_dim=16)),
        ],
        prefill_cases=[],
    )
    small = attention_bench.Heads(heads=4, kv_heads=2, head_dim=16)
    rows += [attention_bench.bench_prefill(2, 5, before, replays=1, heads=small) for before in (0, 18)]
    assert rows[0]["op"] == "decode_attention" and rows[0]["kv"] == "1x600 + 1x5"
    for row in rows[1:]:
        assert row["op"] == "prefill_attention" and row["us_sdpa"] > 0 and row["vs_sdpa"] == 1.0
    assert all(row["ratio"] > 1 and row["rel_err"] < 1e-2 for row in rows)
    assert "600" in bench_report.report({"attention": rows})


def test_torch_attention_that_differs_has_no_time(monkeypatch):
    attention = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, k, v, **o: attention(q, k, v, enable_gqa=True),
    )
    row = attention_bench.bench_prefill(
        1, 5, 0, replays=1, heads=attention_bench.Heads(heads=4, kv_heads=2, head_dim=16)
    )
    assert row["us_sdpa"] is None and "relative error" in row["sdpa_error"]


def test_small_kernels(monkeypatch):
    for name, value in dict(
        HIDDEN=64, INTERMEDIATE=96, HEADS=4, KV_HEADS=2, HEAD_DIM=16, VOCAB=300, LAYERS=2, BUFFER_BYTES=1
    ).items():
        monkeypatch.setattr(elementwise_bench, name, value)
    rows = elementwise_bench.bench_elementwise(log=lambda line: None, tokens=(1, 3), sampled_rows=(2,))
    assert [row["op"] for row in rows[3:]] == [
        "rotary_write_kv",
        "rms_norm",
        "add_rms_norm",
        "silu_mul",
        "rotary_write_kv",
        "sample greedy",
        "sample temperature",
        "sample top_p_0.9",
    ]
    assert all(row["rel_err"] < 1e-2 for row in rows)
    monkeypatch.setattr(elementwise_bench, "sample", lambda *_, out: out.fill_(299))
    with pytest.raises(graph_time.WrongResultError, match="sample greedy of 2"):
        elementwise_bench.bench_sampling(2, 1, "greedy", 0.0, 1.0)


def test_the_command_writes_a_table_and_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench_report, "provenance", lambda: {"commit": "abc"})
    parts = []

    def run_parts(names, cases, peers, quick, log):
        log("at work")
        parts.append((names, len(cases), peers, quick))
        return {"small": [{"op": "rms_norm", "tokens": 1, "us": 2.0, "bound_us": 1.0, "ratio": 2.0}]}

    monkeypatch.setattr(__main__, "run_parts", run_parts)
    out = tmp_path / "bench.json"
    assert __main__.main(["bench", "--only", "small", "--quick", "--out", str(out)]) == 0
    assert parts == [(["small"], 15, None, True)]
    assert json.loads(out.read_text())["provenance"] == {"commit": "abc"}
    shown = capsys.readouterr()
    assert "rms_norm" in shown.out and "at work" in shown.err and "at work" not in shown.out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--ranks", "x"], "--ranks"),
        (["--ranks", "0"], "between 1 and 256"),
        (["--cases", "32"], "'32'"),
        (["--cases", "4:8"], "4:8"),
        (["--cases", "mixed,saturatd"], "'saturatd'"),
        (["--only", "small", "--peers", "x"], "--peers"),
        (["--out", "no/such/folder/x.json"], "--out"),
    ],
)
def test_bad_options_take_one_line(arguments, named, capsys):
    assert __main__.main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: kernels bench: ") and named in error and error.count("\n") == 1
