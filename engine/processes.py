"""Processes that serve as parts of one engine: how they end."""

from __future__ import annotations

import ctypes
import signal
from collections.abc import Iterable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

STOP_TIMEOUT_S = 10.0


def end_with_parent() -> None:
    """Let this process be killed when its parent ends, however that does, and leave Ctrl-C to the parent."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def stop(pipes: Iterable[Connection], processes: Iterable[BaseProcess]) -> None:
    """Tell processes to stop, and kill those that do not."""
    for pipe in pipes:
        try:
            pipe.send(("stop",))
        except OSError:
            continue  # it is gone already
    for process in processes:
        process.join(STOP_TIMEOUT_S)
        if process.is_alive():
            process.kill()
