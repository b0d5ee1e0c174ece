"""One replica: a process with an engine, that does what the first process says by a pipe.

It hears: begin, request, report, stop; and, while serving, abort, prepare, discard, register, unregister, snapshot.
It says: ready or user_error; what ended (replays), or the tokens and endings of a turn in one message (serving); answers to questions; and that its
engine failed and was started anew.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engine.adapter import AdapterSpec
from engine.config import ServingConfig
from engine.errors import UserError
from engine.processes import Sender, end_with_parent
from engine.requests import Request
from engine.sampling import GREEDY, Sampling

if TYPE_CHECKING:
    from engine.engine import Engine, FinishReason, Generation, StepRecord
    from engine.runner import Runner

IDLE_S = 0.01
LOAD_POLL_S = 20e-6
WORKER_FAILED = "the engine failed while this request was running and was started anew; please try again"

log = logging.getLogger("engine")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaTask:
    """What a replica needs. config: of one; devices: which of the GPUs that are visible are its own; serving: it tells tokens as they come."""

    config: ServingConfig
    adapters: Mapping[str, AdapterSpec]
    seed: int
    devices: tuple[int, ...]
    serving: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """What became of a request: instants on the engine's clock, None where it did not come to that. refused: why it never ran, or failed."""

    scheduled_s: float | None = None
    first_token_s: float | None = None
    finish_s: float | None = None
    load_wait_s: float = 0.0
    preemptions: int = 0
    found_tokens: int = 0
    refused: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaReport:
    """What a replica did: its steps, adapter loads, and memory in use on its first GPU."""

    steps: list[StepRecord] = field(default_factory=list)
    adapter_loads: int = 0
    memory_used_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a generation ended while serving."""

    reason: FinishReason
    error: str | None = None
    found_tokens: int = 0
    load_wait_s: float = 0.0


def timeline_of(generation: Generation) -> Timeline:
    """Return the timeline of a generation that has ended."""
    sequence = generation.sequence
    return Timeline(
        scheduled_s=sequence.admitted_s,
        first_token_s=generation.first_token_s,
        finish_s=generation.finish_s,
        load_wait_s=sequence.load_wait_s,
        preemptions=sequence.preemptions,
        found_tokens=sequence.found_tokens,
        refused=generation.error,
    )


def serve_replica(task: ReplicaTask, pipe: Connection) -> None:
    """Build an engine and serve until the pipe closes."""
    end_with_parent()
    os.environ["CUDA_VISIBLE_DEVICES"] = _visible(task.devices)  # before torch is imported
    from engine.build import build_runner

    try:
        runner = build_runner(task.config, task.adapters, seed=task.seed)
    except UserError as error:
        pipe.send(("user_error", str(error)))
        return
    pipe.send(("ready",))
    try:
        (_ServingReplica if task.serving else _Replica)(runner, pipe).run()
    except (EOFError, BrokenPipeError):
        return
    finally:
        runner.close()


def _visible(devices: tuple[int, ...]) -> str:
    """Return this process's GPUs, among those that its parent may see."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if seen is None:
        return ",".join(map(str, devices))
    names = [name.strip() for name in seen.split(",") if name.strip()]
    return ",".join(names[device] for device in devices if device < len(names))


class _Replica:
    """The loop of a replica that replays: what ended is told at once, and nothing of the tokens."""

    serving = False

    def __init__(self, runner: Runner, pipe: Connection) -> None:
        self.runner = runner
        self.pipe = pipe
        self.tell = Sender(pipe)
        self.engine = self.new_engine(time.perf_counter())

    def new_engine(self, started_s: float) -> Engine:
        """Return an engine whose clock counts from an instant of time.perf_counter, which all processes share."""
        from engine.engine import Engine

        engine = Engine(
            self.runner.blueprint,
            self.runner,
            lambda: time.perf_counter() - started_s,
            keep_steps=not self.serving,
            cache_outputs=self.serving,
        )
        engine.on_end = self.on_end
        return engine

    def run(self) -> None:
        """Serve until told to stop."""
        while True:
            while self.pipe.poll(0 if self.engine.busy else IDLE_S):
                kind, *rest = self.pipe.recv()
                if kind == "stop":
                    return
                self.obey(kind, *rest)
            if not self.turn() and self.engine.busy:
                time.sleep(LOAD_POLL_S)  # an adapter is on its way

    def turn(self) -> bool:
        """Do a turn of the engine."""
        return self.engine.turn()

    def obey(self, kind: str, *rest: Any) -> None:
        """Do one thing that the first process says."""
        if kind == "begin":
            self.runner.reset()
            self.engine = self.new_engine(rest[0])
        elif kind == "request":
            self.add(*rest)
        else:
            assert kind == "report", kind
            self.tell(("report", self._report()))

    def add(
        self,
        request: Request,
        prompt: NDArray[np.int32],
        sampling: Sampling = GREEDY,
        stop_tokens: frozenset[int] = frozenset(),
    ) -> None:
        """Queue a request, or tell why not."""
        from engine.scheduler import RefusedError

        try:
            self.added(self.engine.add(request, prompt, sampling, stop_tokens))
        except RefusedError as error:
            self.refused(request, str(error))

    def added(self, generation: Generation) -> None:
        """Note a request that was queued."""

    def refused(self, request: Request, reason: str) -> None:
        """Tell of a request that can never run."""
        self.tell(("ended", request.request_id, Timeline(refused=reason)))

    def on_end(self, generation: Generation) -> None:
        """Tell what became of a request."""
        self.tell(("ended", generation.request.request_id, timeline_of(generation)))

    def _report(self) -> ReplicaReport:
        import torch

        used, device = None, self.runner.device
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            used = total - free
        engine = self.engine
        return ReplicaReport(
            steps=engine.steps, adapter_loads=engine.scheduler.residency.loads, memory_used_bytes=used
        )


class _ServingReplica(_Replica):
    """The loop of a replica of the server. An exception of the engine ends what it had with an error, and the engine is started anew."""

    serving = True

    def __init__(self, runner: Runner, pipe: Connection) -> None:
        from engine.group_store import StoreServant

        self._generations: dict[int | str, Generation] = {}
        self._tokens: list[tuple[int | str, int]] = []  # since what was told last
        self._outcomes: list[tuple[int | str, Outcome]] = []
        super().__init__(runner, pipe)
        self._servant = StoreServant(runner.store, self.tell)

    def new_engine(self, started_s: float) -> Engine:
        engine = super().new_engine(started_s)
        engine.on_token = lambda generation, token: self._tokens.append(
            (generation.request.request_id, token)
        )
        return engine

    def added(self, generation: Generation) -> None:
        self._generations[generation.request.request_id] = generation

    def refused(self, request: Request, reason: str) -> None:
        self._outcomes.append((request.request_id, Outcome(reason="refused", error=reason)))

    def on_end(self, generation: Generation) -> None:
        request_id, sequence = generation.request.request_id, generation.sequence
        del self._generations[request_id]
        outcome = Outcome(
            reason=generation.finish_reason or "error",
            error=generation.error,
            found_tokens=sequence.found_tokens,
            load_wait_s=sequence.load_wait_s,
        )
        self._outcomes.append((request_id, outcome))

    def obey(self, kind: str, *rest: Any) -> None:
        if kind == "abort":
            generation = self._generations.get(rest[0])  # None: it has just ended
            if generation is not None:
                self.engine.abort(generation, rest[1])
        elif kind == "register":
            prepared = self._servant.take(rest[0])
            self.engine.register(prepared.spec.name, prepared)
        elif kind == "unregister":
            self.engine.unregister(rest[0])
        elif kind == "snapshot":
            from engine.snapshot import take_snapshot

            self.tell(("answer", rest[0], take_snapshot(self.engine)))
        elif kind in ("prepare", "discard"):
            self._servant.obey(kind, *rest)
        else:
            super().obey(kind, *rest)

    def turn(self) -> bool:
        try:
            done = self.engine.turn()
        except Exception:
            log.exception("the engine failed in a turn")
            self.engine.reset(WORKER_FAILED)  # where that fails too, this process ends, and the others go on
            self.tell(("failed",))
            done = True
        if self._tokens or self._outcomes:
            self.tell(("news", self._tokens, self._outcomes))
            self._tokens, self._outcomes = [], []
        return done
