"""The process of one task (`planner.background`): reads it from standard input, says how far it is and what came out, one JSON object a line."""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
import threading
import traceback
from typing import Any

from planner.task import Task

NICE = 5  # whoever draws pages goes first


def main() -> int:
    """Run one task and return the exit code."""
    os.nice(NICE)
    count = int.from_bytes(sys.stdin.buffer.read(8), "big")
    task: Task = pickle.loads(sys.stdin.buffer.read(count))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        from planner.answers import answer  # a second or two to import

        _say({"answer": answer(task, lambda stage, done, total: _say_progress(stage, done, total))})
    except Exception as error:
        # ValueError and RuntimeError are how the planner says in one line what stands in the way; all else is ours to mend.
        if isinstance(error, ValueError | RuntimeError):
            _say({"error": " ".join(str(error).split())})
        else:
            traceback.print_exc()
            _say({"error": f"the search failed ({type(error).__name__}); the server's log says more"})
    sys.stdout.flush()
    return 0


def _say_progress(stage: str, done: int, total: int) -> None:
    _say({"stage": stage, "done": done, "total": total})


def _say(said: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(said, allow_nan=False) + "\n")
    sys.stdout.flush()


def _end_with_parent() -> None:
    """Wait for the lifeline to be cut, then end the whole group."""
    os.read(sys.stdin.fileno(), 1)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    os._exit(main())
