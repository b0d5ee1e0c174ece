"""Who waits, and in what order they are served: the scheduler's policies (docs/scheduling.md says which to choose)."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping
from itertools import islice
from typing import Protocol

from engine.config import SchedulerPolicy
from engine.queue_clustered import ClusteredQueue
from engine.queue_fair import FairQueue
from engine.queue_slo import SloQueue
from engine.queue_view import QueueView
from engine.sequence import Sequence

__all__ = ["FcfsQueue", "QueueView", "WaitingQueue", "new_queue"]


class WaitingQueue(Protocol):
    """The requests that wait. A policy decides the order of service, and may turn away."""

    time_dependent: bool  # whether order or expiry changes by time alone

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Sequence]:
        """Yield all, in any order."""

    def push(self, sequence: Sequence) -> None:
        """Take in a new request."""

    def push_front(self, sequence: Sequence) -> None:
        """Take back a preempted one, which goes before all others."""

    def remove(self, sequence: Sequence) -> None:
        """Forget one that gave up."""

    def window(self, limit: int, now_s: float, view: QueueView) -> list[Sequence]:
        """Return the first `limit` in order of service."""

    def drop(self, admitted: Collection[Sequence]) -> None:
        """Note that these of the last window were admitted, and wait no more."""

    def served(self, sequence: Sequence, prefill_tokens: int, decode_tokens: int) -> None:
        """Account what a request got: `prefill_tokens` when a chunk of it is planned.

        With 0 of them it runs no more: it has ended or is preempted, and has generated `decode_tokens` in all.
        """

    def expired(self, now_s: float) -> list[Sequence]:
        """Return those to be turned away now; they are still in the queue."""


class FcfsQueue:
    """First come, first served."""

    time_dependent = False

    def __init__(self) -> None:
        self._waiting: deque[Sequence] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._waiting)

    def push(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)

    def push_front(self, sequence: Sequence) -> None:
        self._waiting.appendleft(sequence)

    def remove(self, sequence: Sequence) -> None:
        self._waiting.remove(sequence)

    def window(self, limit: int, now_s: float, view: QueueView) -> list[Sequence]:
        del now_s, view
        return list(islice(self._waiting, limit))

    def drop(self, admitted: Collection[Sequence]) -> None:
        waiting = self._waiting
        kept: list[Sequence] = []
        for sequence in admitted:  # in the order of the window, and mostly from its start
            while waiting[0] is not sequence:
                kept.append(waiting.popleft())
            waiting.popleft()
        waiting.extendleft(reversed(kept))

    def served(self, sequence: Sequence, prefill_tokens: int, decode_tokens: int) -> None:
        """Nothing depends on it."""

    def expired(self, now_s: float) -> list[Sequence]:
        del now_s
        return []


def new_queue(
    policy: SchedulerPolicy,
    *,
    ttft_slo_s: float | None = None,
    adapter_weights: Mapping[str, float] | None = None,
) -> WaitingQueue:
    """Return the queue of a policy."""
    if policy == "fcfs":
        return FcfsQueue()
    if policy == "clustered":
        return ClusteredQueue()
    if policy == "fair":
        return FairQueue(adapter_weights)
    if ttft_slo_s is None:
        raise ValueError("the scheduler 'slo' needs ttft_slo_s")
    return SloQueue(ttft_slo_s)
