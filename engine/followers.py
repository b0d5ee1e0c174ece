"""The other ranks of a tensor-parallel replica: processes that do what the first one's engine says.

Rank 0 has the scheduler. It tells the others each step's metadata and each load by a pipe, before it does the same itself; page tables and pages are
identical everywhere, only the weights differ. Tokens are sampled on every rank alike, so nothing comes back but how loads ended, and what became of
adapters that were to be registered (engine/group_store.py).
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from engine.adapter import AdapterSpec
from engine.adapter_loader import AdapterLoader
from engine.config import ServingConfig
from engine.errors import UserError
from engine.group_store import StoreServant
from engine.model_shape import ModelShape
from engine.processes import Sender, end_with_parent, stop_at_exit
from engine.questions import Questions
from engine.step import Load

if TYPE_CHECKING:
    from engine.runner import GraphKey, Runner

START_TIMEOUT_S = 900.0
RESET_TIMEOUT_S = 150.0  # more than a collective that has lost a rank takes to say so
SEND_TIMEOUT_S = 1.0
LAST_WORD_S = 2.0
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
    """Ranks 1 … tp − 1, by their pipes in this order. Steps, loads and resets are one thread's to tell; the rest is for any.

    processes: those that rank 0 started, to be watched and ended by it. end_on_loss: end this process when a rank is gone, as with `processes`.
    What the others say is read by a thread, from the first thing on that they are told.
    """

    def __init__(
        self, pipes: Sequence[Connection], processes: Sequence[BaseProcess] = (), *, end_on_loss: bool = False
    ) -> None:
        self.questions = Questions()
        self._pipes = list(pipes)
        self._processes = list(processes)
        self._end_on_loss = end_on_loss
        self._parting = threading.Event()
        self._closing = threading.Event()
        self._lost = threading.Event()  # a rank, before closing
        self._sending = threading.Lock()  # held over all pipes, so that all hear the same order
        self._news = threading.Condition()  # of the four below, which the reader changes
        self._ready: set[int] = set()
        self._resets = 0
        self._ended: list[tuple[str, str | None]] = []
        self._failure: Exception | None = None
        self._reader: threading.Thread | None = None
        self._reader_ends, self._end_reader = multiprocessing.Pipe(duplex=False)
        self._stop = stop_at_exit(self._pipes, self._processes)
        self._watcher = threading.Thread(target=self._watch, daemon=True, name="rank-watch")
        if processes:
            self._watcher.start()
        if processes or end_on_loss:
            atexit.register(self._end_at_exit)

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
        """Wait until every rank is built. Raises UserError or RankError where one cannot be."""
        self._listen()
        wanted = set(range(1, len(self._pipes) + 1))
        self._await(lambda: self._ready == wanted, START_TIMEOUT_S, "ready")

    def step(self, key: GraphKey, metadata: NDArray[np.int32], updates: NDArray[np.int32]) -> None:
        """Tell a step: its graph, its metadata, and the page table's changes [2, n]."""
        self._tell(("step", key, metadata, updates))

    def load(self, load: Load) -> None:
        """Tell a load to start."""
        self._tell(("load", load))

    def reset(self) -> None:
        """Tell to forget what runs, and wait until that is done."""
        with self._news:
            self._resets = 0
        self._tell(("reset",))
        self._await(lambda: self._resets == len(self._pipes), RESET_TIMEOUT_S, "free of its steps")
        with self._news:
            self._ended.clear()  # of loads that the reset forgot

    def ended_loads(self) -> list[tuple[str, str | None]]:
        """Return (adapter, reason of failure or None) of each rank's loads that ended since the last call."""
        with self._news:
            self._check()
            ended, self._ended = self._ended, []
        return ended

    def ask(self, kind: str, *rest: Any) -> int:
        """Put a question to all ranks, with its number in front; `questions` knows the answers."""
        number = self.questions.ask(range(1, len(self._pipes) + 1))
        self._tell((kind, number, *rest))
        return number

    def tell_store(self, kind: str, *rest: Any) -> None:
        """Tell the ranks' stores something that they do at once."""
        self._tell((kind, *rest))

    def part(self) -> bool:
        """Tell the ranks to stop, without waiting for it; return whether all of them have heard."""
        self._parting.set()
        try:
            self._tell(("stop",))
        except (UserError, RankError):
            return False
        return True

    def close(self) -> None:
        """End the processes."""
        self._closing.set()
        if not self._lost.is_set():
            atexit.unregister(self._end_at_exit)
        if self._sending.acquire(
            timeout=SEND_TIMEOUT_S
        ):  # else somebody is stuck in it, and what is sent will not be read
            self._sending.release()
        self._stop()
        self.questions.fail(RankError("the ranks are stopped"))
        if self._reader is not None:
            self._end_reader.send(None)
            self._reader.join()

    # ---- what goes out ----

    def _tell(self, message: tuple[Any, ...]) -> None:
        with self._sending:
            self._listen()
            self._check()
            for rank, pipe in enumerate(self._pipes, start=1):
                try:
                    pipe.send(message)
                except OSError:
                    self._lost.set()
                    raise RankError(f"rank {rank} is gone") from None

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _await(self, is_so: Callable[[], bool], timeout_s: float, what: str) -> None:
        """Wait until the reader heard that something is so. Raises RankError where it is not in time, or a rank fails."""
        with self._news:
            over = self._news.wait_for(lambda: self._failure is not None or is_so(), timeout_s)
            self._check()
        if not over:
            raise RankError(f"a rank is not {what} after {timeout_s:.0f} s")

    # ---- what comes in ----

    def _listen(self) -> None:
        if self._reader is None:
            self._reader = threading.Thread(target=self._read, daemon=True, name="rank-reader")
            self._reader.start()

    def _read(self) -> None:
        ranks = {pipe: rank for rank, pipe in enumerate(self._pipes, start=1)}
        while ranks:
            for pipe in cast(list[Connection], wait([*ranks, self._reader_ends])):
                if pipe is self._reader_ends:
                    return
                try:
                    self._hear(ranks[pipe], *pipe.recv())
                except (EOFError, OSError):
                    self._lose(ranks.pop(pipe))

    def _hear(self, rank: int, kind: str, *rest: Any) -> None:
        if kind == "answer":
            self.questions.answer(rest[0], rank, rest[1])
        elif kind in ("user_error", "error"):
            make = UserError if kind == "user_error" else RankError
            self._fail(make(f"rank {rank}: {rest[0]}"))
        else:
            with self._news:
                if kind == "ready":
                    self._ready.add(rank)
                elif kind == "reset":
                    self._resets += 1
                else:
                    assert kind == "load", kind
                    self._ended.append((rest[0], rest[1]))
                self._news.notify_all()

    def _lose(self, rank: int) -> None:
        if self._closing.is_set() or self._parting.is_set():
            return
        self._lost.set()
        self._fail(RankError(f"rank {rank} is gone"))
        if self._end_on_loss:
            self._end_this_process(f"rank {rank} is gone")

    def _fail(self, error: Exception) -> None:
        """Let everybody who waits for the ranks, now or later, get this error; the first one counts."""
        with self._news:
            self._failure = self._failure or error
            self._news.notify_all()
        self.questions.fail(error)

    def _watch(self) -> None:
        """End this process when a rank's dies."""
        sentinels = {process.sentinel: process for process in self._processes}
        for sentinel in wait(list(sentinels)):
            process = sentinels[sentinel]  # type: ignore[index]
            process.join()
            done = self._parting.is_set() and process.exitcode == 0
            if self._lost.is_set() or not (done or self._closing.is_set()):
                self._end_this_process(f"{process.name} died with exit code {process.exitcode}")

    def _end_at_exit(self) -> None:
        """End this process at once if it ends because of a lost rank: what is freed on a GPU waits for kernels that wait for that rank."""
        if not self._lost.is_set():
            return
        sys.stdout.flush()
        sys.stderr.flush()
        if self._watcher.is_alive():
            self._watcher.join(LAST_WORD_S + 1)  # it says who died, and ends the process itself
        os._exit(1)

    def _end_this_process(self, what: str) -> None:
        """End this process, as a collective with a rank that is gone would never return. What the rank said last is told, if it did."""
        told = self._failure if isinstance(self._failure, UserError) else None
        if told is not None and self._closing.wait(LAST_WORD_S):
            return  # whoever waited for the rank has been told, and tells the user
        text = f"error: {told or what}\n"
        os.write(sys.stderr.fileno(), text.encode())  # not print: the main thread may hold its lock
        os._exit(2 if told else 1)


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
        runner.close()
    except UserError as error:
        pipe.send(("user_error", str(error)))
    except (EOFError, BrokenPipeError):
        return
    except Exception as error:
        pipe.send(("error", f"{type(error).__name__}: {error}"))
        raise


def serve_rank(runner: Runner, pipe: Connection) -> None:
    """Do what rank 0 says until it says stop."""
    tell = Sender(pipe)
    servant = StoreServant(runner.store, tell)
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
            elif kind == "reset":
                runner.reset()
                tell(("reset",))
            else:
                servant.obey(kind, *rest)
        for name in runner.loader.finished():
            tell(("load", name, None))
        for name, reason in runner.loader.failed():
            tell(("load", name, reason))


def free_port() -> int:
    """Return a port of this host that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port
