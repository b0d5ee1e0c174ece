"""Replicas as one engine: what engine/server asks of an Engine, answered by processes behind the router.

Requests go to a replica each; what the replicas tell of their turns is handed on in this engine's turns. Adapters are registered on all of them.

A replica that dies: those of its requests that have no token yet start again on the others; the rest end with an error.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set

import numpy as np
from numpy.typing import NDArray

from engine.adapter import AdapterSpec
from engine.blueprint import Blueprint, blueprint
from engine.config import ServingConfig
from engine.engine import FinishReason, Generation
from engine.errors import UserError
from engine.group_store import SharedAdapter, objection
from engine.host_store import HostAdapter, PreparedAdapter
from engine.replica_process import Outcome
from engine.replicas import LOST, Message, ReplicaError, Replicas
from engine.requests import Request
from engine.sampling import GREEDY, Sampling
from engine.scheduler import RefusedError
from engine.sequence import Sequence as SequenceState
from engine.snapshot import Snapshot

SNAPSHOT_TIMEOUT_S = 10.0
REPLICA_LOST = "the replica that served this request died after its first token; please try again"
NONE_LEFT = "the replica that served this request died, and none is left"


class ReplicatedStore:
    """Where adapters are prepared, on all replicas at once. From any thread."""

    def __init__(self, replicas: Replicas, plan: Blueprint) -> None:
        self._replicas = replicas
        self._plan = plan

    def prepare(self, spec: AdapterSpec) -> SharedAdapter:
        """Have every replica read, check and pack an adapter; slow. Raises UserError where one cannot, and then none has it."""
        self._plan.check_adapter(spec)
        number = self._replicas.ask("prepare", spec)
        verdicts = self._replicas.questions.wait(number)
        if not verdicts:
            raise ReplicaError("no replica is left")
        refusal = objection(verdicts, "replica")
        if refusal is not None:
            self._replicas.tell_all(("discard", number))
            raise refusal
        return SharedAdapter(HostAdapter(spec, self._plan.layout_of(spec)), number)

    def discard(self, prepared: PreparedAdapter) -> None:
        """Let a prepared adapter go that is not registered."""
        assert isinstance(prepared, SharedAdapter)
        self._replicas.tell_all(("discard", prepared.number))


class ReplicatedEngine:
    """Serves requests on replicas. One thread owns it, but for `store` and `snapshots`; `clock`, `on_token` and `on_end` are as of Engine.

    failures: how often the engine of a replica failed and was started anew.
    """

    def __init__(self, config: ServingConfig, adapters: Mapping[str, AdapterSpec], *, seed: int = 0) -> None:
        self.blueprint = blueprint(config, adapters)
        _check_gpus(config)
        self.on_token: Callable[[Generation, int], None] | None = None
        self.on_end: Callable[[Generation], None] | None = None
        self.failures = 0
        self._known = self.blueprint.new_scheduler()  # says what can never run; it is given nothing to run
        self._generations: dict[int | str, Generation] = {}
        self._users: Counter[str] = Counter()  # unfinished requests by adapter
        self._leaving: set[str] = set()  # adapters to be forgotten when they have none
        self._order = itertools.count()
        self._replicas = Replicas(config, adapters, seed=seed, serving=True)
        self.store = ReplicatedStore(self._replicas, self.blueprint)
        try:
            self._replicas.await_ready()
        except BaseException:
            self._replicas.close()
            raise
        started_s = time.perf_counter()
        self.clock: Callable[[], float] = lambda: time.perf_counter() - started_s
        self._replicas.begin(started_s)

    @property
    def lost(self) -> Sequence[int]:
        """The replicas that died."""
        return self._replicas.lost

    @property
    def alive(self) -> Sequence[int]:
        """The replicas that are left."""
        return self._replicas.alive

    def listen(self, on_news: Callable[[], None]) -> None:
        """Have a function called, on another thread, whenever a turn finds something to do."""
        self._replicas.on_news = on_news

    # ---- requests ----

    def add(
        self,
        request: Request,
        prompt: NDArray[np.int32],
        sampling: Sampling = GREEDY,
        stop_tokens: Set[int] = frozenset(),
    ) -> Generation:
        """Send a request to a replica. Raises RefusedError when it can never run."""
        reason = self._known.why_refused(request)
        if reason is not None:
            raise RefusedError(reason)
        tokens = np.asarray(prompt, dtype=np.int32)
        state = SequenceState(request, next(self._order), request.prompt_tokens)
        generation = Generation(request, state, tokens, sampling, stop_tokens)
        self._generations[request.request_id] = generation
        if request.adapter is not None:
            self._users[request.adapter] += 1
        self._submit(generation)
        return generation

    def abort(self, generation: Generation, reason: FinishReason = "abort", error: str | None = None) -> None:
        """End a generation now; one that has ended stays as it is."""
        if generation.finish_reason is not None:
            return
        index = self._replicas.replica_of(generation.request.request_id)
        if index is not None:
            self._replicas.tell(index, ("abort", generation.request.request_id, reason))
        self._finish(generation, reason, error)

    @property
    def busy(self) -> bool:
        """Whether a turn would find something to do."""
        return self._replicas.has_news

    def _submit(self, generation: Generation) -> None:
        stop_tokens = frozenset(generation.stop_tokens)
        self._replicas.submit(generation.request, generation.prompt, generation.sampling, stop_tokens)

    # ---- adapters ----

    def register(self, name: str, prepared: PreparedAdapter) -> None:
        """Let requests name an adapter, on all replicas. Raises ValueError where the name is taken."""
        assert isinstance(prepared, SharedAdapter)
        if name in self._leaving:
            raise ValueError(f"adapter {name!r} is registered already")
        self._known.register(name, self.blueprint.footprint(prepared.spec))
        self._replicas.tell_all(("register", prepared.number))

    def unregister(self, name: str) -> None:
        """Take no more requests for an adapter; those that are there are served, then it is forgotten. Raises ValueError where it is unknown."""
        self._known.unregister(name)
        self._leaving.add(name)
        self._forget_if_unused(name)

    def _forget_if_unused(self, name: str) -> None:
        """Have the replicas forget an adapter once nobody uses it: until then each may be asked to take over another's requests."""
        if name in self._leaving and not self._users[name]:
            self._leaving.discard(name)
            self._replicas.tell_all(("unregister", name))

    # ---- the loop ----

    def turn(self) -> bool:
        """Hand on what the replicas told; return False where that was nothing. Raises ReplicaError when the last one died."""
        messages = self._replicas.receive()
        for index, message in messages:
            self._take(index, message)
        return bool(messages)

    def reset(self, error: str) -> None:
        """Start anew after a failure: every generation ends with `error`. Raises ReplicaError where no replica is left."""
        if not self._replicas.alive:
            raise ReplicaError("no replica is left")
        for generation in list(self._generations.values()):
            self.abort(generation, "error", error)

    def snapshots(self) -> dict[int, Snapshot]:
        """Return the state of each replica that is left; from any thread. Raises TimeoutError."""
        found: dict[int, Snapshot] = self._replicas.questions.wait(
            self._replicas.ask("snapshot"), SNAPSHOT_TIMEOUT_S
        )
        return dict(sorted(found.items()))

    def close(self) -> None:
        """End the replicas."""
        self._replicas.close()

    def _take(self, index: int, message: Message) -> None:
        kind, *rest = message
        if kind == LOST:
            self._lose(index)
        elif kind == "failed":
            self.failures += 1
        else:
            assert kind == "news", kind
            for request_id, token in rest[0]:
                self._take_token(request_id, token)
            for request_id, outcome in rest[1]:
                self._take_outcome(request_id, outcome)

    def _take_token(self, request_id: int | str, token: int) -> None:
        generation = self._generations.get(request_id)
        if generation is None:  # it was aborted
            return
        if generation.first_token_s is None:
            generation.first_token_s = self.clock()
        generation.tokens.append(token)
        if self.on_token is not None:
            self.on_token(generation, token)

    def _take_outcome(self, request_id: int | str, outcome: Outcome) -> None:
        generation = self._generations.get(request_id)
        if generation is not None:
            generation.sequence.found_tokens = outcome.found_tokens
            generation.sequence.load_wait_s = outcome.load_wait_s
            self._finish(generation, outcome.reason, outcome.error)

    def _lose(self, index: int) -> None:
        """Start requests of a replica that died again elsewhere, unless a token of theirs is out."""
        try:
            orphans = self._replicas.lose(index)
        except ReplicaError:
            for generation in list(self._generations.values()):
                self._finish(generation, "error", NONE_LEFT)
            raise
        for errand in orphans:
            generation = self._generations[errand.request.request_id]
            if generation.tokens:
                self._finish(generation, "error", REPLICA_LOST)
            else:
                self._submit(generation)

    def _finish(self, generation: Generation, reason: FinishReason, error: str | None) -> None:
        request = generation.request
        del self._generations[request.request_id]
        self._replicas.finished(request.request_id)
        generation.finish_s = self.clock()
        generation.finish_reason = reason
        generation.error = error
        if request.adapter is not None:
            self._users[request.adapter] -= 1
            if not self._users[request.adapter]:
                del self._users[request.adapter]
                self._forget_if_unused(request.adapter)
        if self.on_end is not None:
            self.on_end(generation)


def _check_gpus(config: ServingConfig) -> None:
    """Raise UserError where there are fewer GPUs than the replicas need."""
    if config.backend != "triton":
        return
    import torch

    if torch.cuda.device_count() < config.gpus:
        raise UserError(
            f"replicas={config.replicas} of tp={config.tp} need {config.gpus} GPUs, {torch.cuda.device_count()} are visible"
        )
