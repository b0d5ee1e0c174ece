import pickle
import time
from pathlib import Path

import numpy as np
import pytest

import traces
from traces import Trace, TraceColumns, TraceError, TraceRequest


def request(
    position: int, arrival_s: float, adapter: str | None = None, rank: int | None = None
) -> TraceRequest:
    return TraceRequest(
        id=position,
        arrival_s=arrival_s,
        prompt_tokens=10 + position,
        output_tokens=5,
        adapter=adapter,
        rank=rank,
    )


TRACE = Trace(
    [request(0, 1.0, "a", 8), request(1, 2.0), request(2, 4.0, "b", 64), request(3, 5.0, "a", 8)], "four"
)


def test_rate_duration_and_adapters() -> None:
    assert (len(TRACE), TRACE.duration_s, TRACE.rate_rps) == (4, 5.0, 0.75)
    assert TRACE.adapters == {"a": 8, "b": 64}
    assert Trace([request(0, 3.0)]).rate_rps == 0.0


def test_scaled_divides_time() -> None:
    assert [r.arrival_s for r in TRACE.scaled(2.0).requests] == [0.5, 1.0, 2.0, 2.5]
    assert TRACE.scaled(2.0).rate_rps == 1.5
    for bad in (0, -1, float("nan"), float("inf")):
        with pytest.raises(TraceError, match="rate_scale must be a finite number above 0"):
            TRACE.scaled(bad)


def test_window_counts_time_from_its_start_and_keeps_ids() -> None:
    window = TRACE.window(2.0, 5.0)
    assert [(r.id, r.arrival_s, r.adapter, r.rank) for r in window.requests] == [
        (1, 0.0, None, None),
        (2, 2.0, "b", 64),
    ]
    assert window.adapters == {"b": 64}
    with pytest.raises(TraceError, match="no request arrives in the window 6 s to 9 s"):
        TRACE.window(6, 9)


def test_head() -> None:
    assert [r.id for r in TRACE.head(2).requests] == [0, 1]
    assert len(TRACE.head(9)) == 4


def test_bad_requests_are_refused_by_position() -> None:
    with pytest.raises(TraceError, match=r"^mine: request 1: arrival_s 0\.5 is before 1\.0"):
        Trace([request(0, 1.0), request(1, 0.5)], "mine")
    with pytest.raises(TraceError, match="the trace is empty"):
        Trace([])


def test_columns_of_unequal_length_are_refused() -> None:
    one = np.ones(1, dtype=np.int64)
    with pytest.raises(TraceError, match="must all have 2 rows"):
        TraceColumns(
            ids=(0, 1), arrival_s=np.ones(2), prompt_tokens=one, output_tokens=one, adapter_index=one
        )


def test_a_trace_is_immutable_and_can_be_sent_to_another_process() -> None:
    with pytest.raises(AttributeError, match="immutable"):
        TRACE.name = "other"
    copy = pickle.loads(pickle.dumps(TRACE))
    assert copy.requests == TRACE.requests
    assert copy.name == "four"


def test_to_frame() -> None:
    frame = TRACE.to_frame()
    assert list(frame.columns) == list(TraceRequest.__slots__)
    assert frame["arrival_s"].tolist() == [1.0, 2.0, 4.0, 5.0]


def test_the_sample_is_what_its_readme_says() -> None:
    trace = traces.load(traces.sample_path())
    assert len(trace) == 3000
    assert len(trace.adapters) == 120
    assert set(trace.adapters.values()) == {8, 16, 32, 64, 128}
    assert 7.5 < trace.rate_rps < 8.5
    assert traces.sample_path().stat().st_size < 1_000_000


def test_fourteen_thousand_lines_load_in_half_a_second(tmp_path: Path) -> None:
    rows = [request(i, i / 8, f"a{i % 100}", 16) for i in range(14_176)]
    traces.save(Trace(rows), tmp_path / "t.jsonl.gz")
    fastest_s = 1e9
    for _ in range(3):  # the machine may be busy with something else
        began_s = time.process_time()
        traces.load(tmp_path / "t.jsonl.gz")
        fastest_s = min(fastest_s, time.process_time() - began_s)
    assert fastest_s < 0.5
