"""Served requests as a trace that the other commands take."""

import json

import httpx2 as httpx
import numpy as np
import pytest

import traces
from engine.errors import UserError
from engine.sampling import GREEDY
from engine.server.recorder import TraceRecorder
from engine.server.tickets import Job, Ticket
from tests.engine.server.world import running
from traces.__main__ import main as traces_main


def ticket(number, arrived_s, *, tokens=3, prompt=4, served_as=None, rank=None, internal=None):
    job = Job(
        prompt=np.arange(prompt, dtype=np.int32) % 200,
        max_tokens=9,
        sampling=GREEDY,
        stop_tokens=frozenset(),
        adapter=internal or served_as,
        served_as=served_as,
        rank=rank,
    )
    made = Ticket(number, 0, job, None, arrived_s)
    made.num_tokens = tokens
    return made


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_are_in_order_of_arrival_whoever_ends_first(tmp_path):
    path = tmp_path / "t.jsonl"
    recorder = TraceRecorder(path)
    first, second, third = (ticket(i, 10.0 + i) for i in range(3))
    for one in (first, second, third):
        recorder.submitted(one)
    recorder.ended(second)
    assert path.read_text() == ""
    recorder.ended(first)
    assert [row["id"] for row in lines(path)] == [0, 1]
    recorder.ended(third)
    assert [row["arrival_s"] for row in lines(path)] == [0.0, 1.0, 2.0]
    assert len(traces.load(path)) == 3


def test_a_request_without_a_token_is_left_out_and_what_runs_at_the_end_does_not_hide_others(tmp_path):
    path = tmp_path / "t.jsonl"
    recorder = TraceRecorder(path)
    for number in range(4):
        recorder.submitted(ticket(number, float(number)))
    recorder.ended(ticket(1, 1.0, tokens=0))
    recorder.ended(ticket(3, 3.0))
    recorder.close()
    assert [row["id"] for row in lines(path)] == [3]


def test_an_adapter_replaced_by_one_of_another_rank_is_another_one_in_the_trace(tmp_path):
    path = tmp_path / "t.jsonl"
    recorder = TraceRecorder(path)
    for number, (rank, internal) in enumerate([(8, "a#1"), (8, "a#2"), (16, "a#3"), (8, "a#4")]):
        one = ticket(number, float(number), served_as="a", rank=rank, internal=internal)
        recorder.submitted(one)
        recorder.ended(one)
    assert [(row["adapter"], row["rank"]) for row in lines(path)] == [
        ("a", 8),
        ("a", 8),
        ("a#3", 16),
        ("a", 8),
    ]
    assert len(traces.load(path)) == 4


def test_prompts_that_begin_alike_have_the_same_blocks(tmp_path):
    path = tmp_path / "t.jsonl"
    recorder = TraceRecorder(path)
    for number, prompt in enumerate((1100, 600, 511)):
        one = ticket(number, float(number), prompt=prompt)
        recorder.submitted(one)
        recorder.ended(one)
    assert [row.get("prefix_blocks") for row in lines(path)] == [[0, 1], [0], None]


def test_a_trace_that_is_there_is_not_continued(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text("{}\n")
    with pytest.raises(UserError, match="holds a trace already"):
        TraceRecorder(path)
    with pytest.raises(UserError, match="cannot be written"):
        TraceRecorder(tmp_path / "none" / "t.jsonl")


def test_what_a_server_recorded_describes_its_traffic(world, tmp_path, capsys):
    path = tmp_path / "traffic.jsonl"
    body = {"prompt": "Hello", "max_tokens": 6, "temperature": 0}
    with (
        running(world.server(options={"record": path})) as process,
        httpx.Client(base_url=process.url) as http,
    ):
        for model in ("red", "tiny-base", "blue", "red"):
            http.post("/v1/completions", json=body | {"model": model}).raise_for_status()
        http.post("/v1/completions", json=body | {"model": "nobody"})
    trace = traces.load(path)
    assert trace.columns.prompt_tokens.tolist() == [5, 5, 5, 5]
    assert trace.columns.output_tokens.tolist() == [6, 6, 6, 6]
    assert trace.adapters == {"red": 8, "blue": 16}
    assert traces_main(["describe", str(path)]) == 0
    assert "4" in capsys.readouterr().out
