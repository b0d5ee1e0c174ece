"""The other ranks of a tensor-parallel replica: processes that do what the first one's engine says.

Rank 0 has the scheduler. It tells the others each step's metadata and each load by a pipe, before it does the same itself; page tables and pages are
identical everywhere, only the weights differ. Tokens are sampled on every rank alike, so nothing comes back but how loads ended.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engine.adapter import AdapterSpec
from engine.adapter_loader import AdapterLoader
from engine.config import ServingConfig
from engine.errors import UserError
from engine.model_shape import ModelShape
from engine.processes import end_with_parent, stop
from engine.step import Load

if TYPE_CHECKING:
    from engine.runner import GraphKey, Runner

START_TIMEOUT_S = 900.0
POLL_S = 100e-6  # while a load is under way


class RankError(RuntimeError):
    """Another rank failed: the replica cannot go on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FollowerTask:
    """What a rank needs to build its part."""

    rank: int
    config: ServingConfig
    adapters: Mapping[str, AdapterSpec]
    seed: int
    address: str  # where the ranks meet
    register: bool
    shape: ModelShape | None


class Followers:
    """Ranks 1 … tp − 1, by their pipes in this order. processes: those that rank 0 started, to be watched and ended by it."""

    def __init__(self, pipes: Sequence[Connection], processes: Sequence[BaseProcess] = ()) -> None:
        self._closing = False
        self._pipes = list(pipes)
        self._processes = list(processes)
        if processes:
            threading.Thread(target=self._watch, daemon=True, name="rank-watch").start()

    @classmethod
    def start(cls, task: FollowerTask) -> Followers:
        """Start the other ranks' processes. task: of any of them."""
        pipes, processes = [], []
        context = multiprocessing.get_context("spawn")
        for rank in range(1, task.config.tp):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=follow, args=(replace(task, rank=rank), theirs), name=f"rank-{rank}", daemon=True
            )
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        return cls(pipes, processes)

    def await_ready(self) -> None:
        """Wait until every rank is built. Raises RankError where one cannot be."""
        for rank, pipe in enumerate(self._pipes, start=1):
            if not pipe.poll(START_TIMEOUT_S):
                raise RankError(f"rank {rank} is not ready after {START_TIMEOUT_S:.0f} s")
            self._receive(rank, pipe)

    def step(self, key: GraphKey, metadata: NDArray[np.int32], updates: NDArray[np.int32]) -> None:
        """Tell a step: its graph, its metadata, and the page table's changes [2, n]."""
        self._tell(("step", key, metadata, updates))

    def load(self, load: Load) -> None:
        """Tell a load to start."""
        self._tell(("load", load))

    def reset(self) -> None:
        """Tell to forget what runs."""
        self._tell(("reset",))
        for rank, pipe in enumerate(self._pipes, start=1):
            while self._receive(rank, pipe)[0] != "reset":
                pass

    def ended_loads(self) -> list[tuple[str, str | None]]:
        """Return (adapter, reason of failure or None) of each rank's loads that ended since the last call."""
        ended = []
        for rank, pipe in enumerate(self._pipes, start=1):
            while pipe.poll():
                kind, *rest = self._receive(rank, pipe)
                assert kind == "load"
                ended.append((rest[0], rest[1]))
        return ended

    def close(self) -> None:
        """End the processes."""
        self._closing = True
        stop(self._pipes, self._processes)

    def _tell(self, message: tuple[Any, ...]) -> None:
        for rank, pipe in enumerate(self._pipes, start=1):
            try:
                pipe.send(message)
            except OSError:
                raise RankError(f"rank {rank} is gone") from None

    def _receive(self, rank: int, pipe: Connection) -> tuple[Any, ...]:
        try:
            message: tuple[Any, ...] = pipe.recv()
        except EOFError:
            raise RankError(f"rank {rank} is gone") from None
        if message[0] == "user_error":
            raise UserError(f"rank {rank}: {message[1]}")
        if message[0] == "error":
            raise RankError(f"rank {rank}: {message[1]}")
        return message

    def _watch(self) -> None:
        """End this process when a rank dies: a collective with it would never return."""
        sentinels = {process.sentinel: process for process in self._processes}
        for sentinel in wait(list(sentinels)):
            process = sentinels[sentinel]  # type: ignore[index]
            process.join()
            if not self._closing:
                text = f"error: {process.name} died with exit code {process.exitcode}\n"
                os.write(sys.stderr.fileno(), text.encode())  # not print: the main thread may hold its lock
                os._exit(1)


class GroupLoader:
    """Rank 0's loader and the other ranks': a load has ended when it has on all of them."""

    def __init__(self, own: AdapterLoader, followers: Followers, ranks: int) -> None:
        self._own = own
        self._followers = followers
        self._ranks = ranks
        self._left: dict[str, int] = {}
        self._failures: dict[str, str] = {}
        self._finished: list[str] = []
        self._failed: list[tuple[str, str]] = []
        self.adapter_meta = own.adapter_meta
        self.register = own.register

    @property
    def num_loading(self) -> int:
        """Loads started and not over everywhere."""
        return len(self._left)

    def start(self, load: Load) -> None:
        """Start a load on all ranks."""
        self._left[load.adapter] = self._ranks
        self._followers.load(load)
        self._own.start(load)

    def finished(self) -> list[str]:
        """As of AdapterLoader."""
        self._look()
        names, self._finished = self._finished, []
        return names

    def failed(self) -> list[tuple[str, str]]:
        """As of AdapterLoader."""
        self._look()
        failures, self._failed = self._failed, []
        return failures

    def reset(self) -> None:
        """As of AdapterLoader."""
        self._own.reset()
        self._left, self._failures, self._finished, self._failed = {}, {}, [], []

    def _look(self) -> None:
        if not self._left:
            return
        for name in self._own.finished():
            self._count(name, None)
        for name, reason in self._own.failed():
            self._count(name, reason)
        for name, failure in self._followers.ended_loads():
            self._count(name, failure)

    def _count(self, name: str, failure: str | None) -> None:
        if failure is not None:
            self._failures[name] = failure
        self._left[name] -= 1
        if self._left[name]:
            return
        del self._left[name]
        reason = self._failures.pop(name, None)
        if reason is None:
            self._finished.append(name)
        else:
            self._failed.append((name, reason))


# ---- in the other processes ----


def follow(task: FollowerTask, pipe: Connection) -> None:
    """Build this rank's part and do as told until the pipe closes."""
    end_with_parent()
    from engine.build import build_rank

    try:
        runner = build_rank(task)
        pipe.send(("ready",))
        serve_rank(runner, pipe)
    except UserError as error:
        pipe.send(("user_error", str(error)))
    except (EOFError, BrokenPipeError):
        return
    except Exception as error:
        pipe.send(("error", f"{type(error).__name__}: {error}"))
        raise


def serve_rank(runner: Runner, pipe: Connection) -> None:
    """Do what rank 0 says until it says stop."""
    while True:
        loading = runner.loader.num_loading > 0
        if not loading or pipe.poll(POLL_S):
            kind, *rest = pipe.recv()
            if kind == "stop":
                return
            if kind == "step":
                runner.follow(*rest)
            elif kind == "load":
                runner.start_load(rest[0])
            else:
                runner.reset()
                pipe.send(("reset",))
        for name in runner.loader.finished():
            pipe.send(("load", name, None))
        for name, reason in runner.loader.failed():
            pipe.send(("load", name, reason))


def free_port() -> int:
    """Return a port of this host that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port
