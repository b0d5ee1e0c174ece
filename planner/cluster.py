"""Runs independent jobs on an existing Dask cluster, for sweeps that outgrow a machine."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Generic, TypeVar

from engine.errors import UserError
from planner.deadline import Deadline

Job = TypeVar("Job")
Answer = TypeVar("Answer")

CONNECT_S = 10.0
ADDRESS = r"([a-z]+://)?[^/\s]+:\d+"
RETRIES = 5  # of a job whose worker was lost


class ClusterWorkers(Generic[Job, Answer]):
    """As `planner.workers.Workers`, on the workers of a cluster. A job whose worker is lost runs on another.

    Raises UserError where Dask is not installed or no cluster answers at the address. Raises RuntimeError where the last worker is lost.
    """

    def __init__(self, work: Callable[[Job], Answer], address: str, timeout_s: float | None = None) -> None:
        self._deadline = Deadline(timeout_s)
        self._client = _connect(address)
        self._address = address
        self._work = work
        self._sent = self._send()

    def __enter__(self) -> ClusterWorkers[Job, Answer]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

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
        """Return the answers in the order of the jobs; None where time was up."""
        if not jobs or self.timed_out:
            return [None] * len(jobs)
        futures = [self._submit(job) for job in jobs]
        again = [0] * len(jobs)
        answers: list[Answer | None] = [None] * len(jobs)
        pending = set(range(len(jobs)))
        while pending and not self.timed_out:
            for index in sorted(index for index in pending if futures[index].done()):
                if futures[index].cancelled():
                    again[index] += 1
                    futures[index] = self._resubmit(jobs[index], again[index])
                    continue
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

    def _send(self) -> Any:
        """Send what is called to all workers that there are; those that come later fetch it from them."""
        # Workers of the cluster import the planner themselves: it has to be installed there.
        return self._client.scatter(self._work, broadcast=True, hash=False)

    def _submit(self, job: Job) -> Any:
        return self._client.submit(_call, self._sent, job, pure=False, retries=RETRIES)

    def _resubmit(self, job: Job, times: int) -> Any:
        """Submit a job again whose function went with the only worker that held it."""
        try:
            if times > RETRIES:
                raise TimeoutError
            if self._sent.status != "finished":
                self._sent = self._send()
        except TimeoutError:
            raise RuntimeError(f"{self._address}: the cluster has lost its workers") from None
        return self._submit(job)

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
    if not re.fullmatch(ADDRESS, address):
        raise UserError(f"--cluster {address}: must be an address such as tcp://HOST:8786")
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
