"""Runs independent jobs on an existing Dask cluster, for sweeps that outgrow a machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Generic, TypeVar

from engine.errors import UserError

Job = TypeVar("Job")
Answer = TypeVar("Answer")

CONNECT_S = 10.0
RETRIES = 5  # of a job whose worker was lost


class ClusterWorkers(Generic[Job, Answer]):
    """As `planner.workers.Workers`, on the workers of a cluster. A job whose worker is lost runs on another.

    Raises UserError where Dask is not installed or no cluster answers at the address. Raises RuntimeError where the last worker is lost.
    """

    def __init__(self, work: Callable[[Job], Answer], address: str, timeout_s: float | None = None) -> None:
        self._ends_at_s = None if timeout_s is None else time.monotonic() + timeout_s
        self._client = _connect(address)
        self._address = address
        # Workers of the cluster import the planner themselves: it has to be installed there.
        self._work = self._client.scatter(work, broadcast=True, hash=False)

    def __enter__(self) -> ClusterWorkers[Job, Answer]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    @property
    def timed_out(self) -> bool:
        """Whether time is up."""
        return self._ends_at_s is not None and time.monotonic() >= self._ends_at_s

    def run(
        self,
        jobs: Sequence[Job],
        on_done: Callable[[], None] = lambda: None,
        on_answer: Callable[[int, Answer], None] = lambda index, answer: None,
    ) -> list[Answer | None]:
        """Return the answers in the order of the jobs; None where time was up."""
        if not jobs or self.timed_out:
            return [None] * len(jobs)
        futures = [self._client.submit(_call, self._work, job, pure=False, retries=RETRIES) for job in jobs]
        answers: list[Answer | None] = [None] * len(jobs)
        pending = set(range(len(jobs)))
        while pending and not self.timed_out:
            for index in sorted(index for index in pending if futures[index].done()):
                answers[index] = answer = self._answer(futures[index])
                pending.remove(index)
                on_answer(index, answer)
                on_done()
            if pending:
                self._check()
                time.sleep(0.02)
        for index in pending:
            futures[index].cancel()
        return answers

    def _answer(self, future: Any) -> Answer:
        from distributed import KilledWorker

        try:
            answer: Answer = future.result()
        except KilledWorker as error:
            raise RuntimeError(f"{self._address}: workers of the cluster die over a trial: {error}") from None
        return answer

    def _check(self) -> None:
        if self._client.status != "running":
            raise RuntimeError(f"{self._address}: the cluster is gone")


def _connect(address: str) -> Any:
    try:
        import distributed
    except ImportError:
        raise UserError("--cluster needs Dask: pip install 'loraplan[cluster]' -c constraints.txt") from None
    try:
        connect: Any = distributed.Client  # has no types
        client = connect(address, timeout=CONNECT_S, set_as_default=False)
        client.wait_for_workers(1, timeout=CONNECT_S)
    except (OSError, TimeoutError, ValueError) as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(
            f"--cluster {address}: no Dask cluster with workers answers there: {reason}"
        ) from None
    return client


def _call(work: Callable[[Any], Any], job: Any) -> Any:
    return work(job)
