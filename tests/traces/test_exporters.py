"""What other tools' benchmarks are given: times in their unit, and blocks for every prompt."""

import json

from traces import Trace, TraceRequest, save
from traces.__main__ import main
from traces.importers import import_mooncake

TRACE = Trace(
    [
        TraceRequest(
            id=0, arrival_s=0.0, prompt_tokens=1200, output_tokens=7, adapter="a", prefix_blocks=(0, 5)
        ),
        TraceRequest(id=1, arrival_s=1.2345, prompt_tokens=100, output_tokens=1, prefix_blocks=(0, 9)),
        TraceRequest(id=2, arrival_s=2.0, prompt_tokens=513, output_tokens=3),
    ]
)


def test_both_forms(tmp_path, capsys) -> None:
    save(TRACE, tmp_path / "t.jsonl")
    assert main(["export", "vllm", str(tmp_path / "t.jsonl")]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["timestamp"] for row in rows] == [0.0, 1.2345, 2.0]
    assert [row["hash_ids"] for row in rows] == [[0, 5, 10], [0], [11, 12]]  # what is missing nobody shares
    assert (rows[0]["adapter"], "adapter" in rows[1], rows[2]["input_length"]) == ("a", False, 513)
    out = tmp_path / "m.jsonl"
    assert main(["export", "mooncake", str(tmp_path / "t.jsonl"), "--out", str(out)]) == 0
    back = import_mooncake(out)
    assert [request.arrival_s for request in back.requests] == [0.0, 1.234, 2.0]
    assert [request.output_tokens for request in back.requests] == [7, 1, 3]
    assert main(["export", "mooncake", str(tmp_path / "t.jsonl"), "--out", str(out)]) == 2
