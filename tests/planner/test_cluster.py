"""Trials on a Dask cluster: a scheduler and two worker processes of this machine, one of which is lost on the way."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import pytest

from engine.errors import UserError
from planner.cli import main
from planner.cluster import ClusterWorkers
from traces import load, sample_path, save

ROOT = Path(__file__).parent.parent.parent


def square(number: int) -> int:
    time.sleep(0.2)
    return number * number


def test_no_cluster_is_one_line(monkeypatch) -> None:
    monkeypatch.setattr("planner.cluster.CONNECT_S", 0.5)
    with pytest.raises(UserError, match=r"--cluster tcp://127.0.0.1:9: no Dask cluster"):
        ClusterWorkers(square, "tcp://127.0.0.1:9")
    with pytest.raises(UserError, match="--cluster nonsense"):
        ClusterWorkers(square, "nonsense://")


def spawn(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


@contextmanager
def spawned_worker(address: str) -> Iterator[subprocess.Popen[str]]:
    """Run a worker process."""
    process = spawn("distributed.cli.dask_worker", address, "--nthreads", "1", "--no-dashboard", "--no-nanny")
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextmanager
def local_cluster(count: int) -> Iterator[tuple[str, list[subprocess.Popen[str]]]]:
    """Run a scheduler and worker processes; yield its address, and those."""
    with ExitStack() as stack:
        scheduler = spawn(
            "distributed.cli.dask_scheduler", "--port", "0", "--no-dashboard", "--host", "127.0.0.1"
        )
        stack.callback(scheduler.wait)
        stack.callback(scheduler.kill)
        assert scheduler.stderr is not None
        address = next(
            match[1] for line in scheduler.stderr if (match := re.search(r"(tcp://127\.0\.0\.1:\d+)", line))
        )
        yield address, [stack.enter_context(spawned_worker(address)) for _ in range(count)]


@pytest.fixture
def cluster() -> Iterator[tuple[str, list[subprocess.Popen[str]]]]:
    """A scheduler and two worker processes."""
    with local_cluster(2) as found:
        yield found


@pytest.mark.slow
def test_two_workers_and_the_loss_of_one(cluster) -> None:
    address, workers = cluster
    done = []

    def lose_one() -> None:
        done.append(1)
        if len(done) == 3:
            workers[0].send_signal(signal.SIGKILL)

    with ClusterWorkers(square, address) as jobs:
        jobs._client.wait_for_workers(2, timeout=30)
        assert jobs.run(list(range(20)), lose_one) == [number * number for number in range(20)]
        assert len(done) == 20 and not jobs.timed_out
    with ClusterWorkers(square, address, timeout_s=0.5) as jobs:
        answers = jobs.run(list(range(20)))
        assert None in answers and jobs.timed_out


@pytest.mark.slow
def test_what_is_called_is_sent_again_when_its_only_holder_is_lost() -> None:
    with (
        local_cluster(1) as (address, workers),
        ClusterWorkers(square, address) as jobs,
        spawned_worker(address),
    ):
        jobs._client.wait_for_workers(2, timeout=30)
        workers[0].send_signal(signal.SIGKILL)
        assert jobs.run(list(range(8))) == [number * number for number in range(8)]


@pytest.mark.slow
def test_a_plan_on_a_cluster_that_loses_a_worker_is_the_local_one(cluster, tmp_path) -> None:
    """The whole command; the worker is killed while trials are under way."""
    address, workers = cluster
    trace = tmp_path / "trace.jsonl"
    save(load(sample_path()).head(600), trace)
    given = [
        sys.executable,
        "-m",
        "planner",
        "--trace",
        str(trace),
        "--gpus",
        "2",
        "--max-num-seqs",
        "64,128",
    ]
    given += ["--max-num-batched-tokens", "1024,2048", "--format", "json", "--quiet"]
    plan = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, check=False)
    local = plan([*given, "--workers", "2", "--output-dir", str(tmp_path / "local")])
    assert local.returncode == 0, local.stderr
    journal = tmp_path / "far" / "journal.jsonl"
    with subprocess.Popen(
        [*given, "--cluster", address, "--output-dir", str(tmp_path / "far")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as far:
        while far.poll() is None and not (journal.exists() and journal.read_text().count("\n") >= 4):
            time.sleep(0.05)
        assert far.poll() is None, "it was over before a worker could be lost"
        workers[0].send_signal(signal.SIGKILL)
        out, err = far.communicate(timeout=300)
    assert (far.returncode, err) == (0, "")
    assert json.loads(out) == json.loads(local.stdout)
    same = [(tmp_path / name / "recommended.json").read_bytes() for name in ("local", "far")]
    assert same[0] == same[1]


def test_no_cluster_ends_the_command_in_one_line(monkeypatch, capsys) -> None:
    monkeypatch.setattr("planner.cluster.CONNECT_S", 0.5)
    given = ["--trace", str(sample_path()), "--gpus", "1", "--cluster", "tcp://127.0.0.1:9", "--quiet"]
    assert main(given) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert said.err.startswith(
        "error: --cluster tcp://127.0.0.1:9: no Dask cluster with workers answers there"
    )
