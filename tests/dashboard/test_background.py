"""Tasks in processes of their own: progress, errors, cancelling, order."""

import os
import time

import pytest

from planner import background
from planner.background import Background, Job
from planner.scenario import Scenario
from planner.task import Task, code_version, plain_json
from tests.planner.fake import even_trace
from traces import Trace

TRACE = even_trace(4.0, count=12, prompt=30, output=3)


@pytest.fixture
def searches(monkeypatch):
    monkeypatch.setattr(background, "MODULE", "tests.dashboard.fake_process")
    found = Background(most=1)
    yield found
    found.close()


def task(seed: int = 0, *, kind="plan", trace: Trace = TRACE, **scenario) -> Task:
    return Task(
        kind=kind, scenario=Scenario(source="synthetic", seed=seed, **scenario), trace=trace, config=None
    )


def distinct(seed: int) -> Task:
    """A task of its own key: the seed alone makes none, the trace that it makes does."""
    return task(seed, gpus=seed + 1)


def wait(job: Job, until=lambda job: job.ended, most_s: float = 30.0) -> Job:
    ends_at_s = time.monotonic() + most_s
    while not until(job) and time.monotonic() < ends_at_s:
        time.sleep(0.02)
    return job


def test_an_answer_is_kept_by_its_key(searches) -> None:
    job = wait(searches.start(distinct(0)))
    assert (job.state, job.answer, job.stage, job.done, job.total) == (
        "done",
        {"requests": 12},
        "counting",
        1,
        4,
    )
    assert searches.start(distinct(0)) is job
    assert searches.find(job.key) is job


def test_an_error_is_one_line_and_may_be_tried_again(searches) -> None:
    job = wait(searches.start(distinct(1)))
    assert (job.state, job.error) == ("failed", "trace.jsonl:3: not JSON")
    assert searches.start(distinct(1)) is not job


def test_a_process_that_dies_is_told(searches) -> None:
    job = wait(searches.start(distinct(3)))
    assert (job.state, job.error) == ("failed", "the search ended unexpectedly (exit code 9)")


def test_cancelling_ends_the_process_and_lets_the_next_one_begin(searches) -> None:
    first, second = searches.start(distinct(2)), searches.start(distinct(0))
    wait(first, lambda job: job.total == 4)
    assert (first.state, second.state) == ("running", "waiting")
    searches.cancel(first.key)
    wait(second)
    assert (first.state, second.state) == ("cancelled", "done")
    wait(first, lambda job: job.process is not None and job.process.poll() is not None)
    with pytest.raises(ProcessLookupError):
        os.killpg(first.process.pid, 0)


def test_too_many_that_wait_are_refused(searches, monkeypatch) -> None:
    monkeypatch.setattr(background, "MOST_WAITING", 1)
    searches.start(distinct(2))
    searches.start(distinct(5))
    refused = searches.start(distinct(6))
    assert (refused.state, refused.error) == ("failed", "too many searches are waiting; try again later")


def test_old_answers_are_forgotten() -> None:
    searches = Background(keep=2)
    keys = [searches.put(distinct(seed), {}).key for seed in range(4)]
    assert [searches.find(key) is not None for key in keys] == [False, False, True, True]


def test_a_task_is_known_by_what_decides_its_answer() -> None:
    base = Task(kind="plan", scenario=Scenario(), trace=TRACE)
    same_trace = Task(
        kind="plan",
        scenario=Scenario(source="upload", upload="x"),
        trace=even_trace(4.0, count=12, prompt=30, output=3),
        usd_per_gpu_hour=3.0,
    )
    assert base.key == same_trace.key
    others = [
        Task(kind="curve", scenario=Scenario(), trace=TRACE),
        Task(kind="plan", scenario=Scenario(gpus=4), trace=TRACE),
        Task(kind="plan", scenario=Scenario(ttft_ms=400.0), trace=TRACE),
        Task(kind="plan", scenario=Scenario(), trace=TRACE.scaled(2)),
    ]
    assert len({base.key, *(other.key for other in others)}) == 5


def test_json_holds_no_nan() -> None:
    assert plain_json({"a": [1.0, float("nan")], "b": (float("inf"), None)}) == {
        "a": [1.0, None],
        "b": [None, None],
    }


def test_the_version_of_the_code_is_of_all_that_answers_come_from(monkeypatch) -> None:
    from planner import task as module

    sources = {str(path.relative_to(module.ROOT)) for path in module._sources("planner.answers")}
    assert {"planner/answers.py", "planner/search.py", "sim/costs.py", "engine/scheduler.py"} <= sources
    assert not any(path.startswith(("planner/dashboard", "kernels")) for path in sources)
    assert code_version() == code_version.__wrapped__()
