"""Uploads: every format, told by its content; errors name the file as it was called, and the line; nothing of the server shows."""

import gzip
import json
import tempfile

import pytest

from engine.errors import UserError
from planner import trace_input
from planner.scenario import Scenario
from planner.trace_input import detect, digest, made, read_upload, sample
from traces.native import to_lines

NATIVE = [
    {"id": 0, "arrival_s": 0.0, "prompt_tokens": 5, "output_tokens": 6, "adapter": "a", "rank": 8},
    {"id": 1, "arrival_s": 1.5, "prompt_tokens": 7, "output_tokens": 8},
]


def lines(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


FILES = {
    "native": lines(NATIVE),
    "mooncake": lines(
        {"timestamp": 1000 * i, "input_length": 9, "output_length": 3, "hash_ids": [i]} for i in range(3)
    ),
    "vllm": lines({"timestamp": 0.5 * i, "input_length": 9, "output_length": 3} for i in range(3)),
    "azure": b"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,374,44\n2023-11-16 18:15:50.95,396,109\n",
    "burstgpt": b"Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    b"5,ChatGPT,472,18,490,Conversation log\n45,ChatGPT,1087,230,1317,Conversation log\n",
    "vidur": b"arrived_at,num_prefill_tokens,num_decode_tokens\n0.0,12,3\n2.5,10,4\n",
    "blis": b"arrival_time_us,input_tokens,output_tokens,adapter\n0,12,3,a\n1000000,10,4,b\n",
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("packed", [False, True])
def test_every_format_is_told_by_its_content(kind, packed) -> None:
    data = gzip.compress(FILES[kind], mtime=0) if packed else FILES[kind]
    upload = read_upload("my trace.jsonl", data)
    assert (upload.kind, len(upload.trace) >= 2, upload.trace.name) == (kind, True, "my trace")


def test_the_sample_comes_back_as_it_is() -> None:
    trace = sample()
    data = gzip.compress("".join(f"{line}\n" for line in to_lines(trace)).encode())
    assert digest(read_upload("sample.jsonl.gz", data).trace) == digest(trace)


def bad_line() -> bytes:
    return lines(NATIVE) + b'{"arrival_s": 2.0, "prompt_tokens": -3, "output_tokens": 1}\n'


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("../../etc/t.jsonl", bad_line(), "t.jsonl:3: prompt_tokens must be"),
        ("t.jsonl", lines(NATIVE) + b"{oops\n", "t.jsonl:3: not JSON"),
        ("t.gz", gzip.compress(bad_line(), mtime=0), "t.gz:3: prompt_tokens must be"),
        ("t.gz", gzip.compress(lines(NATIVE * 50), mtime=0)[:60], "t.gz: the gzip file is cut short"),
        ("t.csv", b"a,b\n1,2\n", "t.csv:1: the format cannot be told"),
        ("t.csv", FILES["azure"].replace(b"374", b"many"), "t.csv:2: ContextTokens must be a number"),
        ("t.jsonl", b"", "t.jsonl: is empty"),
        ("t.jsonl", lines(NATIVE[:1]), "t.jsonl: all requests arrive at one instant"),
        ("t.jsonl", b"\xff\xfe\x00{", "t.jsonl:1: the format cannot be told"),
    ],
)
def test_what_is_wrong_is_one_line_in_the_senders_words(name, data, said) -> None:
    with pytest.raises(UserError) as raised:
        read_upload(name, data)
    message = str(raised.value)
    assert message.startswith(said) and "\n" not in message
    assert tempfile.gettempdir() not in message and "loraplan-" not in message


def test_sizes_are_bounded(monkeypatch) -> None:
    monkeypatch.setattr(trace_input, "MOST_BYTES", 100)
    with pytest.raises(UserError, match=r"t: is larger than"):
        read_upload("t", b"x" * 101)
    monkeypatch.setattr(trace_input, "MOST_UNPACKED_BYTES", 1 << 20)
    monkeypatch.setattr(trace_input, "MOST_BYTES", 1 << 20)
    with pytest.raises(UserError, match=r"bomb.gz: unpacks to more than 1 MiB"):
        read_upload("bomb.gz", gzip.compress(b" " * (1 << 23)))


def test_a_format_that_is_chosen_is_taken() -> None:
    with pytest.raises(UserError, match=r"t:1: column ContextTokens is missing|t:1"):
        read_upload("t", FILES["vidur"], "azure")
    assert detect("") is None


def test_made_traces_are_what_was_asked() -> None:
    trace = made(
        Scenario(
            source="synthetic",
            requests=300,
            rate_rps=5.0,
            adapters=7,
            ranks="S1",
            lengths="uniform",
            prompt_low=10,
            prompt_high=20,
        )
    )
    assert (len(trace), set(trace.adapters.values())) == (300, {8})
    assert 10 <= trace.columns.prompt_tokens.min() <= trace.columns.prompt_tokens.max() < 20
    assert made(Scenario(source="synthetic", adapters=0)).adapters == {}
