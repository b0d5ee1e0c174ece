"""Replicas of a configuration: processes with an engine each (engine/replica_process.py), behind the router.

The first process routes requests and collects what became of them. A replica that dies is routed around: its unfinished requests go to the others.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from engine import torchrun
from engine.adapter import AdapterSpec
from engine.config import ServingConfig
from engine.errors import UserError
from engine.placement import places_of
from engine.processes import Sender, stop_at_exit
from engine.questions import Questions
from engine.replica_process import ReplicaReport, ReplicaTask, Timeline, serve_replica
from engine.requests import Request
from engine.router import Router

START_TIMEOUT_S = 900.0
LOST = "lost"  # the kind of the last message of a replica, which it did not send itself

Message = tuple[Any, ...]


class ReplicaError(RuntimeError):
    """No replica is left, or one cannot be built."""


@dataclass(frozen=True, slots=True)
class Errand:
    """A request that was sent to a replica. payload: what goes with it, the prompt first."""

    request: Request
    payload: tuple[Any, ...]
    replica: int


class Replicas:
    """The replicas of a configuration. One thread owns it, but for `ask`, `questions` and `tell_all`, which are for any.

    serving: they tell tokens as they come, and take adapters (engine/replicated_engine.py reads that); else they tell what ended.
    on_news: called on a thread of its own when there is something to receive.
    """

    def __init__(
        self,
        config: ServingConfig,
        adapters: Mapping[str, AdapterSpec],
        *,
        seed: int = 0,
        serving: bool = False,
    ) -> None:
        here = torchrun.world()
        if here is not None:
            here.check(config)
        self.questions = Questions()
        self.on_news: Callable[[], None] = lambda: None
        self.lost: list[int] = []
        self._router = Router.of(config, places_of(config, adapters))
        self._errands: dict[int | str, Errand] = {}
        self._inbox: queue.SimpleQueue[tuple[int, Message]] = queue.SimpleQueue()
        pipes, self._processes = [], []
        context = multiprocessing.get_context("spawn")
        for index in range(config.replicas):
            ours, theirs = context.Pipe()
            task = ReplicaTask(
                config=config.with_changes(replicas=1, placement="everywhere"),
                adapters=adapters,
                seed=seed,
                devices=tuple(index * config.tp + rank for rank in range(config.tp)),
                serving=serving,
            )
            # Not a daemon, which could have no ranks of its own; it ends with its parent all the same.
            process = context.Process(target=serve_replica, args=(task, theirs), name=f"replica-{index}")
            process.start()
            theirs.close()
            pipes.append(ours)
            self._processes.append(process)
        self._senders = {index: Sender(pipe) for index, pipe in enumerate(pipes)}
        self._stop = stop_at_exit(pipes, self._processes)
        reading = threading.Thread(target=self._read, args=(pipes,), daemon=True, name="replica-reader")
        reading.start()

    def await_ready(self) -> None:
        """Wait until all are built. Raises UserError or ReplicaError where one cannot be."""
        waiting = set(self._senders)
        while waiting:
            try:
                index, (kind, *rest) = self._inbox.get(timeout=START_TIMEOUT_S)
            except queue.Empty:
                raise ReplicaError(
                    f"replica {min(waiting)} is not ready after {START_TIMEOUT_S:.0f} s"
                ) from None
            if kind == "user_error":
                raise UserError(f"replica {index}: {rest[0]}")
            if kind == LOST:
                raise ReplicaError(f"replica {index} died while it was built")
            waiting.discard(index)

    # ---- requests ----

    @property
    def num_unfinished(self) -> int:
        """Requests that were sent and have not ended."""
        return len(self._errands)

    @property
    def alive(self) -> list[int]:
        """The replicas that are left."""
        return [index for index in self._senders if index not in self.lost]

    def begin(self, started_s: float) -> None:
        """Start anew, from cold GPUs, with clocks that count from `started_s` of time.perf_counter, which all processes share."""
        self.tell_all(("begin", started_s))

    def submit(self, request: Request, prompt: NDArray[np.int32], *options: Any) -> int:
        """Route a request and send it, with what else `_Replica.add` takes; return the replica. Raises ReplicaError where none is left."""
        if not self.alive:
            raise ReplicaError("no replica is left")
        index = self._router.route(
            request.adapter, request.prompt_tokens, request.output_tokens, time.perf_counter()
        )
        self._errands[request.request_id] = Errand(request, (prompt, *options), index)
        self.tell(index, ("request", request, prompt, *options))
        return index

    def finished(self, request_id: int | str) -> int | None:
        """Note the end of a request; return the replica that had it, None where it had ended before."""
        errand = self._errands.pop(request_id, None)
        if errand is None:
            return None
        request = errand.request
        tokens = request.prompt_tokens + request.output_tokens
        self._router.finished(errand.replica, tokens, request.adapter)
        return errand.replica

    def replica_of(self, request_id: int | str) -> int | None:
        """Return which replica has a request, None where it has ended."""
        errand = self._errands.get(request_id)
        return None if errand is None else errand.replica

    def ended(self, wait_s: float = 0.0) -> list[tuple[int | str, int, Timeline]]:
        """Return (request id, replica, timeline) of what ended since the last call; wait so long for something at most.

        What a replica that died had not finished goes to the others, from the start. Raises ReplicaError where none is left.
        """
        found = []
        for index, message in self.receive(wait_s):
            if message[0] == LOST:
                for errand in self.lose(index):
                    self.submit(errand.request, *errand.payload)
            elif self.finished(message[1]) is not None:
                found.append((message[1], index, message[2]))
        return found

    def reports(self) -> dict[int, ReplicaReport]:
        """Return what each replica that is left did since `begin`; nothing may be unfinished."""
        found: dict[int, ReplicaReport] = {}
        self.tell_all(("report",))
        while set(found) < set(self.alive):
            for index, message in self.receive(START_TIMEOUT_S):
                if message[0] == LOST:
                    self.lose(index)
                else:
                    found[index] = message[1]
        return {index: found[index] for index in sorted(found)}

    # ---- messages ----

    def tell(self, index: int, message: Message) -> None:
        """Send a message to a replica; that it is gone is heard from `receive`."""
        with contextlib.suppress(OSError):
            self._senders[index](message)

    def tell_all(self, message: Message) -> None:
        """Send a message to every replica that is left."""
        for index in self.alive:
            self.tell(index, message)

    def ask(self, kind: str, *rest: Any) -> int:
        """Put a question to every replica that is left, with its number in front; `questions` knows the answers."""
        number = self.questions.ask(self.alive)
        self.tell_all((kind, number, *rest))
        return number

    @property
    def has_news(self) -> bool:
        """Whether `receive` would return something."""
        return not self._inbox.empty()

    def receive(self, wait_s: float = 0.0) -> list[tuple[int, Message]]:
        """Return (replica, message) of all that came, but for answers; wait so long for something at most. (LOST,) is a replica's last."""
        found = []
        with contextlib.suppress(queue.Empty):
            found.append(self._inbox.get(block=wait_s > 0, timeout=wait_s or None))
            while True:
                found.append(self._inbox.get_nowait())
        return found

    def lose(self, index: int) -> list[Errand]:
        """Route around a replica from which LOST came; return what it had not finished. Raises ReplicaError where none is left."""
        self.lost.append(index)
        if not self.alive:
            raise ReplicaError("no replica is left")
        self._router.remove(index)
        orphans = [errand for errand in self._errands.values() if errand.replica == index]
        for errand in orphans:
            self.finished(errand.request.request_id)
        return orphans

    def close(self) -> None:
        """End the processes."""
        self._stop()
        self.questions.fail(ReplicaError("the replicas are stopped"))

    def _read(self, pipes: list[Connection]) -> None:
        left = {pipe: index for index, pipe in enumerate(pipes)}
        while left:
            for pipe in cast(list[Connection], wait(list(left))):
                index = left[pipe]
                try:
                    self._hear(index, pipe.recv())
                except (EOFError, OSError):
                    del left[pipe]
                    self.questions.lose(index)
                    self._hear(index, (LOST,))

    def _hear(self, index: int, message: Message) -> None:
        if message[0] == "answer":
            self.questions.answer(message[1], index, message[2])
            return
        self._inbox.put((index, message))
        self.on_news()
