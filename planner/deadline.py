"""When work that may take only so long has to end."""

from __future__ import annotations

import time


class Deadline:
    """An instant `timeout_s` seconds from now; None: there is none."""

    def __init__(self, timeout_s: float | None) -> None:
        self._ends_at_s = None if timeout_s is None else time.monotonic() + timeout_s

    @property
    def passed(self) -> bool:
        """Whether time is up."""
        return self._ends_at_s is not None and time.monotonic() >= self._ends_at_s

    @property
    def left_s(self) -> float | None:
        """Seconds until then, at least 0; None where there is no end."""
        return None if self._ends_at_s is None else max(0.0, self._ends_at_s - time.monotonic())
