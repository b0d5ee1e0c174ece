"""The engine: requests with tokens in, generated tokens out, one loop turn at a time.

    turn():  loads that ended → plan n+1 → launch n+1 → wait for n → complete n

so the host plans and sends step n+1 while the GPU runs step n. One thread owns an engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Set
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from engine.blueprint import Blueprint
from engine.group_store import GroupStore
from engine.host_store import HostStore, PreparedAdapter
from engine.prefix_keys import keys_of_tokens
from engine.requests import Request
from engine.runner import InFlight, Runner
from engine.sampling import GREEDY, Sampling
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from engine.step import StepShape

FinishReason = Literal["length", "stop", "abort", "error", "refused"]


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


@dataclass(slots=True, eq=False)
class Generation:
    """A request being served and, in the end, its timeline; instants on the engine's clock.

    stop_tokens: tokens that end it; they are not part of `tokens`. error: why it ended with finish_reason `error` or `refused`.
    """

    request: Request
    sequence: Sequence
    prompt: NDArray[np.int32]
    sampling: Sampling = GREEDY
    stop_tokens: Set[int] = frozenset()
    tokens: list[int] = field(default_factory=list)
    first_token_s: float | None = None
    finish_s: float | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None


class Engine:
    """Serves requests on one runner. `clock` gives seconds since the start of serving.

    on_token: called with each new token, on the engine's thread. on_end: called once a generation has ended, however it did.
    keep_steps: remember a record of every step. cache_outputs: let later prompts share the KV of what was generated.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        runner: Runner,
        clock: Callable[[], float] | None = None,
        *,
        keep_steps: bool = True,
        cache_outputs: bool = False,
    ) -> None:
        self.blueprint = blueprint
        self.runner = runner
        self.scheduler = self._new_scheduler()
        started_s = time.perf_counter()
        self.clock: Callable[[], float] = clock or (lambda: time.perf_counter() - started_s)
        self.on_token: Callable[[Generation, int], None] | None = None
        self.on_end: Callable[[Generation], None] | None = None
        self.steps: list[StepRecord] = []
        self._keep_steps = keep_steps
        self._cache_outputs = cache_outputs and blueprint.config.prefix_caching
        self._generations: dict[Sequence, Generation] = {}
        self._in_flight: InFlight | None = None
        self._leaving: list[str] = []  # adapters to be forgotten when the scheduler has

    def _new_scheduler(self) -> Scheduler:
        scheduler, merging = self.blueprint.new_scheduler(), self.runner.merging
        if merging is not None and scheduler.hot is not None:
            merging.merge_for_good(scheduler.hot)
        if merging is not None and scheduler.merging is not None:
            scheduler.merging.may_merge = merging.may_merge
        return scheduler

    # ---- requests ----

    def add(
        self,
        request: Request,
        prompt: NDArray[np.int32],
        sampling: Sampling = GREEDY,
        stop_tokens: Set[int] = frozenset(),
    ) -> Generation:
        """Queue a request with its prompt's token ids. Raises RefusedError when it can never run."""
        sequence = self.scheduler.add(request)
        tokens = np.asarray(prompt, dtype=np.int32)
        generation = Generation(request, sequence, tokens, sampling, stop_tokens)
        self._generations[sequence] = generation
        return generation

    def abort(self, generation: Generation, reason: FinishReason = "abort", error: str | None = None) -> None:
        """End a generation now; one that has ended stays as it is."""
        if generation.finish_reason is None:
            self.scheduler.abort(generation.sequence)
            self._finish(generation, reason, error)

    @property
    def busy(self) -> bool:
        """Whether a turn would find something to do."""
        work = self._generations or self._in_flight is not None or self._leaving
        return bool(work) or self.runner.loader.num_loading > 0

    # ---- adapters ----

    @property
    def store(self) -> HostStore | GroupStore:
        """Where adapters are prepared."""
        return self.runner.store

    def register(self, name: str, prepared: PreparedAdapter) -> None:
        """Let requests name an adapter. Raises ValueError where the name is taken."""
        self._forget_adapters()
        if self.scheduler.is_registered(name):
            raise ValueError(f"adapter {name!r} is registered already")
        footprint = self.blueprint.footprint(prepared.spec)
        self.runner.store.put(name, prepared)
        self.scheduler.register(name, footprint)

    def unregister(self, name: str) -> None:
        """Take no more requests for an adapter; those that are there are served, then it is forgotten. Raises ValueError where it is unknown."""
        self.scheduler.unregister(name)
        self._leaving.append(name)
        self._forget_adapters()

    def _forget_adapters(self) -> None:
        gone = [name for name in self._leaving if not self.scheduler.is_registered(name)]
        for name in gone:
            self._leaving.remove(name)
            self.runner.store.remove(name)

    # ---- the loop ----

    def turn(self) -> bool:
        """Do one loop turn; return False when nothing could be planned and nothing was in flight."""
        began_s = time.perf_counter()
        now_s = self.clock()
        self._take_loads(now_s)
        step = self.scheduler.schedule(now_s)
        for sequence, reason in self.scheduler.take_refused():
            self._finish(self._generations[sequence], "refused", reason)
        for load in self.scheduler.take_loads():
            self.runner.start_load(load)
        launched = None
        if step is not None:
            prefilling = {chunk.sequence: self._all_tokens(chunk.sequence) for chunk in step.prefills}
            sampling = {sequence: self._generations[sequence].sampling for sequence in prefilling}
            launched = self.runner.launch(step, prefilling, sampling)
        host_s = time.perf_counter() - began_s
        previous, self._in_flight = self._in_flight, launched
        if previous is not None:
            self._end(previous, host_s)
        if self._leaving:
            self._forget_adapters()
        return previous is not None or launched is not None

    def drain(self) -> None:
        """Serve until nothing is left."""
        while self.busy:
            if not self.turn():
                time.sleep(20e-6)  # an adapter is on its way

    def close(self) -> None:
        """End the other ranks, where there are any."""
        self.runner.close()

    def reset(self, error: str) -> None:
        """Start anew after a failure: every generation ends with `error`, and all pages are free. Registered adapters stay."""
        registered = self.scheduler.residency.footprints
        self.runner.reset()
        self._in_flight = None
        self.scheduler = self._new_scheduler()
        for name, footprint in registered.items():
            if name in self._leaving:
                self.runner.store.remove(name)
            elif not self.scheduler.is_registered(name):
                self.scheduler.register(name, footprint)
        for name in list(self.scheduler.residency.footprints):
            if name not in registered or name in self._leaving:
                self.scheduler.unregister(name)
        self._leaving = []
        for generation in list(self._generations.values()):
            self._finish(generation, "error", error)

    def _take_loads(self, now_s: float) -> None:
        loader = self.runner.loader
        for adapter in loader.finished():
            self.scheduler.load_finished(adapter, now_s)
        for adapter, reason in loader.failed():
            for sequence in self.scheduler.load_failed(adapter):
                self._finish(self._generations[sequence], "error", reason)

    def _end(self, flight: InFlight, host_s: float) -> None:
        tokens, gpu_s = self.runner.wait(flight)
        ended_s = self.clock()
        began_s = time.perf_counter()
        for sequence, token in zip(flight.sampled.sequences, tokens.tolist(), strict=True):
            generation = self._generations.get(sequence)
            if generation is not None:  # else it ended while this step was in flight
                self._take_token(generation, token, ended_s)
        for sequence in flight.step.finishing:
            generation = self._generations.get(sequence)
            if generation is not None:
                self._finish(generation, "length", None, ended_s)
        self.scheduler.complete(flight.step)
        if self._keep_steps:
            self._record(flight, ended_s, gpu_s, host_s + time.perf_counter() - began_s)

    def _take_token(self, generation: Generation, token: int, ended_s: float) -> None:
        if generation.first_token_s is None:
            generation.first_token_s = ended_s
        if token in generation.stop_tokens:
            self._finish(generation, "stop", None, ended_s)
            self.scheduler.abort(generation.sequence)
            return
        generation.tokens.append(token)
        if self.on_token is not None:
            self.on_token(generation, token)

    def _finish(
        self, generation: Generation, reason: FinishReason, error: str | None, now_s: float | None = None
    ) -> None:
        del self._generations[generation.sequence]
        generation.finish_s = self.clock() if now_s is None else now_s
        generation.finish_reason = reason
        generation.error = error
        if self._cache_outputs and reason in ("length", "stop"):
            self._keep_output(generation)
        if self.on_end is not None:
            self.on_end(generation)

    def _keep_output(self, generation: Generation) -> None:
        """Let later prompts find the KV of all tokens but the last one, whose KV was never written."""
        tokens = np.concatenate([generation.prompt, np.asarray(generation.tokens[:-1], dtype=np.int32)])
        keys = keys_of_tokens(generation.request.adapter, tokens, self.blueprint.config.page_tokens)
        self.scheduler.keep_output(generation.sequence, keys)

    def _record(self, flight: InFlight, ended_s: float, gpu_s: float, host_s: float) -> None:
        record = StepRecord(
            index=flight.step.index,
            ended_s=ended_s,
            gpu_s=gpu_s,
            host_s=host_s,
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
