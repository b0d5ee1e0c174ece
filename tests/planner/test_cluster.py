"""Trials on a Dask cluster: a scheduler and two worker processes of this machine, one of which is lost on the way."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.errors import UserError
from planner.cluster import ClusterWorkers

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


@pytest.mark.slow
def test_two_workers_and_the_loss_of_one() -> None:
    started = [
        spawn("distributed.cli.dask_scheduler", "--port", "0", "--no-dashboard", "--host", "127.0.0.1")
    ]
    try:
        assert started[0].stderr is not None
        address = next(
            match[1] for line in started[0].stderr if (match := re.search(r"(tcp://127\.0\.0\.1:\d+)", line))
        )
        worker = ("distributed.cli.dask_worker", address, "--nthreads", "1", "--no-dashboard", "--no-nanny")
        started += [spawn(*worker), spawn(*worker)]
        done = []

        def lose_one() -> None:
            done.append(1)
            if len(done) == 3:
                started[1].send_signal(signal.SIGKILL)

        with ClusterWorkers(square, address) as jobs:
            jobs._client.wait_for_workers(2, timeout=30)
            assert jobs.run(list(range(20)), lose_one) == [number * number for number in range(20)]
            assert len(done) == 20 and not jobs.timed_out
        with ClusterWorkers(square, address, timeout_s=0.5) as jobs:
            answers = jobs.run(list(range(20)))
            assert None in answers and jobs.timed_out
    finally:
        for process in started:
            process.kill()
            process.wait()
