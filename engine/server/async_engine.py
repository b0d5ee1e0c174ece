"""The engine as the event loop has it: generations are submitted and aborted here, and their news delivered here."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from engine.engine import Engine, FinishReason
from engine.replicated_engine import ReplicatedEngine
from engine.server.engine_thread import ENGINE_DOWN, AnyEngine, EngineThread, News
from engine.server.errors import ApiError, Scrubber
from engine.server.tickets import Ending, Job, Mailbox, Ticket
from engine.snapshot import Snapshot, take_snapshot

RETRY_AFTER_S = 1

T = TypeVar("T")


class Observer(Protocol):
    """Is told, on the event loop, what happens to generations."""

    def submitted(self, ticket: Ticket) -> None:
        """A generation was accepted."""

    def token(self, ticket: Ticket, gap_s: float | None) -> None:
        """A token came, so long after the one before; None for the first."""

    def ended(self, ticket: Ticket) -> None:
        """A generation ended, well or not."""


class AsyncEngine:
    """An engine on a thread of its own; all methods are for the event loop. At most `max_unfinished` generations are in it at a time."""

    def __init__(
        self,
        engine: AnyEngine,
        *,
        max_unfinished: int,
        scrub: Scrubber,
        observers: Sequence[Observer] = (),
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.clock = clock
        self._max_unfinished = max_unfinished
        self._observers = tuple(observers)
        self._numbers = itertools.count()
        self._active: dict[int, Ticket] = {}  # submitted, and no ending delivered
        self._loop: asyncio.AbstractEventLoop | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self.thread = EngineThread(engine, scrub=scrub, deliver=lambda news: self._post(self._deliver, news))

    def start(self) -> None:
        """Start the thread; deliver to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self.thread.start()

    async def stop(self) -> None:
        """End the thread after its turn."""
        await asyncio.to_thread(self.thread.stop)

    @property
    def dead(self) -> bool:
        """Whether the engine failed and could not be started anew."""
        return self.thread.dead

    @property
    def failures(self) -> int:
        """How often the engine, or one of its replicas', failed and was started anew."""
        engine = self.thread.engine
        return self.thread.failures + (engine.failures if isinstance(engine, ReplicatedEngine) else 0)

    @property
    def replicas(self) -> dict[str, Sequence[int]] | None:
        """Which replicas serve and which died; None where there is one engine alone."""
        engine = self.thread.engine
        if not isinstance(engine, ReplicatedEngine):
            return None
        return {"serving": list(engine.alive), "lost": sorted(engine.lost)}

    @property
    def num_active(self) -> int:
        """Generations that were submitted and have not ended."""
        return len(self._active)

    def submit(self, jobs: Sequence[Job], mailbox: Mailbox) -> list[Ticket]:
        """Queue all jobs of a request. Raises a 429 when that many do not fit the queue, a 503 without an engine."""
        if self.dead:
            raise ApiError(503, ENGINE_DOWN)
        if len(self._active) + len(jobs) > self._max_unfinished:
            message = "the queue is full: try again later"
            raise ApiError(429, message, code="queue_full", retry_after_s=RETRY_AFTER_S)
        now_s = self.clock()
        tickets = [Ticket(next(self._numbers), i, job, mailbox, now_s) for i, job in enumerate(jobs)]
        for ticket in tickets:
            self._active[ticket.number] = ticket
            self._idle.clear()
            for observer in self._observers:
                observer.submitted(ticket)
        self.thread.do(lambda: self.thread.add(tickets))
        return tickets

    def abort(self, tickets: Sequence[Ticket], reason: FinishReason = "abort") -> None:
        """Stop generations that have not ended; their pages go as soon as no step uses them. Idempotent."""
        wanted = [ticket for ticket in tickets if ticket.ending is None and not ticket.aborting]
        for ticket in wanted:
            ticket.aborting = True
        if wanted:
            self.thread.do(lambda: self.thread.abort(wanted, reason))

    def abort_all(self) -> None:
        """Stop everything."""
        self.abort(list(self._active.values()))

    async def snapshots(self) -> Mapping[int, Snapshot]:
        """Return the state of each replica by its number; 0 is an engine alone. Raises a 503 where an engine does not answer."""
        engine = self.thread.engine
        if not isinstance(engine, ReplicatedEngine):
            return {0: await self.call(_snapshot)}
        if self.dead:
            raise ApiError(503, ENGINE_DOWN)
        try:
            return await asyncio.to_thread(engine.snapshots)
        except TimeoutError:
            raise ApiError(503, "a replica does not answer") from None

    async def call(self, function: Callable[[AnyEngine], T]) -> T:
        """Run a function on the engine's thread, between turns, and return what it returns. Raises what it raises; a 503 without an engine."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        def command() -> None:
            try:
                if self.dead:
                    raise ApiError(503, ENGINE_DOWN)
                result = function(self.thread.engine)
            except Exception as error:
                self._post(_set_exception, future, error)
            else:
                self._post(_set_result, future, result)

        self.thread.do(command)
        return await future

    async def wait_idle(self) -> None:
        """Wait until every generation has ended and its ending was delivered."""
        await self._idle.wait()

    # ---- news ----

    def _post(self, function: Callable[..., Any], *arguments: Any) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is there to hear it
            self._loop.call_soon_threadsafe(function, *arguments)

    def _deliver(self, news: News) -> None:
        now_s = self.clock()
        for ticket, item in news:
            if isinstance(item, Ending):
                self._deliver_ending(ticket, item, now_s)
                continue
            gap_s = None if ticket.last_token_s is None else now_s - ticket.last_token_s
            ticket.first_token_s = now_s if ticket.first_token_s is None else ticket.first_token_s
            ticket.last_token_s = now_s
            ticket.num_tokens += 1
            ticket.mailbox.put_token(ticket.index, item)
            for observer in self._observers:
                observer.token(ticket, gap_s)

    def _deliver_ending(self, ticket: Ticket, ending: Ending, now_s: float) -> None:
        if self._active.pop(ticket.number, None) is None:
            return
        ticket.ending, ticket.ended_s = ending, now_s
        ticket.mailbox.put_ending(ticket.index, ending)
        for observer in self._observers:
            observer.ended(ticket)
        if not self._active:
            self._idle.set()


def _snapshot(engine: AnyEngine) -> Snapshot:
    assert isinstance(engine, Engine)
    return take_snapshot(engine)


def _set_result(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)


def _set_exception(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
