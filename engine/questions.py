"""Questions that one process puts to several others, whose answers come by their pipes in any order."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable
from typing import Any


class Questions:
    """Which questions are open, and who still owes an answer. Asked and waited for on any thread; the others tell what the pipes' reader hears."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._numbers = itertools.count(1)
        self._owed: dict[int, set[int]] = {}
        self._answers: dict[int, dict[int, Any]] = {}
        self._gone: set[int] = set()
        self._failure: Exception | None = None

    def ask(self, members: Iterable[int]) -> int:
        """Open a question to those members that are left, and return its number; then it is sent to them."""
        with self._changed:
            number = next(self._numbers)
            self._owed[number] = set(members) - self._gone
            self._answers[number] = {}
        return number

    def wait(self, number: int, timeout_s: float | None = None) -> dict[int, Any]:
        """Wait for the answers of all members that are left, and close the question. Raises what `fail` was given; TimeoutError."""
        with self._changed:
            over = self._changed.wait_for(lambda: self._failure or not self._owed[number], timeout_s)
            del self._owed[number]
            answers = self._answers.pop(number)
            if self._failure is not None:
                raise self._failure
        if not over:
            raise TimeoutError(f"no answer after {timeout_s} s")
        return answers

    def answer(self, number: int, member: int, answer: Any) -> None:
        """Take an answer; one to a question that is closed already is dropped."""
        with self._changed:
            if number in self._owed:
                self._owed[number].discard(member)
                self._answers[number][member] = answer
                self._changed.notify_all()

    def lose(self, member: int) -> None:
        """Expect nothing more from a member."""
        with self._changed:
            self._gone.add(member)
            for owed in self._owed.values():
                owed.discard(member)
            self._changed.notify_all()

    def fail(self, error: Exception) -> None:
        """Let everybody who waits, now or later, get this error."""
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()
