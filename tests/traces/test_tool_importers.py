"""Importers of other tools' formats, on rows as those tools write them."""

from pathlib import Path

import numpy as np
import pytest

from traces.__main__ import main
from traces.errors import TraceError
from traces.native import load
from traces.tool_importers import import_blis, import_timed, import_vidur

VIDUR = Path(__file__).parents[3] / "shared/traces/vidur/arxiv_summarization_lengths.rows1-18000.csv.gz"


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def silent(_: str) -> None:
    pass


def test_vidur_with_times(tmp_path):
    text = "arrived_at,num_prefill_tokens,num_decode_tokens\n3.5,10,2\n4.25,20,3\n"
    trace = import_vidur(write(tmp_path, "v.csv", text), warn=silent)
    assert [(r.arrival_s, r.prompt_tokens, r.output_tokens) for r in trace.requests] == [
        (0.0, 10, 2),
        (0.75, 20, 3),
    ]
    with pytest.raises(TraceError, match="has its own arrivals"):
        import_vidur(tmp_path / "v.csv", rate_rps=1.0)


def test_vidur_without_times_needs_a_rate(tmp_path):
    rows = "".join(f"{10 + j},2\n" for j in range(4000))
    path = write(tmp_path, "v.csv", "num_prefill_tokens,num_decode_tokens\n" + rows)
    with pytest.raises(TraceError, match="--rate"):
        import_vidur(path)
    one, two, other = (import_vidur(path, 5.0, seed) for seed in (1, 1, 2))
    assert (
        one.columns.arrival_s.tolist() == two.columns.arrival_s.tolist() != other.columns.arrival_s.tolist()
    )
    gaps = np.diff(one.columns.arrival_s)
    assert gaps.mean() == pytest.approx(0.2, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(1.0, abs=0.06)  # Poisson


@pytest.mark.skipif(not VIDUR.exists(), reason="the public traces are not part of the repository")
def test_vidurs_published_lengths():
    trace = import_vidur(VIDUR, 2.0)
    assert len(trace) == 18_000
    assert np.quantile(trace.columns.prompt_tokens, 0.5) == 2715
    assert trace.columns.output_tokens.mean() == pytest.approx(297, abs=1)


def test_blis(tmp_path):
    text = (
        "request_id,arrival_time_us,input_tokens,output_tokens,adapter\n7,1000000,5,6,sql\n8,1500000,7,8,\n"
    )
    trace = import_blis(write(tmp_path, "b.csv", text), warn=silent)
    assert [(r.arrival_s, r.prompt_tokens, r.output_tokens, r.adapter) for r in trace.requests] == [
        (0.0, 5, 6, "sql"),
        (0.5, 7, 8, None),
    ]
    with pytest.raises(TraceError, match=r"b2.csv:2: input_tokens must be a number"):
        import_blis(write(tmp_path, "b2.csv", "arrival_time_us,input_tokens,output_tokens\n1,x,2\n"))
    with pytest.raises(TraceError, match="column arrival_time_us is missing"):
        import_blis(write(tmp_path, "b3.csv", "input_tokens,output_tokens\n1,2\n"))


def test_vllms_timed_trace(tmp_path):
    text = '{"timestamp": 2.0, "input_length": 5, "output_length": 6, "lora_name": "a"}\n{"timestamp": 4, "prompt_len": 9, "output_len": 1}\n'
    trace = import_timed(write(tmp_path, "t.jsonl", text), warn=silent)
    assert [(r.arrival_s, r.prompt_tokens, r.output_tokens, r.adapter) for r in trace.requests] == [
        (0.0, 5, 6, "a"),
        (2.0, 9, 1, None),
    ]
    assert import_timed(tmp_path / "t.jsonl", "ms", warn=silent).duration_s == pytest.approx(0.002)
    for row, message in (
        ('{"timestamp": 1, "output_length": 2}', "prompt_tokens is missing: none of input_length"),
        ('{"timestamp": "1", "input_length": 2, "output_length": 2}', "timestamp must be a finite number"),
        ('{"timestamp": 1, "input_length": 0, "output_length": 2}', "prompt_tokens"),
    ):
        with pytest.raises(TraceError, match=message):
            import_timed(write(tmp_path, "bad.jsonl", row + "\n"), warn=silent)


def test_the_command_takes_them_and_refuses_options_of_others(tmp_path, capsys):
    path = write(tmp_path, "v.csv", "num_prefill_tokens,num_decode_tokens\n5,2\n6,2\n")
    out = tmp_path / "out.jsonl"
    assert main(["import", "vidur", str(path), "--rate", "3", "--out", str(out)]) == 0
    assert [request.prompt_tokens for request in load(out).requests] == [5, 6]
    for arguments, message in (
        (["import", "vidur", str(path), "--rate", "0"], "--rate (=0.0) must be above 0"),
        (["import", "vidur", str(path), "--time-unit", "ms"], "--time-unit is for"),
        (["import", "blis", str(path), "--spread"], "--spread is for"),
        (["import", "azure", str(path), "--rate", "2"], "--rate is for vidur"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
