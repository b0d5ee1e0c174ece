"""Runs independent jobs on all cores; the answers do not depend on how many there are."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from multiprocessing.context import BaseContext
from types import TracebackType
from typing import Any, Generic, TypeVar

from planner.deadline import Deadline

Job = TypeVar("Job")
Answer = TypeVar("Answer")

PRELOADED = ("planner.jobs", "sim.simulate", "sim.costs", "scipy.optimize", "scipy.interpolate")

_work: Callable[[Any], Any] | None = None  # in a worker process: what it was started for


def preload(count: int) -> None:
    """Begin to import what workers need, in a process that they are later forked from: beside what is done here until then."""
    if count > 1 and "forkserver" in multiprocessing.get_all_start_methods():
        _context()
        from multiprocessing import forkserver

        forkserver.ensure_running()


class Workers(Generic[Job, Answer]):
    """Processes that all hold one function, sent to each once; with `count` 1 it is called right here.

    timeout_s: from now on; jobs that are not done by then are given up. Use it in a `with` block: an
    exception (Ctrl-C too) ends the processes.
    """

    def __init__(self, work: Callable[[Job], Answer], count: int, timeout_s: float | None = None) -> None:
        self._work = work
        self._count = count
        self._deadline = Deadline(timeout_s)
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers[Job, Answer]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    @property
    def timed_out(self) -> bool:
        """Whether time is up."""
        return self._deadline.passed

    def run(
        self,
        jobs: Sequence[Job],
        on_done: Callable[[], None] = lambda: None,
        on_answer: Callable[[int, Answer], None] = lambda index, answer: None,
    ) -> list[Answer | None]:
        """Return the answers in the order of the jobs; None where time was up.

        on_done: called after each job; on_answer: before that, with the job's place and its answer.
        """
        if self._count == 1:
            return [self._run_here(index, job, on_done, on_answer) for index, job in enumerate(jobs)]
        if not jobs or self.timed_out:
            return [None] * len(jobs)
        futures = [self._started().submit(_call, job) for job in jobs]
        places = {future: index for index, future in enumerate(futures)}
        pending: set[Future[Answer]] = set(futures)
        while pending and not self.timed_out:
            done, pending = wait(pending, timeout=self._deadline.left_s, return_when="FIRST_COMPLETED")
            for future in done:
                on_answer(places[future], future.result())  # raises what the job raised
                on_done()
        if pending:
            self._stop()
        return [None if future in pending else future.result() for future in futures]

    def _run_here(
        self, index: int, job: Job, on_done: Callable[[], None], on_answer: Callable[[int, Answer], None]
    ) -> Answer | None:
        if self.timed_out:
            return None
        answer = self._work(job)
        on_answer(index, answer)
        on_done()
        return answer

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                self._count, mp_context=_context(), initializer=_start, initargs=(self._work,)
            )
        return self._pool

    def _stop(self) -> None:
        """End the processes now, whatever they do."""
        if self._pool is None:
            return
        ours = list((self._pool._processes or {}).values())
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in ours:
            process.terminate()
        for process in ours:
            process.join()
        self._pool = None


def cores() -> int:
    """Return how many processes can run at once."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _context() -> BaseContext:
    """Return how processes start. A fork of this one would copy whatever threads hold (a progress bar's, a web page's):

    they are forked from one without threads that has imported everything, or spawned where there is none.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


def _start(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches us too; the planner ends us


def _call(job: Any) -> Any:
    assert _work is not None
    return _work(job)
