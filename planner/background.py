"""Tasks in processes of their own, so that whoever asked stays free: progress, cancelling, and answers kept by their key.

A task's process is sent the task on standard input, which then stays open as a lifeline: when this process ends, however it ends, the other
one sees it closed and ends with its own workers. It is also the leader of its process group, by which a cancelled task is ended whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, Literal

from planner.task import ROOT, Answer, Task

State = Literal["waiting", "running", "done", "failed", "cancelled"]
MODULE = "planner.task_process"
MOST_AT_ONCE = 2
MOST_KEPT = 128  # answers
MOST_WAITING = 16  # tasks


@dataclass(slots=True, kw_only=True, eq=False)
class Job:
    """A task and how far it is. stage, done, total: what it does now. error: one line, where it failed."""

    task: Task
    key: str
    state: State = "waiting"
    stage: str = "waiting for another search"
    done: int = 0
    total: int = 0
    started_at_s: float = 0.0
    took_s: float = 0.0
    answer: Answer | None = None
    error: str = ""
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def ended(self) -> bool:
        return self.state in ("done", "failed", "cancelled")

    @property
    def share(self) -> float:
        """How much of the stage is done."""
        return min(1.0, self.done / self.total) if self.total else 0.0


class Background:
    """Runs tasks, a few at a time, the others in the order they came. Safe to call from several threads."""

    def __init__(self, most: int = MOST_AT_ONCE, keep: int = MOST_KEPT) -> None:
        self._most = most
        self._keep = keep
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._lock = threading.RLock()

    def start(self, task: Task) -> Job:
        """Return the task's job, begun unless one with its key is under way or done. A full queue is a failed job."""
        key = task.key
        with self._lock:
            known = self._jobs.get(key)
            if known is not None and known.state in ("waiting", "running", "done"):
                return known
            job = Job(task=task, key=key)
            if sum(other.state == "waiting" for other in self._jobs.values()) >= MOST_WAITING:
                job.state, job.error = "failed", "too many searches are waiting; try again later"
                return job
            self._jobs[key] = job
            self._begin_waiting()
            return job

    def find(self, key: str) -> Job | None:
        """Return the job of a task's key."""
        with self._lock:
            job = self._jobs.get(key)
            if job is not None:
                self._jobs.move_to_end(key)
            return job

    def put(self, task: Task, answer: Answer) -> Job:
        """Keep an answer that came from elsewhere."""
        job = Job(task=task, key=task.key, state="done", answer=answer)
        with self._lock:
            self._jobs[job.key] = job
            self._forget()
        return job

    def cancel(self, key: str) -> None:
        """End a task that waits or runs."""
        with self._lock:
            job = self._jobs.get(key)
            if job is None or job.ended:
                return
            job.state = "cancelled"
            process = job.process
            self._begin_waiting()
        if process is not None:
            end_group(process)

    def close(self) -> None:
        """End everything."""
        with self._lock:
            keys = list(self._jobs)
        for key in keys:
            self.cancel(key)

    def _begin_waiting(self) -> None:
        """Begin the jobs for which there is room; the lock is held."""
        running = sum(job.state == "running" for job in self._jobs.values())
        for job in list(self._jobs.values()):
            if running >= self._most:
                return
            if job.state == "waiting":
                job.state, job.stage, job.started_at_s = "running", "starting", time.monotonic()
                threading.Thread(target=self._follow, args=(job,), daemon=True).start()
                running += 1

    def _follow(self, job: Job) -> None:
        try:
            process = _launch(job.task)
        except OSError as error:
            self._end(job, "failed", f"the search could not be started: {error.strerror}")
            return
        with self._lock:
            job.process = process
            cancelled = job.state == "cancelled"
        if cancelled:
            end_group(process)
        assert process.stdout is not None
        for line in process.stdout:
            self._heard(job, json.loads(line))
        process.stdout.close()
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        process.wait()
        self._end(job, "failed", f"the search ended unexpectedly (exit code {process.returncode})")

    def _heard(self, job: Job, said: dict[str, Any]) -> None:
        if "answer" in said:
            job.answer = said["answer"]
            self._end(job, "done")
        elif "error" in said:
            self._end(job, "failed", said["error"])
        else:
            job.stage, job.done, job.total = said["stage"], said["done"], said["total"]

    def _end(self, job: Job, state: State, error: str = "") -> None:
        with self._lock:
            if not job.ended:
                job.state, job.error = state, error
                job.took_s = time.monotonic() - job.started_at_s
            self._begin_waiting()
            self._forget()

    def _forget(self) -> None:
        """Keep the answers that were used last; the lock is held."""
        ended = [key for key, job in self._jobs.items() if job.ended]
        for key in ended[: max(0, len(ended) - self._keep)]:
            del self._jobs[key]


def _launch(task: Task) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-m", MODULE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        start_new_session=True,
    )
    sent = pickle.dumps(task)  # to our own process, by a pipe that nobody else has
    assert process.stdin is not None
    try:
        process.stdin.write(len(sent).to_bytes(8, "big") + sent)
        process.stdin.flush()
    except BrokenPipeError:
        pass  # it died: its end is told by what it did not say
    return process


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a task's process and the workers it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
