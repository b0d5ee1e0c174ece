"""What a waiting queue may know of the scheduler around it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from engine.sequence import Sequence


class QueueView(Protocol):
    """What a policy may look at."""

    @property
    def num_running(self) -> int:
        """Requests that run."""

    def is_resident(self, adapter: str) -> bool:
        """Whether the adapter's weights are on the GPU."""

    def is_running(self, adapter: str) -> bool:
        """Whether a running request uses the adapter."""

    def running_adapters(self) -> Iterable[str]:
        """The adapters that running requests use, each once."""

    def planned_tokens(self, sequence: Sequence) -> int:
        """How many output tokens of a sequence have been planned."""
