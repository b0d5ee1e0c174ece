"""`python -m engine serve` as a process: it says where it listens, drains on SIGTERM, and refuses bad input in one line."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx2 as httpx

import traces
from engine.__main__ import main

ROOT = Path(__file__).parents[3]


@contextlib.contextmanager
def serving(world, *options):
    """Run the command on a free port; yield the process and a client."""
    command = [
        *(sys.executable, "-m", "engine", "serve", "--config", world.folder / "config.json"),
        *("--adapters", world.folder / "adapters.jsonl", "--adapter-dir", world.adapter_dir),
        *("--port", "0", *options),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        list(map(str, command)), cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            address = next(found[1] for line in process.stderr if (found := re.search(r"(http://\S+)", line)))
            # What it says further on is read too, so that it never waits for us.
            threading.Thread(target=process.stderr.read, daemon=True).start()
            with httpx.Client(base_url=address, timeout=60) as http:
                yield process, http
        finally:
            process.kill()


BODY = {"model": "red", "prompt": "Hello", "max_tokens": 200, "temperature": 0}


def test_sigterm_lets_what_runs_finish_and_takes_nobody_new(world, tmp_path):
    record = tmp_path / "traffic.jsonl"
    with serving(world, "--record", record) as (process, http):
        results = {}

        def ask(name):
            results[name] = http.post("/v1/completions", json=BODY | {"model": name}).json()

        with http.stream("POST", "/v1/completions", json=BODY | {"stream": True}) as stream:
            lines = stream.iter_lines()
            next(lines)
            thread = threading.Thread(target=ask, args=("blue",))
            thread.start()
            while (
                'num_requests_running{engine="0",model_name="tiny-base"} 2.0' not in http.get("/metrics").text
            ):
                pass
            process.send_signal(signal.SIGTERM)
            while http.get("/health").status_code == 200:
                pass
            refused = http.post("/v1/completions", json=BODY)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutdown")
            assert "Retry-After" in refused.headers
            events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        thread.join()
        assert process.wait(30) == 0
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    assert results["blue"]["usage"]["completion_tokens"] == 200
    assert results["blue"]["choices"][0]["text"] == world.text("blue", "Hello", 200)
    assert traces.load(record).columns.output_tokens.tolist() == [200, 200]


def test_a_crash_leaves_whole_lines(world, tmp_path):
    record = tmp_path / "traffic.jsonl"
    with serving(world, "--record", record) as (process, http):
        for _ in range(3):
            http.post("/v1/completions", json=BODY | {"max_tokens": 3}).raise_for_status()
        with http.stream("POST", "/v1/completions", json=BODY | {"stream": True}) as stream:
            next(stream.iter_lines())
            process.kill()
            process.wait(30)
    assert len(traces.load(record)) == 3


def fails(capsys, arguments, message):
    assert main(["serve", *map(str, arguments)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert message in lines[-1]


def test_bad_options_are_one_line(world, tmp_path, capsys):
    config = ("--config", world.folder / "config.json")
    bad_keys, plain = tmp_path / "keys.json", tmp_path / "plain"
    bad_keys.write_text("{}")
    plain.mkdir()
    fails(capsys, [*config, "--adapter-dir", tmp_path / "none"], "no such folder")
    fails(capsys, [*config, "--max-queue", "-1"], "max_queue=-1 must be at least 0")
    fails(capsys, [*config, "--port", "70000"], "--port")
    fails(capsys, [*config, "--api-keys", bad_keys], "must be a JSON object of API keys")
    fails(capsys, [*config, "--record", tmp_path / "none" / "x"], "cannot be written")
    fails(capsys, [*config, "--model", plain], "config.json")
    fails(capsys, [*config, "--tokenizer", plain], "no tokenizer can be read")
    fails(capsys, [*config, "--host", "256.0.0.1"], "cannot listen there")
    fails(capsys, ["--config", tmp_path / "none.json"], "cannot be read")
