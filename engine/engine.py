"""The engine: requests with tokens in, generated tokens out, one loop turn at a time.

    turn():  loads that ended → plan n+1 → launch n+1 → wait for n → complete n

so the host plans and sends step n+1 while the GPU runs step n.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engine.blueprint import Blueprint
from engine.requests import Request
from engine.runner import InFlight, Runner
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from engine.step import StepShape


@dataclass(slots=True)
class StepRecord:
    """What one step was and took. ended_s: on the engine's clock; host_s: CPU time of the turn without waiting for the GPU."""

    index: int
    ended_s: float
    gpu_s: float
    host_s: float
    shape: StepShape
    waiting: int
    kv_pages: int
    adapter_pages: int


@dataclass(slots=True)
class Generation:
    """A request being served and, in the end, its timeline; instants on the engine's clock."""

    request: Request
    sequence: Sequence
    prompt: NDArray[np.int32]
    tokens: list[int] = field(default_factory=list)
    first_token_s: float | None = None
    finish_s: float | None = None


class Engine:
    """Serves requests on one runner. `clock` gives seconds since the start of serving."""

    def __init__(
        self, blueprint: Blueprint, runner: Runner, clock: Callable[[], float] | None = None
    ) -> None:
        self.blueprint = blueprint
        self.runner = runner
        self.scheduler: Scheduler = blueprint.new_scheduler()
        started_s = time.perf_counter()
        self.clock: Callable[[], float] = clock or (lambda: time.perf_counter() - started_s)
        self.steps: list[StepRecord] = []
        self._generations: dict[Sequence, Generation] = {}
        self._in_flight: InFlight | None = None

    def add(self, request: Request, prompt: NDArray[np.int32]) -> Generation:
        """Queue a request with its prompt's token ids. Raises RefusedError when it can never run."""
        sequence = self.scheduler.add(request)
        generation = Generation(request, sequence, np.asarray(prompt, dtype=np.int32))
        self._generations[sequence] = generation
        return generation

    @property
    def busy(self) -> bool:
        """Whether a turn would find something to do."""
        return bool(self._generations) or self._in_flight is not None

    def turn(self) -> bool:
        """Do one loop turn; return False when nothing could be planned and nothing was in flight."""
        began_s = time.perf_counter()
        now_s = self.clock()
        for adapter in self.runner.loader.finished():
            self.scheduler.load_finished(adapter, now_s)
        step = self.scheduler.schedule(now_s)
        for load in self.scheduler.take_loads():
            self.runner.start_load(load)
        launched = None
        if step is not None:
            prefilling = {chunk.sequence: self._all_tokens(chunk.sequence) for chunk in step.prefills}
            launched = self.runner.launch(step, prefilling)
        host_s = time.perf_counter() - began_s
        previous, self._in_flight = self._in_flight, launched
        if previous is not None:
            self._end(previous, host_s)
        return previous is not None or launched is not None

    def drain(self) -> None:
        """Serve until nothing is left."""
        while self.busy:
            if not self.turn():
                time.sleep(20e-6)  # an adapter is on its way

    def _end(self, flight: InFlight, host_s: float) -> None:
        tokens, gpu_s = self.runner.wait(flight)
        ended_s = self.clock()
        began_s = time.perf_counter()
        for sequence, token in zip(flight.sampled.sequences, tokens.tolist(), strict=True):
            generation = self._generations[sequence]
            generation.tokens.append(token)
            if generation.first_token_s is None:
                generation.first_token_s = ended_s
        for sequence in flight.step.finishing:
            self._generations.pop(sequence).finish_s = ended_s
        self.scheduler.complete(flight.step)
        record = StepRecord(
            index=flight.step.index,
            ended_s=ended_s,
            gpu_s=gpu_s,
            host_s=host_s + time.perf_counter() - began_s,
            shape=flight.step.shape,
            waiting=self.scheduler.num_waiting,
            kv_pages=self.scheduler.kv_pages,
            adapter_pages=self.scheduler.residency.pages_held,
        )
        self.steps.append(record)

    def _all_tokens(self, sequence: Sequence) -> NDArray[np.int32]:
        generation = self._generations[sequence]
        if not generation.tokens:
            return generation.prompt
        return np.concatenate([generation.prompt, np.asarray(generation.tokens, dtype=np.int32)])
