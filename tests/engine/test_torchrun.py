"""Commands under torchrun, on a CPU: as many processes as tp says serve together; any other number is one clear line."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.tiny import save_model, tiny_model
from traces.run_record import read_run

ROOT = Path(__file__).parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
CONFIG = {
    "backend": "reference",
    "dtype": "float32",
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,
    "max_model_len": 128,
    "page_tokens": 64,
    "num_pages": 60,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("torchrun")
    save_model(tiny_model("llama"), folder / "model")
    lines = [
        {"id": n, "arrival_s": 0.0, "prompt_tokens": 5 + n, "output_tokens": 4, "adapter": "a", "rank": 4}
        for n in range(6)
    ]
    (folder / "trace.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def start(folder, *command, **config):
    """Start a command of the engine under torchrun with two processes."""
    path = folder / "config.json"
    path.write_text(json.dumps(CONFIG | {"model": str(folder / "model")} | config))
    arguments = [sys.executable, *TORCHRUN, "-m", "engine", *command]
    if command[0] != "--help":
        arguments += ["--config", path]
    return subprocess.Popen(
        list(map(str, arguments)),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def torchrun(folder, *command, **config):
    """Run a command to its end."""
    with start(folder, *command, **config) as process:
        out, error = process.communicate(timeout=200)
    return subprocess.CompletedProcess(process.args, process.returncode, out, error)


def test_a_replay_runs_on_the_processes_that_torchrun_started(folder, tmp_path):
    done = torchrun(folder, "replay", "--trace", "trace.jsonl", "--out", tmp_path / "run", tp=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("requests") == 1, "one rank prints"
    record = read_run(tmp_path / "run")
    assert record.requests["finish_s"].notna().all() and len(record.requests) == 6


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"tp": 1}, r"error: WORLD_SIZE=2, tp=1: torchrun must start as many processes as tp says"),
        pytest.param(
            {"tp": 1, "replicas": 2},
            r"error: torchrun runs one replica, replicas=2: .*",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_another_number_of_processes_is_one_line(folder, tmp_path, config, line):
    done = torchrun(folder, "replay", "--trace", "trace.jsonl", "--out", tmp_path / "run", **config)
    assert len(re.findall(rf"^{line}$", done.stderr, re.MULTILINE)) == 1, done.stderr
    assert re.search(r"rank\s*: 0 .*\n\s*exitcode\s*: 2 ", done.stderr), done.stderr
    assert "engine/" not in done.stderr, "a traceback of ours"


@pytest.mark.slow
def test_a_command_without_an_engine_lets_the_others_go(folder):
    done = torchrun(folder, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage") == 1


def pid_of_rank(rank, agent):
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment, status = (folder / "environ").read_bytes(), (folder / "status").read_text()
        except OSError:
            continue
        if f"RANK={rank}".encode() in environment.split(b"\0") and f"PPid:\t{agent}\n" in status:
            return int(folder.name)
    raise AssertionError(f"no rank {rank}")


@pytest.mark.slow
def test_a_rank_that_dies_ends_all_with_an_error(folder, tmp_path):
    trace = folder / "long.jsonl"
    line = {"id": 0, "arrival_s": 0.0, "prompt_tokens": 5, "output_tokens": 120}
    trace.write_text("".join(json.dumps(line | {"id": n, "arrival_s": n / 4}) + "\n" for n in range(400)))
    command = ("replay", "--trace", trace, "--out", tmp_path / "run")
    with start(folder, *command, tp=2) as process:
        said = ""
        for line in process.stderr:
            said += line
            if "replaying" in line:
                os.kill(pid_of_rank(1, process.pid), signal.SIGKILL)
        assert process.wait(60) == 1
    assert "exitcode  : -9" in said or "error: rank 1 is gone" in said, said
    assert not (tmp_path / "run" / "run.json").exists()
