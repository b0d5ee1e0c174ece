"""Processes that serve as parts of one engine: how they end."""

from __future__ import annotations

import ctypes
import signal
import threading
import time
from collections.abc import Iterable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any

STOP_TIMEOUT_S = 10.0


class Sender:
    """One end of a pipe, for several threads to write to."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()

    def __call__(self, message: tuple[Any, ...]) -> None:
        """Send a message, whole. Raises OSError where nobody listens any more."""
        with self._lock:
            self._pipe.send(message)


def end_with_parent() -> None:
    """Let this process be killed when its parent ends, however that does, and leave signals to the parent: it drains, and says when to stop."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def stop_at_exit(pipes: Iterable[Connection], processes: Iterable[BaseProcess]) -> Finalize:
    """Have processes stopped when the result is called, and at the latest when this process exits, which would wait for them for ever."""
    return Finalize(None, stop, args=(list(pipes), list(processes)), exitpriority=10)


def stop(pipes: Iterable[Connection], processes: Iterable[BaseProcess]) -> None:
    """Tell processes to stop, and kill those that do not in time."""
    until_s = time.monotonic() + STOP_TIMEOUT_S
    for pipe in pipes:
        try:
            pipe.send(("stop",))
        except OSError:
            continue  # it is gone already
    for process in processes:
        process.join(max(0.0, until_s - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
