"""The thread that owns the engine and runs its turns.

Commands reach it by a queue and run between turns; tokens and endings go out in one batch a turn. Without work it sleeps on its queue.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Sequence

from engine.engine import Engine, FinishReason, Generation
from engine.replica_process import WORKER_FAILED
from engine.replicated_engine import ReplicatedEngine
from engine.requests import Request
from engine.scheduler import RefusedError
from engine.server.errors import Scrubber
from engine.server.tickets import Ending, Ticket

LOAD_POLL_S = 200e-6  # how often a turn looks for an adapter on its way when nothing else can run
ENGINE_DOWN = "the engine has failed and could not be started anew"

AnyEngine = Engine | ReplicatedEngine
News = list[tuple[Ticket, int | Ending]]

log = logging.getLogger("engine.server")


class EngineThread:
    """Runs an engine. `do`, `start` and `stop` are for other threads; functions given to `do` run on this one.

    deliver: is called on this thread with what came of a turn. An exception of the engine ends everything in flight with an error and starts the
    engine anew; where that fails too it is `dead`, and everything that comes ends with an error.
    """

    def __init__(self, engine: AnyEngine, *, scrub: Scrubber, deliver: Callable[[News], None]) -> None:
        self.engine = engine
        self.failures = 0
        self.dead = False
        self._scrub = scrub
        self._deliver = deliver
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._live: dict[int, Ticket] = {}  # in the engine
        self._news: News = []  # since the last delivery
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # ---- for other threads ----

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def do(self, command: Callable[[], None]) -> None:
        """Have a function run between two turns. It must not raise."""
        self._commands.put(command)

    def stop(self) -> None:
        """End after the turn under way, and wait for that."""
        self._stopping = True
        self.do(lambda: None)
        self._thread.join()

    # ---- commands ----

    def add(self, tickets: Sequence[Ticket]) -> None:
        """Give generations to the engine, but those that were given up meanwhile."""
        for ticket in tickets:
            if ticket.aborting:
                self._end(ticket, Ending("abort"))
            elif self.dead:
                self._end(ticket, Ending("error", ENGINE_DOWN))
            else:
                self._add_one(ticket)

    def _add_one(self, ticket: Ticket) -> None:
        job = ticket.job
        request = Request(
            request_id=ticket.number,
            arrival_s=self.engine.clock(),
            prompt_tokens=len(job.prompt),
            output_tokens=job.max_tokens,
            adapter=job.adapter,
            page_keys=job.page_keys,
        )
        self._live[ticket.number] = ticket
        try:
            ticket.generation = self.engine.add(
                request, job.prompt, sampling=job.sampling, stop_tokens=job.stop_tokens
            )
        except RefusedError as error:
            self._end(ticket, Ending("refused", self._scrub(str(error)), never=True))
        except Exception:
            log.exception("the engine failed to take a request")
            self._recover()

    def abort(self, tickets: Sequence[Ticket], reason: FinishReason) -> None:
        """End generations that are in the engine."""
        for ticket in tickets:
            if ticket.number not in self._live or ticket.generation is None:
                continue
            try:
                self.engine.abort(ticket.generation, reason)
            except Exception:
                log.exception("the engine failed to abort a request")
                self._recover()

    # ---- the thread's ----

    def _run(self) -> None:
        self.engine.on_token = self._on_token
        self.engine.on_end = self._on_end
        if isinstance(self.engine, ReplicatedEngine):
            self.engine.listen(lambda: self.do(_wake))
        while not self._stopping:
            working = not self.dead and self.engine.busy
            self._obey(None if not working else 0.0)
            if working and not self._turn():
                self._obey(LOAD_POLL_S)
            if self._news:
                news, self._news = self._news, []
                self._deliver(news)

    def _obey(self, wait_s: float | None) -> None:
        """Run the commands that are there; wait for the first so long, None: for ever."""
        with contextlib.suppress(queue.Empty):
            command = self._commands.get(block=wait_s != 0.0, timeout=wait_s or None)
            while True:
                command()
                command = self._commands.get_nowait()

    def _turn(self) -> bool:
        if self.dead:  # since a command
            return True
        try:
            return self.engine.turn()
        except Exception:
            log.exception("the engine failed in a turn")
            self._recover()
            return True

    def _recover(self) -> None:
        """Start the engine anew; what was in flight ends with an error."""
        self.failures += 1
        try:
            self.engine.reset(WORKER_FAILED)
        except Exception:
            log.exception("the engine could not be started anew")
            self.dead = True
        for ticket in list(self._live.values()):
            self._end(ticket, Ending("error", WORKER_FAILED))

    def _on_token(self, generation: Generation, token: int) -> None:
        ticket = self._live.get(_number(generation))
        if ticket is not None:
            self._news.append((ticket, token))

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
        self._news.append((ticket, ending))


def _wake() -> None:
    """Do nothing, so that the thread looks for what there is to do."""


def _number(generation: Generation) -> int:
    return int(generation.request.request_id)
