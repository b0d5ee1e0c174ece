import gzip
import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from traces import Trace, TraceError, load, save
from traces.importers import import_azure, import_burstgpt, import_mooncake

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2024-02-29 23:59:59.9999990,374,44\r\n"
    "2024-03-01 00:00:00.0000000,396,109\r\n"
    "2024-03-01 00:00:02.5,1,1\r\n"
)


def rows_of(trace: Trace) -> list[tuple[int | str, float, int, int]]:
    return [(r.id, r.arrival_s, r.prompt_tokens, r.output_tokens) for r in trace.requests]


def mooncake(path: Path, *rows: Mapping[str, object]) -> Path:
    path.write_text(
        "".join(json.dumps({"input_length": 600, "output_length": 5, **row}) + "\n" for row in rows)
    )
    return path


def test_azure_times_count_from_the_first_row(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv.gz"
    path.write_bytes(gzip.compress(AZURE.encode()))
    assert rows_of(import_azure(path)) == [(0, 0.0, 374, 44), (1, 1e-06, 396, 109), (2, 2.500001, 1, 1)]


def test_azure_times_may_have_a_zone(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    lines = ["2024-05-10 00:00:00.009930+00:00,1,1", "2024-05-10 02:00:01.009930+02:00,1,1"]
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(lines))
    assert [r.arrival_s for r in import_azure(path).requests] == [0.0, 1.0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("yesterday,1,1", "TIMESTAMP must be YYYY-MM-DD HH:MM:SS.fffffff, not 'yesterday'"),
        ("2024-02-30 00:00:00.0,1,1", "TIMESTAMP must be"),
        ("2024-03-02 00:00:00.0,,1", "ContextTokens is missing"),
        ("2024-03-02 00:00:00.0,1", "GeneratedTokens is missing"),
        ("2024-03-02 00:00:00.0,1,x", "GeneratedTokens must be a number, not 'x'"),
        ("2024-03-02 00:00:00.0,1,nan", "GeneratedTokens must be finite"),
        ("2024-03-02 00:00:00.0,1.5,1", "ContextTokens must be a whole number, not 1.5"),
        ("2024-03-02 00:00:00.0,0,1", "ContextTokens must be in 1.."),
        ("2024-02-01 00:00:00.0,1,1", "TIMESTAMP must be at least 0"),
        ("2024-03-01 00:00:01.0,1,1", "TIMESTAMP 1.000001 is before 2.500001"),
    ],
)
def test_azure_errors_name_line_and_column(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(AZURE + line + "\r\n", newline="")
    with pytest.raises(TraceError) as caught:
        import_azure(path)
    assert str(caught.value).startswith(f"{path}:5: {message}")


def test_csv_without_its_columns_or_rows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text("time,ContextTokens,GeneratedTokens\n1,2,3\n")
    with pytest.raises(TraceError, match=":1: column TIMESTAMP is missing: the header is time,"):
        import_azure(path)
    for text in ("", AZURE.splitlines()[0]):
        path.write_text(text)
        with pytest.raises(TraceError, match="the trace is empty"):
            import_azure(path)


def test_mooncake_spreads_the_requests_of_a_tick(tmp_path: Path) -> None:
    times = [0, 0, 3000, 3000, 3000, 6000]
    path = mooncake(tmp_path / "m.jsonl", *({"timestamp": t} for t in times))
    said: list[str] = []
    trace = import_mooncake(path, warn=said.append)
    assert [r.arrival_s for r in trace.requests] == [0.0, 1.5, 3.0, 4.0, 5.0, 6.0]
    assert len(said) == 1
    save(trace, tmp_path / "t.jsonl")
    assert [r.arrival_s for r in load(tmp_path / "t.jsonl", raw_arrivals=True).requests] == [0, 0, 3, 3, 3, 6]
    raw = import_mooncake(path, spread=False, warn=said.append)
    assert [r.arrival_s for r in raw.requests] == [0, 0, 3, 3, 3, 6]
    assert len(said) == 1


def test_mooncake_leaves_a_fine_clock_alone(tmp_path: Path) -> None:
    path = mooncake(tmp_path / "m.jsonl", *({"timestamp": t} for t in (1000, 1040, 1040, 2177)))
    said: list[str] = []
    trace = import_mooncake(path, warn=said.append)
    assert [r.arrival_s for r in trace.requests] == [0.0, 0.04, 0.04, 1.177]
    assert trace.columns.raw_arrival_s is None
    assert said == []


def test_mooncake_conversation_is_its_first_block_that_is_not_common(tmp_path: Path) -> None:
    common = [[0, 1], [0, 2, 3], [0], [0, 1, 9]]
    path = mooncake(tmp_path / "m.jsonl", *({"timestamp": i, "hash_ids": b} for i, b in enumerate(common)))
    trace = import_mooncake(path)
    assert [r.session for r in trace.requests] == ["1", "2", None, "1"]
    assert [r.prefix_blocks for r in trace.requests] == [(0, 1), (0, 2, 3), (0,), (0, 1, 9)]
    own = [[4, 1], [5, 2], [4, 3]]
    path = mooncake(tmp_path / "m.jsonl", *({"timestamp": i, "hash_ids": b} for i, b in enumerate(own)))
    assert [r.session for r in import_mooncake(path).requests] == ["4", "5", "4"]


def test_aiperf_aliases_of_the_adapter_and_a_session_id(tmp_path: Path) -> None:
    aliases = ("adapter", "lora", "lora_name", "adapter_id")
    path = mooncake(
        tmp_path / "a.jsonl",
        *({"timestamp": i, alias: f"x{i}", "rank": 8, "session_id": "s"} for i, alias in enumerate(aliases)),
    )
    trace = import_mooncake(path)
    assert [(r.adapter, r.rank, r.session) for r in trace.requests] == [(f"x{i}", 8, "s") for i in range(4)]
    path = mooncake(tmp_path / "a.jsonl", {"timestamp": 0, "lora": "x", "adapter_id": "y"})
    with pytest.raises(TraceError, match=":1: lora and adapter_id name different adapters"):
        import_mooncake(path)


def test_time_unit_and_the_warning_at_an_implausible_span(tmp_path: Path) -> None:
    path = mooncake(tmp_path / "m.jsonl", *({"timestamp": 2 * i} for i in range(10)))  # seconds
    said: list[str] = []
    trace = import_mooncake(path, "s", warn=said.append)
    assert [r.arrival_s for r in trace.requests] == [2.0 * i for i in range(10)]
    assert said == []
    path = mooncake(tmp_path / "m.jsonl", *({"timestamp": 0.2 * i} for i in range(10)))
    import_mooncake(path, "ms", warn=said.append)
    assert len(said) == 1
    assert "implausible; is the time unit right" in said[0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "timestamp is missing"),
        ({"timestamp": "3"}, "timestamp must be a finite number, not 3"),
        ({"timestamp": float("nan")}, "timestamp must be a finite number, not nan"),
        ({"timestamp": 5, "input_length": 0}, "input_length must be in 1.."),
        ({"timestamp": 5, "output_length": None}, "output_length is missing"),
        ({"timestamp": 5, "hash_ids": "x"}, "hash_ids must be a list"),
        ({"timestamp": -5}, "timestamp must be at least 0"),
    ],
)
def test_mooncake_errors_name_line_and_field(tmp_path: Path, row: dict[str, object], message: str) -> None:
    path = mooncake(tmp_path / "m.jsonl", {"timestamp": 0}, row)
    with pytest.raises(TraceError) as caught:
        import_mooncake(path)
    assert str(caught.value).startswith(f"{path}:2: {message}")


def test_burstgpt_reads_by_name_and_drops_failures(tmp_path: Path) -> None:
    path = tmp_path / "b.csv"
    path.write_text(
        "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,s1,1.0,ChatGPT,10,20,30,Conversation log\n"
        "45,,1.0,GPT-4,0,0,0,API log\n"
        "1205,,1.0,GPT-4,7,8,15,API log\n"
    )
    said: list[str] = []
    trace = import_burstgpt(path, warn=said.append)
    assert rows_of(trace) == [(0, 0.0, 10, 20), (2, 1200.0, 7, 8)]
    assert [r.session for r in trace.requests] == ["s1", "api:GPT-4:2"]
    assert "dropped 1 rows" in said[0]
