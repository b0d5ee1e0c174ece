from pathlib import Path

import numpy as np
import pytest

import traces
from traces import Trace, TraceRequest
from traces.assign import zipf
from traces.describe import describe, table, zipf_exponent


def request(position: int, arrival_s: float, adapter: str | None, rank: int | None) -> TraceRequest:
    return TraceRequest(
        id=position,
        arrival_s=arrival_s,
        prompt_tokens=10 * (position + 1),
        output_tokens=7,
        adapter=adapter,
        rank=rank,
        session=f"s{position % 2}",
        prefix_blocks=(0, position),
    )


SMALL = Trace(
    [
        request(0, 0.0, "a", 8),
        request(1, 1.0, "a", 8),
        request(2, 1.5, None, None),
        request(3, 3.5, "a", 8),
        request(4, 61.0, "b", None),
    ],
    "small",
)


def test_counts_by_hand() -> None:
    summary = describe(SMALL)
    assert (summary.requests, summary.duration_s, summary.rate_rps) == (5, 61.0, 4 / 61)
    assert (summary.requests_per_minute_min, summary.requests_per_minute_max) == (1, 4)
    gaps_s = np.array([1.0, 0.5, 2.0, 57.5])
    assert summary.arrival_cv == pytest.approx(gaps_s.std() / gaps_s.mean())
    counts = np.array([1, 2, 0, 1] + [0] * 57 + [1])
    assert summary.idc == pytest.approx(counts.var() / counts.mean())
    assert (summary.prompt_tokens.mean, summary.prompt_tokens.p50, summary.prompt_tokens.max) == (
        30.0,
        30,
        50,
    )
    assert (summary.sessions, summary.prefix_blocks) == (2, 5)
    adapters = summary.adapters
    assert adapters.count == 2
    assert adapters.base_share == pytest.approx(0.2)
    assert (adapters.top1_share, adapters.top10_share) == (0.75, 1.0)
    assert adapters.adapters_by_rank == {"8": 1, "unknown": 1}
    assert adapters.requests_by_rank == {"8": 3, "unknown": 1}


def test_a_trace_too_short_for_rates_has_none() -> None:
    summary = describe(SMALL.head(1))
    assert (summary.rate_rps, summary.arrival_cv, summary.idc) == (0.0, None, None)
    assert summary.adapters.zipf_s is None
    assert "CV –" in "\n".join(table(summary))


def test_a_trace_of_the_base_model_alone() -> None:
    summary = describe(Trace([request(0, 0.0, None, None), request(1, 1.0, None, None)]))
    assert (summary.adapters.count, summary.adapters.base_share, summary.adapters.top1_share) == (
        0,
        1.0,
        None,
    )
    assert list(table(summary))[-1] == "adapters         none: every request uses the base model"


@pytest.mark.parametrize("s", [0.0, 0.92, 1.5])
def test_zipf_exponent_finds_the_exponent(s: float) -> None:
    uses = np.rint(zipf(50, s) * 1e6).astype(np.int64)
    assert zipf_exponent(uses) == pytest.approx(s, abs=1e-3)


def test_the_published_trace_has_its_published_numbers(shared_traces: Path) -> None:
    summary = describe(traces.load(shared_traces / "ready" / "azure2023_conv.R1_zipf0.92_N100.jsonl.gz"))
    assert summary.requests == 14_176
    assert (round(summary.rate_rps, 2), round(summary.arrival_cv or 0, 2), round(summary.idc or 0, 1)) == (
        5.91,
        1.08,
        1.3,
    )
    assert (summary.requests_per_minute_min, summary.requests_per_minute_max) == (191, 507)
    prompt = summary.prompt_tokens
    assert (prompt.p10, prompt.p50, prompt.p90, prompt.p95, prompt.p99, prompt.max) == (
        220,
        1015,
        4074,
        4085,
        4122,
        14050,
    )
    assert (round(summary.adapters.top1_share or 0, 3), round(summary.adapters.top10_share or 0, 3)) == (
        0.164,
        0.510,
    )
