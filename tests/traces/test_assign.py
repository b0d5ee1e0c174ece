"""The rules, against numbers worked out with sha256sum and awk, and against the published rows.

By hand: seed 7, five adapters, s = 1. The weights are 1, 1/2, 1/3, 1/4, 1/5, their sum 137/60, the running
shares 60/137, 90/137, 110/137, 125/137, 1.
"""

from pathlib import Path

import numpy as np
import pytest

import traces
from traces import Trace, TraceError, TraceRequest
from traces.assign import RANK_MIXES, Assignment, RankOrder, Rule, assign, cdf, pick, rank_of, u, zipf
from traces.files import read_text
from traces.importers import import_azure, import_burstgpt, import_mooncake
from traces.tenants import load_tenants


def trace_of(count: int, sessions: list[str | None] | None = None, first_id: int = 0) -> Trace:
    return Trace(
        TraceRequest(
            id=first_id + i,
            arrival_s=float(i),
            prompt_tokens=1,
            output_tokens=1,
            session=sessions[i] if sessions else None,
        )
        for i in range(count)
    )


def drawn(trace: Trace) -> list[int | None]:
    return [None if r.adapter is None else int(r.adapter.removeprefix("a")) for r in trace.requests]


@pytest.mark.parametrize(
    ("seed", "rule", "key", "first_8_bytes"),
    [
        (7, "R1", 0, 0xDD04B7882A649C8F),
        (7, "R1", 1, 0xECDD8F5E065DA025),
        (7, "R2", "solo:3", 0xB5A3C2488B4AD804),
        (20240607, "R1", 0, 0x92D3F1E2CD6CECB5),
    ],
)
def test_u_is_the_head_of_a_sha256(seed: int, rule: str, key: object, first_8_bytes: int) -> None:
    assert u(seed, rule, key) == first_8_bytes / 2**64


def test_pick_takes_the_first_share_above_x_else_the_last() -> None:
    running = cdf([1.0, 0.0, 1.0, 2.0])
    assert running.tolist() == [0.25, 0.25, 0.5, 1.0]
    assert pick(running, np.array([0.0, 0.2499, 0.25, 0.5, 0.75, 1.0])).tolist() == [0, 0, 2, 3, 3, 3]


def test_zipf() -> None:
    assert zipf(4, 0.0).tolist() == [1.0, 1.0, 1.0, 1.0]
    assert zipf(3, 1.0).tolist() == [1.0, 0.5, 1 / 3]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("R1", [3, 4, 0, 1, 0, 0, 2, 0, 1, 0, 2, 0, 2, 1, 2, 2]),
        ("R1-slora", [3, 0, 3, 1, 0, 1, 0, 3, 0, 0, 0, 1, 0, 1, 0, 2]),
    ],
)
def test_independent_rules(rule: Rule, expected: list[int]) -> None:
    how = Assignment(rule=rule, adapters=5, zipf_s=1.0, alpha=0.5, seed=7)
    assert drawn(assign(trace_of(16), how)) == expected
    assert drawn(assign(trace_of(16, first_id=4).head(4), how)) == expected[4:8]  # a row keeps its draw


def test_sticky_rule_draws_by_session_and_alone_where_there_is_none() -> None:
    sessions = ["x", "y", None, "x", "z", "y", None, "w"]
    how = Assignment(rule="R2", adapters=5, zipf_s=1.0, seed=7)
    assert drawn(assign(trace_of(8, sessions), how)) == [1, 0, 0, 1, 1, 0, 1, 1]
    with pytest.raises(TraceError, match="no request has a session"):
        assign(trace_of(3), how)


def test_base_share_takes_requests_out() -> None:
    how = Assignment(adapters=5, zipf_s=1.0, seed=7, base_share=0.3)
    assert drawn(assign(trace_of(16), how)) == [3, 4, 0, 1, 0, None, 2, 0, 1, 0, 2, None, None, None, 2, 2]
    nobody = assign(trace_of(4), Assignment(base_share=1.0))
    assert nobody.adapters == {}


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("interleave", [16, 8, 64, 16, 8, 64, 16, 8, 64, 16]),
        ("hot-small", [8, 8, 8, 8, 16, 16, 16, 64, 64, 64]),
        ("hot-large", [64, 64, 64, 64, 16, 16, 16, 8, 8, 8]),
        ("hash", [64, 64, 8, 8, 8, 16, 8, 64, 8, 16]),  # positions 2 2 1 1 1 0 1 2 1 0 of the mix
    ],
)
def test_ranks(order: RankOrder, expected: list[int]) -> None:
    how = Assignment(adapters=10, rank_mix=(16, 8, 64), rank_order=order, seed=7)
    assert [rank_of(how, i) for i in range(10)] == expected


@pytest.mark.parametrize(
    "bad",
    [
        {"adapters": 0},
        {"zipf_s": -1.0},
        {"zipf_s": float("nan")},
        {"alpha": 0.0},
        {"rank_mix": ()},
        {"rank_mix": (8, 257)},
        {"base_share": 1.5},
        {"rule": "R9"},
        {"rank_order": "none"},
    ],
)
def test_bad_arguments_are_named(bad: dict[str, object]) -> None:
    (field,) = bad
    with pytest.raises(TraceError, match=f"^{field} must be "):
        Assignment(**bad)  # type: ignore[arg-type]


def test_azure_r1_equals_the_published_rows(shared_traces: Path, tmp_path: Path) -> None:
    source = shared_traces / "azure_llm_2023" / "AzureLLMInferenceTrace_conv.first40min.csv.gz"
    golden = shared_traces / "ready" / "azure2023_conv.R1_zipf0.92_N100.jsonl.gz"
    traces.save(assign(import_azure(source), Assignment()), tmp_path / "t.jsonl.gz")
    assert read_text(tmp_path / "t.jsonl.gz") == read_text(golden)


def test_mooncake_r2_equals_the_published_rows(shared_traces: Path, tmp_path: Path) -> None:
    source = shared_traces / "mooncake" / "conversation_trace.first40min.jsonl.gz"
    golden = shared_traces / "ready" / "mooncake_conversation.R2_prefix_sticky_zipf0.92_N100.jsonl.gz"
    said: list[str] = []
    traces.save(
        assign(import_mooncake(source, warn=said.append), Assignment(rule="R2")), tmp_path / "t.jsonl.gz"
    )
    assert read_text(tmp_path / "t.jsonl.gz") == read_text(golden)
    assert len(said) == 1
    assert "its clock ticks every 3 s" in said[0]


def test_burstgpt_r2_equals_the_published_rows(shared_traces: Path, tmp_path: Path) -> None:
    source = shared_traces / "burstgpt" / "BurstGPT_3.rows1-250.csv"
    golden = shared_traces / "ready" / "burstgpt3.R2_session_sticky_zipf0.92_N32.jsonl.gz"
    said: list[str] = []
    imported = import_burstgpt(source, warn=said.append)
    traces.save(assign(imported, Assignment(rule="R2", adapters=32)), tmp_path / "t.jsonl.gz")
    assert read_text(tmp_path / "t.jsonl.gz") == read_text(golden)
    assert [message.split(": ")[1] for message in said] == [
        "dropped 1 rows with zero request or response tokens (failed requests)"
    ]


def test_mixes_are_s_loras() -> None:
    assert RANK_MIXES["S2"] == (8, 16, 32, 64)
    assert RANK_MIXES["WIDE"] == (8, 16, 32, 64, 128)


def test_azure_r3_equals_the_published_rows(shared_traces: Path, tmp_path: Path) -> None:
    source = shared_traces / "azure_llm_2023" / "AzureLLMInferenceTrace_code.first40min.csv.gz"
    golden = shared_traces / "ready" / "azure2023_code.R3_servegen_mlarge_overlay.jsonl.gz"
    tenants = load_tenants(shared_traces / "servegen" / "m-large.week1.client_rates.csv.gz")
    assert len(tenants.places) == 135
    how = Assignment(rule="R3", adapters=135)
    traces.save(assign(import_azure(source), how, tenants), tmp_path / "t.jsonl.gz")
    assert read_text(tmp_path / "t.jsonl.gz") == read_text(golden)


TENANTS = "client_id,window_start_s,rate_rps\n7,0,1.0\n3,0,3.0\n3,600,1.0\n"


def short_trace(count: int = 400, gap_s: float = 2.0) -> Trace:
    return Trace(
        TraceRequest(id=j, arrival_s=j * gap_s, prompt_tokens=4, output_tokens=2) for j in range(count)
    )


def test_r3_follows_the_tenants_of_the_time(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(TENANTS)
    tenants = load_tenants(tmp_path / "t.csv")
    assert tenants.places == {3: 0, 7: 1}
    assigned = assign(short_trace(), Assignment(rule="R3", adapters=2, offset_s=0.0), tenants)
    adapters = [request.adapter for request in assigned.requests]
    assert adapters[:300].count("a0000") / 300 == pytest.approx(0.75, abs=0.06)
    assert set(adapters[300:]) == {"a0000"}  # from 600 s on there is one
    several = assign(short_trace(), Assignment(rule="R3", adapters=8, offset_s=0.0), tenants)
    assert {request.adapter for request in several.requests[300:]} == {"a0000", "a0001", "a0002", "a0003"}
    one = assign(short_trace(), Assignment(rule="R3", adapters=1, offset_s=0.0), tenants)
    assert {request.adapter for request in one.requests} == {"a0000"}


def test_r3_says_what_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(TENANTS)
    with pytest.raises(TraceError, match="needs the rates of tenants"):
        assign(short_trace(), Assignment(rule="R3"))
    with pytest.raises(TraceError, match="has no clients at 36000 s"):
        assign(short_trace(), Assignment(rule="R3"), load_tenants(tmp_path / "t.csv"))
    (tmp_path / "bad.csv").write_text("client_id,window_start_s,rate_rps\n1,100,2\n")
    with pytest.raises(TraceError, match=r"bad.csv:2: window_start_s=100"):
        load_tenants(tmp_path / "bad.csv")
