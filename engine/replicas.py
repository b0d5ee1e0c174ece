"""Replicas of a configuration: processes with an engine each, behind the router.

The first process routes requests and collects what became of them. A replica that dies is routed around: its unfinished requests go to the others.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engine.adapter import AdapterSpec
from engine.config import ServingConfig
from engine.errors import UserError
from engine.processes import end_with_parent, stop
from engine.requests import Request
from engine.router import Router

if TYPE_CHECKING:
    from engine.engine import Engine, Generation, StepRecord

START_TIMEOUT_S = 900.0
IDLE_S = 0.01


class ReplicaError(RuntimeError):
    """No replica is left, or one cannot be built."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    config: ServingConfig  # of one replica
    adapters: Mapping[str, AdapterSpec]
    seed: int
    devices: str


class Replicas:
    """The replicas of a configuration. One thread owns it."""

    def __init__(self, config: ServingConfig, adapters: Mapping[str, AdapterSpec], *, seed: int = 0) -> None:
        self._router = Router(config.router, config.replicas)
        self._pending: dict[int | str, tuple[int, Request, NDArray[np.int32]]] = {}
        self._pipes: dict[int, Connection] = {}
        self._processes: list[BaseProcess] = []
        self.lost: list[int] = []
        context = multiprocessing.get_context("spawn")
        for index in range(config.replicas):
            ours, theirs = context.Pipe()
            devices = ",".join(str(index * config.tp + rank) for rank in range(config.tp))
            task = _Task(
                config=config.with_changes(replicas=1), adapters=adapters, seed=seed, devices=devices
            )
            # Not a daemon, which could have no ranks of its own; it ends with its parent all the same.
            process = context.Process(target=serve_replica, args=(task, theirs), name=f"replica-{index}")
            process.start()
            theirs.close()
            self._pipes[index] = ours
            self._processes.append(process)

    def await_ready(self) -> None:
        """Wait until all are built. Raises UserError or ReplicaError where one cannot be."""
        for index, pipe in self._pipes.items():
            if not pipe.poll(START_TIMEOUT_S):
                raise ReplicaError(f"replica {index} is not ready after {START_TIMEOUT_S:.0f} s")
            try:
                kind, *rest = pipe.recv()
            except EOFError:
                raise ReplicaError(f"replica {index} died while it was built") from None
            if kind == "user_error":
                raise UserError(f"replica {index}: {rest[0]}")

    @property
    def num_unfinished(self) -> int:
        return len(self._pending)

    def begin(self, started_s: float) -> None:
        """Start anew, from cold GPUs, with clocks that count from `started_s` of time.perf_counter, which all processes share."""
        for index in list(self._pipes):
            self._tell(index, ("begin", started_s))

    def submit(self, request: Request, prompt: NDArray[np.int32]) -> int:
        """Route a request and send it; return the replica. Raises ReplicaError where none is left."""
        index = self._router.route(request.adapter, request.prompt_tokens + request.output_tokens)
        self._pending[request.request_id] = (index, request, prompt)
        self._tell(index, ("request", request, prompt))
        return index

    def ended(self, wait_s: float = 0.0) -> list[tuple[int | str, int, Timeline]]:
        """Return (request id, replica, timeline) of what ended since the last call; wait so long for something at most."""
        found = []
        for ready in wait(list(self._pipes.values()), wait_s):
            index = next(i for i, pipe in self._pipes.items() if pipe is ready)
            try:
                while self._pipes[index].poll():
                    _, request_id, timeline = self._pipes[index].recv()
                    self._forget(request_id)
                    found.append((request_id, index, timeline))
            except (EOFError, ConnectionError):
                self._lose(index)
        return found

    def reports(self) -> dict[int, ReplicaReport]:
        """Return what each replica that is left did since `begin`; nothing may be unfinished."""
        found: dict[int, ReplicaReport] = {}
        for index in list(self._pipes):
            self._tell(index, ("report",))
            found[index] = self._pipes[index].recv()[1]
        return found

    def close(self) -> None:
        """End the processes."""
        stop(self._pipes.values(), self._processes)

    def _forget(self, request_id: int | str) -> None:
        index, request, _ = self._pending.pop(request_id)
        self._router.finished(index, request.prompt_tokens + request.output_tokens)

    def _tell(self, index: int, message: tuple[Any, ...]) -> None:
        try:
            self._pipes[index].send(message)
        except OSError:
            self._lose(index)

    def _lose(self, index: int) -> None:
        """Route around a replica that died, and send what it had not finished to the others, from the start."""
        if index in self.lost:
            return
        self.lost.append(index)
        del self._pipes[index]
        if not self._pipes:
            raise ReplicaError("no replica is left")
        self._router.remove(index)
        orphans = [(request, prompt) for i, request, prompt in self._pending.values() if i == index]
        for request, _ in orphans:
            self._forget(request.request_id)
        for request, prompt in orphans:
            self.submit(request, prompt)


# ---- in the other processes ----


def serve_replica(task: _Task, pipe: Connection) -> None:
    """Build an engine and serve until the pipe closes."""
    end_with_parent()
    os.environ["CUDA_VISIBLE_DEVICES"] = task.devices  # before torch is imported
    from engine.build import build_runner
    from engine.engine import Engine

    try:
        runner = build_runner(task.config, task.adapters, seed=task.seed)
    except UserError as error:
        pipe.send(("user_error", str(error)))
        return
    pipe.send(("ready",))
    engine = Engine(runner.blueprint, runner)
    try:
        while True:
            while pipe.poll(0 if engine.busy else IDLE_S):
                kind, *rest = pipe.recv()
                if kind == "stop":
                    return
                if kind == "begin":
                    runner.reset()
                    engine = _fresh_engine(engine, pipe, rest[0])
                elif kind == "request":
                    _add(engine, pipe, *rest)
                else:
                    pipe.send(("report", _report(engine)))
            if not engine.turn() and engine.busy:
                time.sleep(20e-6)  # an adapter is on its way
    except (EOFError, BrokenPipeError):
        return
    finally:
        runner.close()


def _fresh_engine(engine: Engine, pipe: Connection, started_s: float) -> Engine:
    fresh = type(engine)(engine.blueprint, engine.runner, lambda: time.perf_counter() - started_s)
    fresh.on_end = lambda generation: pipe.send(
        ("ended", generation.request.request_id, timeline_of(generation))
    )
    return fresh


def _add(engine: Engine, pipe: Connection, request: Request, prompt: NDArray[np.int32]) -> None:
    from engine.scheduler import RefusedError

    try:
        engine.add(request, prompt)
    except RefusedError as error:
        pipe.send(("ended", request.request_id, Timeline(refused=str(error))))


def _report(engine: Engine) -> ReplicaReport:
    import torch

    used = None
    if engine.runner.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(engine.runner.device)
        used = total - free
    return ReplicaReport(
        steps=engine.steps, adapter_loads=engine.scheduler.residency.loads, memory_used_bytes=used
    )
