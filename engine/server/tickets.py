"""What the event loop knows of generations: tickets, and the mailbox that their tokens arrive in."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engine.engine import FinishReason, Generation
from engine.sampling import Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One prompt to complete.

    page_keys: see `engine.requests.Request`. adapter: the engine's name of it; served_as, rank: what clients call it, and its rank, for records.
    """

    prompt: NDArray[np.int32]
    max_tokens: int
    sampling: Sampling
    stop_tokens: frozenset[int]
    page_keys: tuple[Hashable, ...] | None = None
    adapter: str | None = None
    served_as: str | None = None
    rank: int | None = None


@dataclass(frozen=True, slots=True)
class Ending:
    """How a generation ended, and for `error` and `refused` why, in words fit for clients. never: it could not run at any time."""

    reason: FinishReason
    error: str | None = None
    never: bool = False


@dataclass(slots=True, eq=False)
class Ticket:
    """One generation. Instants are seconds of the server's clock; `generation` belongs to the engine's thread."""

    number: int
    index: int
    job: Job
    mailbox: Mailbox
    arrived_s: float
    num_tokens: int = 0
    first_token_s: float | None = None
    last_token_s: float | None = None
    ended_s: float | None = None
    ending: Ending | None = None
    cached_tokens: int = 0
    waited_for_adapter: bool = False
    generation: Generation | None = None
    aborting: bool = False


@dataclass(slots=True)
class Letter:
    """News of one generation of a request."""

    index: int
    tokens: list[int] = field(default_factory=list)
    ending: Ending | None = None


class Mailbox:
    """News of all generations of one HTTP request, in order. Without `eager` the reader is woken by endings alone."""

    def __init__(self, eager: bool) -> None:
        self._eager = eager
        self._letters: list[Letter] = []
        self._news = asyncio.Event()

    def put_token(self, index: int, token: int) -> None:
        """Add a token to the news of a generation."""
        if not self._letters or self._letters[-1].index != index:
            self._letters.append(Letter(index))
        self._letters[-1].tokens.append(token)
        if self._eager:
            self._news.set()

    def put_ending(self, index: int, ending: Ending) -> None:
        """Tell how a generation ended."""
        self._letters.append(Letter(index, ending=ending))
        self._news.set()

    async def take(self) -> Sequence[Letter]:
        """Wait for news and take all there is."""
        await self._news.wait()
        self._news.clear()
        letters, self._letters = self._letters, []
        return letters
