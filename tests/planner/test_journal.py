"""Answers survive a kill, and the search that goes on from them ends the same."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from engine.adapter import adapters_of_trace
from engine.errors import UserError
from planner.jobs import Challenge, ProbeJob, Runner
from planner.journal import Journal, decoded, encoded, key_of, read_answers
from planner.output import OutputFolder, check_folder
from planner.probe import Prober
from planner.retraining import Retraining
from planner.search import search
from planner.space import Space
from planner.workers import Workers
from planner.workload import Workload
from tests.planner.fake import FakePrice, even_trace, simulate
from tests.sim.synthetic import profile_json
from traces import save
from traces.metrics import Slo

ROOT = Path(__file__).parent.parent.parent
SMALL = Space(
    gpus=2, tp=(1, 2), lora_sharding=("replicated",), policies={"scheduler": ("fcfs", "fair")}, routing={}
)


def prober() -> Prober:
    trace = even_trace(25.0)
    return Prober(
        workload=Workload.of(trace),
        slo=Slo(),
        adapters=adapters_of_trace(trace.adapters),
        price=FakePrice(1e-4),
        simulate=simulate,
    )


def found_with(journal: Journal | None, calls: list[int] | None = None):
    asks = prober()
    runner = Runner(asks)

    def work(job):
        if calls is not None:
            calls.append(1)
        return runner(job)

    with Workers(work, 1) as workers:
        jobs = workers if journal is None else journal.over(workers)
        return search(SMALL, asks, jobs)


def rows(found) -> list[dict[str, Any]]:
    return [trial.to_json() for trial in found.trials.values()]


def test_answers_come_back_digit_for_digit() -> None:
    asks = prober()
    config = Space(gpus=1).base.with_changes(max_num_batched_tokens=2048, max_num_seqs=128)
    for job in (
        Challenge(config=config, piece="window", rate_rps=9.0),
        Challenge(config=config, piece="window", rate_rps=90.0),
        ProbeJob(config=config),
    ):
        answer = job.run(asks)
        again = decoded(json.loads(json.dumps(encoded(answer), default=lambda value: value.item())))
        assert repr(again) == repr(answer)
    item = Retraining(change="half the rank", config=config, now_rps=1 / 3, then_rps=0.5)
    assert decoded(json.loads(json.dumps(encoded(item)))) == item


def test_a_search_goes_on_from_any_prefix_of_its_journal(tmp_path) -> None:
    whole = rows(found_with(None))
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, tmp_path / "trials.jsonl")
    calls: list[int] = []
    assert rows(found_with(journal, calls)) == whole
    journal.close()
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == len(calls)
    for kept in (1, len(lines) // 2):
        path.write_bytes(b"".join(lines[:kept]) + (lines[kept][:40] if kept < len(lines) else b""))
        journal = Journal(path, tmp_path / "trials.jsonl")
        assert journal.answers == kept
        calls.clear()
        assert rows(found_with(journal, calls)) == whole
        assert len(calls) == len(lines) - kept
        journal.close()
        assert len(read_answers(path)) == len(lines)


def test_jobs_that_differ_have_other_keys() -> None:
    config = Space(gpus=1).base
    keys = {
        key_of(job)
        for job in (
            Challenge(config=config, piece="window", rate_rps=1.0),
            Challenge(config=config, piece="screen", rate_rps=1.0),
            Challenge(config=config, piece="window", rate_rps=1.0000001),
            Challenge(config=config.with_changes(scheduler="fair"), piece="window", rate_rps=1.0),
            ProbeJob(config=config),
        )
    }
    assert len(keys) == 5


def test_one_plan_at_a_time_in_a_folder(tmp_path) -> None:
    with (
        OutputFolder(tmp_path / "out", {"a": 1}, overwrite=False),
        pytest.raises(UserError, match="another plan is being made"),
    ):
        OutputFolder(tmp_path / "out", {"a": 1}, overwrite=False)


def test_a_folder_of_something_else_is_left_alone(tmp_path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="no earlier plan"):
            check_folder(tmp_path, overwrite=overwrite)


def test_the_beginning_of_another_plan_is_not_resumed(tmp_path) -> None:
    folder = tmp_path / "out"
    OutputFolder(folder, {"a": 1}, overwrite=False).journal.close()
    (folder / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="another question"):
        OutputFolder(folder, {"a": 2}, overwrite=False)
    with OutputFolder(folder, {"a": 2}, overwrite=True) as output:
        output.finish({"plan": 1}, {"alternatives/1.json": "{}\n"})
    assert json.loads((folder / "plan.json").read_text()) == {"plan": 1}
    assert (folder / "mine.txt").read_text() == "precious" and not (folder / "journal.jsonl").exists()


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="kills")
def test_kill_9_at_any_moment_resumes_to_the_same_plan(tmp_path) -> None:
    (tmp_path / "profile.json").write_text(json.dumps(profile_json()))
    save(even_trace(4.0, count=600, prompt=300, output=30), tmp_path / "trace.jsonl")

    def command(out: Path) -> list[str]:
        given = [
            "--trace",
            str(tmp_path / "trace.jsonl"),
            "--gpus",
            "2",
            "--profile",
            str(tmp_path / "profile.json"),
        ]
        limits = ["--max-num-seqs", "128", "--max-num-batched-tokens", "1024", "--workers", "2", "--quiet"]
        return [sys.executable, "-m", "planner", *given, *limits, "--output-dir", str(out)]

    began_s = time.monotonic()
    assert subprocess.run(command(tmp_path / "whole"), cwd=ROOT, capture_output=True).returncode == 0
    took_s = time.monotonic() - began_s
    killed, rng, out = 0, random.Random(7), tmp_path / "killed"
    for _ in range(6):
        with subprocess.Popen(
            command(out),
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ) as process:
            try:
                process.wait(timeout=rng.uniform(0.2, 0.9) * took_s)
                break
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                killed += 1
    assert killed > 0
    if not (out / "plan.json").exists():
        assert subprocess.run(command(out), cwd=ROOT, capture_output=True).returncode == 0
    for name in ("plan.json", "recommended.json", "trials.jsonl", "report.html"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (out / "journal.jsonl").exists()
