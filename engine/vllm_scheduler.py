"""vLLM's scheduling, behind the interface of the engine's own scheduler, so that one simulator drives both.

What is vLLM's (0.8.5, V1: `vllm/v1/core/sched/scheduler.py`): everyone who decodes is in every step; prompts fill what the token budget leaves,
in chunks; a waiting request whose adapter finds no slot is passed over; the first that finds no KV blocks ends admission; out of blocks, the
youngest is preempted and computed again; nobody is admitted in a step that preempts. There is no watermark. A missing adapter is loaded within
the step that needs it.

`chunked=False` is 0.5.0 (V0): a step is either whole prompts, which go first, or decodes; 1 % of the blocks are kept at admission.

KV blocks are counted, not named: no prefix cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from engine.decode_set import DecodeSet
from engine.requests import Request
from engine.residency import AdapterFootprint, ResidentAdapter
from engine.scheduler import RefusedError
from engine.sequence import Phase, Sequence
from engine.step import Load, PrefillChunk, Step, StepShape
from engine.vllm_slots import VllmSlots
from engine.vllm_waiting import SkippingQueue

CLIENT_FULL = "the client has as many requests open as it can"
V0_WATERMARK_SHARE = 0.01  # vllm 0.5.0, `BlockSpaceManagerV1(watermark=0.01)`


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmLimits:
    """What vLLM's scheduler obeys. max_loras: adapters in one step. max_open: requests that the client keeps open; further ones fail at once."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    max_loras: int
    block_tokens: int = 16
    chunked: bool = True
    max_open: int | None = None

    def __post_init__(self) -> None:
        if not self.chunked and self.max_num_batched_tokens < self.max_model_len:
            raise ValueError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} must be at least max_model_len={self.max_model_len} without chunked "
                "prefill: a prompt is computed in one step"
            )


@dataclass(slots=True)
class KvBlocks:
    """The KV cache by number: how many blocks there are, and how many nobody holds."""

    count: int
    free: int

    @property
    def kv_pages(self) -> int:
        """Blocks that requests hold."""
        return self.count - self.free


class VllmScheduler:
    """Requests in, `schedule()` plans a step, `complete()` ends it: strictly one after the other.

    After `schedule`: `skipped` is how many waiting requests it walked past, `loads_now` how many adapters the step loads.
    """

    def __init__(self, limits: VllmLimits, num_blocks: int, adapter_bytes: Mapping[str, int]) -> None:
        self.limits = limits
        self.memory = KvBlocks(num_blocks, num_blocks)
        self.residency = VllmSlots(limits.max_loras)
        self.queue = SkippingQueue()
        self.preemptions = 0
        self.skipped = 0
        self.loads_now = 0
        self._adapters = {
            name: ResidentAdapter(name, -1, [], AdapterFootprint(0, size, size))
            for name, size in adapter_bytes.items()
        }
        self._running: dict[Sequence, None] = {}  # oldest admission first
        self._partial: Sequence | None = None  # whose prompt is not all computed
        self._finishing = 0
        self._decoding = DecodeSet(limits.block_tokens)
        self._users: dict[str, int] = {}  # running requests by adapter
        self._started: list[str] = []  # adapters that no request of the last step used
        self._order = 0
        self._step = 0
        self._steady = False
        self._blocked = False  # none of those that wait can be admitted before something ends
        self._stopped = False  # nor can whoever comes: the walk ended for want of blocks or sequences

    # ---- requests in ----

    def add(self, request: Request) -> Sequence:
        """Queue a request. Raises RefusedError when it could not run even alone, or the client can hold no more."""
        reason = self.why_refused(request)
        if reason is not None:
            raise RefusedError(reason)
        sequence = Sequence(request, self._order, request.prompt_tokens)
        self._order += 1
        self.queue.push(sequence, running=self._is_running(request.adapter))
        self._blocked = self._blocked and not self.matters(request.adapter)
        return sequence

    def why_refused(self, request: Request) -> str | None:
        """Return why a request is not taken, or None."""
        if self.limits.max_open is not None and self.num_unfinished >= self.limits.max_open:
            return CLIENT_FULL
        tokens = request.prompt_tokens + request.output_tokens
        if tokens > self.limits.max_model_len:
            return f"{tokens} tokens exceed max_model_len={self.limits.max_model_len}"
        if self._blocks_for(tokens) > self.memory.count:
            return f"{self._blocks_for(tokens)} blocks needed for {tokens} tokens, the KV cache has {self.memory.count}"
        if request.adapter is not None and request.adapter not in self._adapters:
            return f"adapter {request.adapter!r} is not registered"
        return None

    def admits(self, adapter: str | None) -> bool:
        """Whether a request that came now could be admitted before something ends, as far as slots go."""
        return adapter is None or adapter in self._users or len(self._users) < self.limits.max_loras

    def matters(self, adapter: str | None) -> bool:
        """Whether a request that comes now may change the next step."""
        return not self._stopped and self.admits(adapter)

    # ---- what is going on ----

    @property
    def num_waiting(self) -> int:
        return len(self.queue)

    @property
    def num_running(self) -> int:
        return len(self._running) + self._finishing

    @property
    def num_unfinished(self) -> int:
        return len(self.queue) + self.num_running

    def count_pages(self) -> None:
        """Blocks are only ever counted."""

    def take_refused(self) -> list[tuple[Sequence, str]]:
        """Nobody is turned away later."""
        return []

    def take_loads(self) -> list[Load]:
        """Loads are part of the step (`loads_now`), not on their way beside it."""
        return []

    # ---- planning ----

    def schedule(self, now_s: float) -> Step | None:
        """Plan the next step; None when nobody can run."""
        self.skipped = self.loads_now = 0
        step = Step(index=self._step, shape=StepShape())
        self._steady = False
        if self.limits.chunked:
            decode = True
            if self._grow(step):
                self._admit(step, self._left_budget(step), now_s)
        else:
            self._admit(step, self.limits.max_num_batched_tokens, now_s)
            decode = not step.prefills
            if decode:
                self._grow(step)
        step.joined, step.left = self._decoding.take_changes()
        rows = len(self._decoding) if decode else 0
        if not rows and not step.prefills:
            return None
        step.shape = self._shape(step, rows)
        if self._started:
            self.loads_now = self.residency.enter(self._users.keys(), self._started, self._step)
            self._started = []
        self._end_last_tokens(step, rows)
        self._steady = not step.prefills and not step.finishing and self._partial is None
        self._step += 1
        return step

    def complete(self, step: Step) -> None:
        """Note that the GPU has done the step: what ended in it gives its blocks and adapter back."""
        for sequence in step.finishing:
            self._finishing -= 1
            self._let_go(sequence)
            sequence.phase = Phase.DONE
        if step.finishing:
            self._blocked = self._stopped = False

    # ---- many equal steps at once ----

    def extendable(self) -> int:
        """Return how many further steps would be planned exactly like the last one, but for one more KV token a row each."""
        if not self._steady or (self.queue and not self._blocked):
            return 0
        steps = self._decoding.ticks_to_finish()
        if self._decoding.growth(steps) <= self.memory.free:
            return steps
        free = self.memory.free
        for done in range(steps):
            free -= self._decoding.growth_at(done)
            if free < 0:
                return done
        return steps

    def extend(self, steps: int) -> None:
        """Plan and complete `steps` further steps like the last one; at most `extendable()`."""
        self.memory.free -= self._decoding.growth(steps)
        self._decoding.skip(steps)
        self._step += steps

    # ---- decodes and the prompt that was begun ----

    def _grow(self, step: Step) -> bool:
        """Take the blocks of tokens to come, preempting the youngest while there are too few; return whether nobody had to go."""
        before = self.preemptions
        while self._decoding.growth_at(0) > self.memory.free:
            self._preempt(next(reversed(self._running)))
        self.memory.free -= self._decoding.growth_at(0)
        sequence = self._partial
        if sequence is not None:
            length = min(self._left_budget(step), sequence.prefill_tokens - sequence.prefilled)
            if self._missing_blocks(sequence, length) > self.memory.free:
                self._preempt(sequence)
            elif length > 0:
                self._plan_chunk(step, sequence, length)
        return self.preemptions == before

    def _left_budget(self, step: Step) -> int:
        return (
            self.limits.max_num_batched_tokens
            - len(self._decoding)
            - sum(chunk.length for chunk in step.prefills)
        )

    def _missing_blocks(self, sequence: Sequence, length: int) -> int:
        return self._blocks_for(sequence.prefilled + length) - sequence.held_pages

    def _plan_chunk(self, step: Step, sequence: Sequence, length: int) -> None:
        wanted = self._missing_blocks(sequence, length)
        self.memory.free -= wanted
        sequence.held_pages += wanted
        start, end = sequence.prefilled, sequence.prefilled + length
        last = end == sequence.prefill_tokens
        step.prefills.append(PrefillChunk(sequence, start, length, last))
        sequence.prefilled = end
        self._partial = None if last else sequence

    # ---- admission ----

    def _admit(self, step: Step, budget: int, now_s: float) -> None:
        """Admit in order, passing over whose adapter finds no slot, until tokens, sequences or blocks run out."""
        stop: int | None = None  # the place that the walk ended at; None: it went through
        kept = 0 if self.limits.chunked else int(self.memory.count * V0_WATERMARK_SHARE)
        self._blocked = self._stopped = False
        while self.queue:
            full = len(self._users) >= self.limits.max_loras
            found = self.queue.first(self._users if full else None)
            if found is None:
                self._blocked = True
                break
            stop, sequence = found
            if budget <= 0 or self.num_running >= self.limits.max_num_seqs:
                self._blocked = self._stopped = budget > 0
                break
            length = min(budget, sequence.prefill_tokens)
            if length < sequence.prefill_tokens and not self.limits.chunked:
                break
            if self._blocks_for(length) > self.memory.free - kept:
                self._blocked = self._stopped = True
                break
            stop = None
            self._start(sequence, now_s)
            self._plan_chunk(step, sequence, length)
            budget -= length
        self.skipped = len(self.queue) if stop is None else self.queue.before(stop)

    def _start(self, sequence: Sequence, now_s: float) -> None:
        name = sequence.request.adapter
        self.queue.take(sequence, running=True)
        if name is not None:
            if name not in self._users:
                self._started.append(name)
                self.queue.opened(name)
            self._users[name] = self._users.get(name, 0) + 1
            sequence.resident = self._adapters[name]
        sequence.phase = Phase.PREFILL
        if sequence.admitted_s is None:
            sequence.admitted_s = now_s
        self._running[sequence] = None

    def _is_running(self, adapter: str | None) -> bool:
        return adapter is None or adapter in self._users

    # ---- ends ----

    def _end_last_tokens(self, step: Step, rows: int) -> None:
        if rows:
            for sequence in self._decoding.advance():
                self._decoding.leave(sequence)
                self._finish(sequence, step)
        for chunk in step.prefills:
            if chunk.last:
                sequence = chunk.sequence
                sequence.generated += 1
                if sequence.generated == sequence.request.output_tokens:
                    self._finish(sequence, step)
                else:
                    self._decoding.join(sequence)

    def _finish(self, sequence: Sequence, step: Step) -> None:
        del self._running[sequence]
        self._finishing += 1
        sequence.phase = Phase.FINISHING
        step.finishing.append(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        if sequence.phase is Phase.DECODE:
            self._decoding.leave(sequence)
        if self._partial is sequence:
            self._partial = None
        del self._running[sequence]
        self._let_go(sequence)
        sequence.phase = Phase.WAITING
        sequence.prefill_tokens = sequence.request.prompt_tokens + sequence.generated
        sequence.prefilled = 0
        sequence.preemptions += 1
        self.preemptions += 1
        self._blocked = self._stopped = False
        self.queue.push_front(sequence, running=self._is_running(sequence.request.adapter))

    def _let_go(self, sequence: Sequence) -> None:
        self.memory.free += sequence.held_pages
        sequence.held_pages = 0
        sequence.resident = None
        name = sequence.request.adapter
        if name is None:
            return
        self._users[name] -= 1
        if not self._users[name]:
            del self._users[name]
            if name in self._started:
                self._started.remove(name)
            else:
                self.residency.left(name, self._step - 1)

    # ---- counts ----

    def _shape(self, step: Step, rows: int) -> StepShape:
        """Return the facts of the step that cost time: the longest sequence is not one."""
        decoding = self._decoding
        tokens = chunks_kv = samples = 0
        for chunk in step.prefills:
            tokens += chunk.length
            chunks_kv += chunk.start + chunk.length
            samples += chunk.last
        named = {chunk.sequence.request.adapter for chunk in step.prefills} - {None}
        adapters = len(self._users) if rows else len(named)  # whoever runs is in a step that decodes
        return StepShape(
            decode_rows=rows,
            decode_kv_tokens=decoding.kv_tokens() if rows else 0,
            prefill_tokens=tokens,
            prefill_chunks=len(step.prefills),
            prefill_kv_tokens=chunks_kv,
            sample_rows=rows + samples,
            lora_tokens=rows + tokens,
            lora_adapters=adapters,
        )

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.limits.block_tokens)

    # ---- integrity ----

    def running(self) -> Iterator[Sequence]:
        """Yield those that run and have not ended."""
        yield from self._running

    def check_integrity(self) -> None:
        """Raise AssertionError unless blocks are conserved and counters agree with the sequences. Only between steps."""
        assert self._finishing == 0, "a step is under way"
        decoding = [s for s in self._running if s.phase is Phase.DECODE]
        self._decoding.check_integrity(decoding)
        held = sum(
            self._decoding.pages_of(s) if s.phase is Phase.DECODE else s.held_pages for s in self._running
        )
        assert held + self.memory.free == self.memory.count, "blocks are not conserved"
        users: dict[str, int] = {}
        for s in self._running:
            if s.request.adapter is not None:
                users[s.request.adapter] = users.get(s.request.adapter, 0) + 1
        assert users == self._users and len(users) <= self.limits.max_loras
        assert len(self.residency) <= self.limits.max_loras
        assert all(name in self.residency or name in self._started for name in users)
        self.queue.check_integrity()
