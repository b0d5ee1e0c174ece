"""The engine behind an event loop: one thread owns it and runs its turns; everything else talks to that thread.

Commands reach the thread by a queue and run between turns. Tokens go back once a turn, all in one call. Without work the thread sleeps on its queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from engine.engine import Engine, FinishReason, Generation
from engine.requests import Request
from engine.scheduler import RefusedError
from engine.server.errors import ApiError, Scrubber
from engine.server.tickets import Ending, Job, Mailbox, Ticket

LOAD_POLL_S = 200e-6  # how often a turn looks for an adapter on its way when nothing else can run
RETRY_AFTER_S = 1
WORKER_FAILED = "the engine failed while this request was running and was started anew; please try again"
ENGINE_DOWN = "the engine has failed and could not be started anew"

T = TypeVar("T")
log = logging.getLogger("engine.server")


class Observer(Protocol):
    """Is told, on the event loop, what happens to generations."""

    def submitted(self, ticket: Ticket) -> None:
        """A generation was accepted."""

    def token(self, ticket: Ticket, gap_s: float | None) -> None:
        """A token came, so long after the one before; None for the first."""

    def ended(self, ticket: Ticket) -> None:
        """A generation ended, well or not."""


class AsyncEngine:
    """Runs an engine on a thread of its own. All methods are for the event loop, but for those said to be the thread's."""

    def __init__(
        self,
        engine: Engine,
        *,
        max_unfinished: int,
        scrub: Scrubber,
        observers: Sequence[Observer] = (),
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.clock = clock
        self.failures = 0
        self.dead = False
        self._engine = engine
        self._max_unfinished = max_unfinished
        self._scrub = scrub
        self._observers = tuple(observers)
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._numbers = itertools.count()
        self._active: dict[int, Ticket] = {}  # the event loop's: submitted, and no ending delivered
        self._live: dict[int, Ticket] = {}  # the thread's: in the engine
        self._outgoing: list[tuple[Ticket, int | Ending]] = []  # the thread's: to be delivered after the turn
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # ---- for the event loop ----

    def start(self) -> None:
        """Start the thread; deliver to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """End the thread after its turn."""
        self._stopping = True
        self._commands.put(lambda: None)
        await asyncio.to_thread(self._thread.join)

    @property
    def num_active(self) -> int:
        """Generations that were submitted and have not ended."""
        return len(self._active)

    def submit(self, jobs: Sequence[Job], mailbox: Mailbox) -> list[Ticket]:
        """Queue all jobs of a request. Raises a 429 when that many do not fit the queue, a 503 without an engine."""
        if self.dead:
            raise ApiError(503, ENGINE_DOWN)
        if len(self._active) + len(jobs) > self._max_unfinished:
            raise ApiError(
                429,
                "the queue is full: try again later",
                code="queue_full",
                retry_after_s=RETRY_AFTER_S,
            )
        now_s = self.clock()
        tickets = [Ticket(next(self._numbers), i, job, mailbox, now_s) for i, job in enumerate(jobs)]
        for ticket in tickets:
            self._active[ticket.number] = ticket
            self._idle.clear()
            for observer in self._observers:
                observer.submitted(ticket)
        self._commands.put(lambda: self._add(tickets))
        return tickets

    def abort(self, tickets: Sequence[Ticket], reason: FinishReason = "abort") -> None:
        """Stop generations that have not ended; their pages go as soon as no step uses them. Idempotent."""
        wanted = [ticket for ticket in tickets if ticket.ending is None and not ticket.aborting]
        for ticket in wanted:
            ticket.aborting = True
        if wanted:
            self._commands.put(lambda: self._abort(wanted, reason))

    def abort_all(self) -> None:
        """Stop everything."""
        self.abort(list(self._active.values()))

    async def call(self, function: Callable[[Engine], T]) -> T:
        """Run a function on the engine's thread, between turns, and return what it returns. Raises what it raises; a 503 without an engine."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def command() -> None:
            try:
                if self.dead:
                    raise ApiError(503, ENGINE_DOWN)
                result = function(self._engine)
            except Exception as error:
                self._post(_set_exception, future, error)
            else:
                self._post(_set_result, future, result)

        self._commands.put(command)
        return await future

    async def wait_idle(self) -> None:
        """Wait until every generation has ended and its ending was delivered."""
        await self._idle.wait()

    def _deliver(self, news: list[tuple[Ticket, int | Ending]]) -> None:
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

    # ---- the thread's ----

    def _run(self) -> None:
        self._engine.on_token = self._on_token
        self._engine.on_end = self._on_end
        while not self._stopping:
            working = not self.dead and self._engine.busy
            self._obey(None if not working else 0.0)
            if working and not self._turn():
                self._obey(LOAD_POLL_S)
            self._flush()

    def _obey(self, wait_s: float | None) -> None:
        """Run the commands that are there; wait for the first so long, None: for ever."""
        with contextlib.suppress(queue.Empty):
            command = self._commands.get(block=wait_s != 0.0, timeout=wait_s or None)
            while True:
                command()
                command = self._commands.get_nowait()

    def _turn(self) -> bool:
        try:
            return self._engine.turn()
        except Exception:
            log.exception("the engine failed in a turn; every request in flight ends with an error")
            self._recover()
            return True

    def _recover(self) -> None:
        """Start the engine anew; what was in flight ends with an error."""
        self.failures += 1
        try:
            self._engine.reset(WORKER_FAILED)
        except Exception:
            log.exception("the engine could not be started anew")
            self.dead = True
        for ticket in list(self._live.values()):
            self._end(ticket, Ending("error", WORKER_FAILED))

    def _add(self, tickets: Sequence[Ticket]) -> None:
        for ticket in tickets:
            if not ticket.aborting:
                self._add_one(ticket)
            else:
                self._end(ticket, Ending("abort"))

    def _add_one(self, ticket: Ticket) -> None:
        job = ticket.job
        request = Request(
            request_id=ticket.number,
            arrival_s=self._engine.clock(),
            prompt_tokens=len(job.prompt),
            output_tokens=job.max_tokens,
            adapter=job.adapter,
            page_keys=job.page_keys,
        )
        if self.dead:
            self._end(ticket, Ending("error", ENGINE_DOWN))
            return
        self._live[ticket.number] = ticket
        try:
            ticket.generation = self._engine.add(
                request, job.prompt, sampling=job.sampling, stop_tokens=job.stop_tokens
            )
        except RefusedError as error:
            self._end(ticket, Ending("refused", self._scrub(str(error)), never=True))
        except Exception:
            log.exception("the engine failed to take a request")
            self._end(ticket, Ending("error", WORKER_FAILED))

    def _abort(self, tickets: Sequence[Ticket], reason: FinishReason) -> None:
        for ticket in tickets:
            if ticket.number not in self._live or ticket.generation is None:
                continue
            try:
                self._engine.abort(ticket.generation, reason)
            except Exception:
                log.exception(
                    "the engine failed to abort a request; every request in flight ends with an error"
                )
                self._recover()
            self._end(ticket, Ending("abort"))

    def _on_token(self, generation: Generation, token: int) -> None:
        ticket = self._live.get(_number(generation))
        if ticket is not None:
            self._outgoing.append((ticket, token))

    def _on_end(self, generation: Generation) -> None:
        ticket = self._live.get(_number(generation))
        if ticket is None:
            return
        ticket.cached_tokens = generation.sequence.found_tokens
        ticket.waited_for_adapter = generation.sequence.load_wait_s > 0
        error = None if generation.error is None else self._scrub(generation.error)
        self._end(ticket, Ending(generation.finish_reason or "error", error))

    def _end(self, ticket: Ticket, ending: Ending) -> None:
        self._live.pop(ticket.number, None)
        self._outgoing.append((ticket, ending))

    def _flush(self) -> None:
        if self._outgoing:
            news, self._outgoing = self._outgoing, []
            self._post(self._deliver, news)

    def _post(self, function: Callable[..., Any], *arguments: Any) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is there to hear it
            self._loop.call_soon_threadsafe(function, *arguments)


def _number(generation: Generation) -> int:
    return int(generation.request.request_id)


def _set_result(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)


def _set_exception(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
