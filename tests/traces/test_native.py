import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from traces import Trace, TraceError, TraceRequest, load, save

GOOD = {"id": 0, "arrival_s": 0.5, "prompt_tokens": 10, "output_tokens": 2, "adapter": "a", "rank": 8}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def test_reads_a_line_by_its_fields(tmp_path: Path) -> None:
    row = GOOD | {"session": "s", "prefix_blocks": [3, 4], "unknown": {"is": "ignored"}}
    trace = load(write(tmp_path / "t.jsonl", row))
    expected = TraceRequest(
        id=0,
        arrival_s=0.5,
        prompt_tokens=10,
        output_tokens=2,
        adapter="a",
        rank=8,
        session="s",
        prefix_blocks=(3, 4),
    )
    assert trace.requests == (expected,)
    assert trace.name == "t"


def test_only_arrival_and_lengths_are_needed(tmp_path: Path) -> None:
    row = '{"arrival_s": 0, "prompt_tokens": 1, "output_tokens": 1}'
    trace = load(
        write(tmp_path / "t.jsonl", row, "", '{"arrival_s": 1, "prompt_tokens": 2.0, "output_tokens": 1}')
    )
    assert [(r.id, r.arrival_s, r.prompt_tokens, r.adapter, r.rank) for r in trace.requests] == [
        (0, 0.0, 1, None, None),
        (1, 1.0, 2, None, None),
    ]


def test_spread_arrivals_are_used_unless_raw_ones_are_asked_for(tmp_path: Path) -> None:
    rows = [GOOD | {"id": i, "arrival_s": 3.0, "arrival_spread_s": 3.0 + i} for i in range(3)]
    path = write(tmp_path / "t.jsonl", *rows)
    assert [r.arrival_s for r in load(path).requests] == [3.0, 4.0, 5.0]
    assert [r.arrival_s for r in load(path, raw_arrivals=True).requests] == [3.0, 3.0, 3.0]
    save(load(path), tmp_path / "again.jsonl")
    assert [r.arrival_s for r in load(tmp_path / "again.jsonl", raw_arrivals=True).requests] == [
        3.0,
        3.0,
        3.0,
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arrival_s": None}, "arrival_s is missing"),
        ({"arrival_s": -1}, "arrival_s must be at least 0, not -1"),
        ({"arrival_s": float("nan")}, "arrival_s must be finite, not nan"),
        ({"arrival_s": float("inf")}, "arrival_s must be finite, not inf"),
        ({"arrival_s": True}, "arrival_s must be a number of seconds, not True"),
        ({"arrival_s": "1"}, "arrival_s must be a number of seconds, not '1'"),
        ({"arrival_s": 10**400}, "arrival_s must be finite, not 1000"),
        ({"arrival_s": 0.25}, "arrival_s 0.25 is before 0.5 of the row above"),
        ({"arrival_spread_s": 0.25}, "arrival_spread_s 0.25 is before 0.5"),
        ({"arrival_spread_s": float("nan")}, "arrival_spread_s must be finite"),
        ({"prompt_tokens": None}, "prompt_tokens is missing"),
        ({"prompt_tokens": 0}, "prompt_tokens must be in 1..2147483647, not 0"),
        ({"prompt_tokens": 1.5}, "prompt_tokens must be a whole number, not 1.5"),
        ({"prompt_tokens": float("inf")}, "prompt_tokens must be a whole number, not inf"),
        ({"output_tokens": 0}, "output_tokens must be in 1..2147483647, not 0"),
        ({"output_tokens": -3}, "output_tokens must be in 1..2147483647, not -3"),
        ({"output_tokens": True}, "output_tokens must be a whole number, not True"),
        ({"output_tokens": [1]}, "output_tokens must be a whole number, not [1]"),
        ({"rank": 0}, "rank must be in 1..256, not 0"),
        ({"rank": 257}, "rank must be in 1..256, not 257"),
        ({"rank": "8"}, "rank must be a whole number, not '8'"),
        ({"rank": 16}, "rank of adapter 'a' is 16, but 8 earlier: an adapter has one rank"),
        ({"adapter": None}, "rank is 8, but the request names no adapter"),
        ({"adapter": 3}, "adapter must be a name or null, not 3"),
        ({"adapter": ""}, "adapter must be a name or null, not ''"),
        ({"id": 0}, "id 0 was already used at "),
        ({"id": 1.5}, "id must be a whole number or a text, not 1.5"),
        ({"session": 1.5}, "session must be a text or null, not 1.5"),
        ({"prefix_blocks": 3}, "prefix_blocks must be a list of whole numbers"),
        ({"prefix_blocks": [-1]}, "prefix_blocks must be a list of whole numbers"),
    ],
)
def test_a_bad_field_is_named_with_its_file_and_line(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "t.jsonl", GOOD, "", GOOD | {"id": 7} | change)
    with pytest.raises(TraceError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}:3: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1, 2]", "not a JSON object but list"),
        ("null", "not a JSON object but NoneType"),
        ("{'id': 0}", "not JSON: "),
        ('{"arrival_s": 0', "not JSON: "),
        ('{"a":' * 100_000, "not JSON: "),
        ('{"a": ' + "1" * 5000 + "}", "not JSON: "),
    ],
)
def test_a_line_that_is_no_object_is_refused(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "t.jsonl", GOOD, line)
    with pytest.raises(TraceError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}:2: {message}")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("t.jsonl", b"", "the trace is empty"),
        ("t.jsonl", b"\n \r\n", "the trace is empty"),
        ("t.jsonl.gz", b"", "the trace is empty"),
        ("t.jsonl.gz", gzip.compress(json.dumps(GOOD).encode(), mtime=0)[:-6], "cut short or damaged"),
        ("t.jsonl.gz", gzip.compress(b"x" * 1000, mtime=0)[:15], "cut short or damaged"),
        ("t.jsonl.gz", b"{}", "is named .gz but is not gzip"),
        ("t.jsonl", b'{"id": 1}\xff\n', ":1: not UTF-8 text (byte 0xff)"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(TraceError) as caught:
        load(path)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="no such file or directory"):
        load(tmp_path / "none.jsonl")
    with pytest.raises(TraceError, match="is a directory"):
        load(tmp_path)


def test_a_rank_told_once_is_the_adapters(tmp_path: Path) -> None:
    rows = [GOOD | {"rank": None}, GOOD | {"id": 1}, GOOD | {"id": 2, "rank": None}]
    assert [r.rank for r in load(write(tmp_path / "t.jsonl", *rows)).requests] == [8, 8, 8]


def test_save_is_reproducible_and_does_not_overwrite_unasked(tmp_path: Path) -> None:
    trace = load(write(tmp_path / "t.jsonl", GOOD))
    save(trace, tmp_path / "one.jsonl.gz")
    save(trace, tmp_path / "two.jsonl.gz")
    assert (tmp_path / "one.jsonl.gz").read_bytes() == (tmp_path / "two.jsonl.gz").read_bytes()
    with pytest.raises(TraceError, match="already exists"):
        save(trace, tmp_path / "one.jsonl.gz")
    save(trace.scaled(2), tmp_path / "one.jsonl.gz", overwrite=True)
    assert load(tmp_path / "one.jsonl.gz").duration_s == 0.25


def test_save_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = load(write(tmp_path / "t.jsonl", GOOD))

    def full(trace: Trace) -> Iterator[str]:
        yield '{"id":0'
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("traces.native.to_lines", full)
    with pytest.raises(TraceError, match="cannot be written: no space left on device"):
        save(trace, tmp_path / "out.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["t.jsonl"]


def test_save_into_a_missing_folder_or_over_a_folder_is_refused(tmp_path: Path) -> None:
    trace = load(write(tmp_path / "t.jsonl", GOOD))
    with pytest.raises(TraceError, match="does not exist"):
        save(trace, tmp_path / "none" / "out.jsonl")
    with pytest.raises(TraceError, match=r"its folder .* does not exist"):
        save(trace, tmp_path / "t.jsonl" / "out.jsonl")
    with pytest.raises(TraceError, match="is a folder"):
        save(trace, tmp_path, overwrite=True)


NAMES = st.sampled_from(["a", "b", "é", "\u2028", "a\nb"])
RANK_OF = {"a": 8, "b": 256, "é": None, "\u2028": 1, "a\nb": 64}


@st.composite
def requests(draw: st.DrawFn) -> list[TraceRequest]:
    gaps = draw(st.lists(st.floats(0, 1e6), min_size=1, max_size=20))
    rows, now_s = [], 0.0
    for position, gap_s in enumerate(gaps):
        now_s += gap_s
        adapter = draw(st.none() | NAMES)
        row = TraceRequest(
            id=position if draw(st.booleans()) else f"id {position}",
            arrival_s=now_s,
            prompt_tokens=draw(st.integers(1, 10**6)),
            output_tokens=draw(st.integers(1, 10**6)),
            adapter=adapter,
            rank=RANK_OF[adapter] if adapter else None,
            session=draw(st.none() | st.text(max_size=3)),
            prefix_blocks=draw(st.none() | st.lists(st.integers(0, 2**60), max_size=3).map(tuple)),
        )
        rows.append(row)
    return rows


@given(requests())
def test_what_is_saved_is_what_is_loaded(
    tmp_path_factory: pytest.TempPathFactory, rows: list[TraceRequest]
) -> None:
    path = tmp_path_factory.mktemp("t") / "t.jsonl.gz"
    save(Trace(rows), path)
    assert load(path).requests == tuple(rows)
