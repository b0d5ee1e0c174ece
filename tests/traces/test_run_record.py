import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from traces import TraceError
from traces.run_record import REQUEST_COLUMNS, RunRecord, check_free, find_runs, read_run, write_run


def record(**run: Any) -> RunRecord:
    rows = [
        (0, 0.0, 0.1, 0.30000049, 1.5, 10, 20, "a0001", 8, 0.05, 0, 0),
        (1, 0.5, 0.6, np.nan, np.nan, 7, 9, None, None, 0.0, 2, 4),
    ]
    steps = pd.DataFrame(
        {
            "start_s": [0.1, 0.2],
            "decodes": np.array([3, 4]),
            "chunks": [[512, 0], [128]],
            "graph": [True, False],
        }
    )
    return RunRecord(
        run={"backend": "triton", "tiny": 1.5e-9} | run,
        requests=pd.DataFrame(rows, columns=pd.Index(REQUEST_COLUMNS)),
        steps=steps,
    )


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    write_run(
        tmp_path / "deep" / "run", record(sizes=np.array([1, 2]), share=np.float64(0.5), nothing=float("nan"))
    )
    again = read_run(tmp_path / "deep" / "run")
    assert again.run == {"backend": "triton", "tiny": 1.5e-9, "sizes": [1, 2], "share": 0.5, "nothing": None}
    assert list(again.requests.columns) == list(REQUEST_COLUMNS)
    assert again.requests["first_token_s"].tolist()[0] == 0.3
    assert again.requests["first_token_s"].isna().tolist() == [False, True]
    assert again.requests["adapter"].isna().tolist() == [False, True]
    assert again.requests["preemptions"].tolist() == [0, 2]
    assert again.steps.to_dict("list") == {
        "start_s": [0.1, 0.2],
        "decodes": [3, 4],
        "chunks": [[512, 0], [128]],
        "graph": [True, False],
    }
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["run"]


def test_a_record_from_before_prefix_caching_has_no_cached_tokens(tmp_path: Path) -> None:
    write_run(tmp_path / "run", record())
    file = tmp_path / "run" / "requests.jsonl.gz"
    rows = [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]
    for row in rows:
        del row["cached_tokens"]
    file.write_bytes(gzip.compress("\n".join(json.dumps(row) for row in rows).encode()))
    assert read_run(tmp_path / "run").requests["cached_tokens"].tolist() == [0, 0]


def test_prefix_blocks_are_kept(tmp_path: Path) -> None:
    full = record()
    requests = full.requests.assign(prefix_blocks=pd.Series([(0, 5), None], dtype=object))
    write_run(tmp_path / "run", RunRecord(run={}, requests=requests, steps=full.steps))
    assert read_run(tmp_path / "run").requests["prefix_blocks"].tolist() == [[0, 5], None]


def test_a_record_without_rows_comes_back_empty(tmp_path: Path) -> None:
    full = record()
    write_run(tmp_path / "run", RunRecord(run={}, requests=full.requests.head(0), steps=full.steps.head(0)))
    again = read_run(tmp_path / "run")
    assert (len(again.requests), len(again.steps)) == (0, 0)
    assert list(again.steps.columns) == ["start_s", "decodes", "chunks", "graph"]


def test_only_an_empty_or_new_folder_is_written(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "empty", record())
    with pytest.raises(TraceError, match="the output folder is not empty"):
        write_run(tmp_path / "empty", record())
    (tmp_path / "file").touch()
    with pytest.raises(TraceError, match="is a file, not a folder"):
        check_free(tmp_path / "file")


def test_a_record_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_run(tmp_path / "run", record(strange=object()))
    (tmp_path / "file").touch()
    with pytest.raises(TraceError, match="cannot be written"):
        write_run(tmp_path / "file" / "run", record())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_requests_need_their_columns() -> None:
    with pytest.raises(TraceError, match="must have the column scheduled_s"):
        RunRecord(run={}, requests=record().requests.drop(columns="scheduled_s"), steps=pd.DataFrame())


def test_find_runs_passes_over_what_is_still_being_written(tmp_path: Path) -> None:
    for name in ("b", "a/inner", ".c.12.tmp"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "run.json").write_text("{}")
    assert find_runs(tmp_path) == [tmp_path / "a" / "inner", tmp_path / "b"]
    assert find_runs(tmp_path / "b") == [tmp_path / "b"]
    with pytest.raises(TraceError, match="no such folder"):
        find_runs(tmp_path / "none")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("run.json", "{", "run.json: not JSON"),
        ("run.json", "[]", "run.json: not a JSON object but list"),
        ("steps.jsonl.gz", "", "steps.jsonl.gz: is empty"),
        ("steps.jsonl.gz", "[1]\n", "steps.jsonl.gz:1: must be an object with the list `columns`"),
        (
            "steps.jsonl.gz",
            '{"columns": ["a"]}\n[1]\n[1, 2]\n',
            "steps.jsonl.gz:3: must be a list of 1 values",
        ),
        ("steps.jsonl.gz", '{"columns": ["a"]}\n[1\n', "steps.jsonl.gz:2: not JSON"),
        ("requests.jsonl.gz", '{"id": 1}\n', "requests.jsonl.gz: column arrival_s is missing"),
    ],
)
def test_a_damaged_record_is_named(tmp_path: Path, file: str, text: str, message: str) -> None:
    write_run(tmp_path / "run", record())
    (tmp_path / "run" / file).unlink()
    (tmp_path / "run" / file.removesuffix(".gz")).write_text(text)
    if file.endswith(".gz"):
        (tmp_path / "run" / file).write_bytes(gzip.compress(text.encode()))
    with pytest.raises(TraceError) as caught:
        read_run(tmp_path / "run")
    assert message in str(caught.value)


def test_steps_are_stored_by_column(tmp_path: Path) -> None:
    write_run(tmp_path / "run", record())
    lines = gzip.decompress((tmp_path / "run" / "steps.jsonl.gz").read_bytes()).decode().splitlines()
    assert json.loads(lines[0]) == {"columns": ["start_s", "decodes", "chunks", "graph"]}
    assert lines[1] == "[0.1,3,[512,0],true]"
