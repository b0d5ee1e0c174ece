"""Times whole steps of chosen shapes on the GPU, exactly as the runner runs them: copy of the metadata, graph, copy of the tokens.

Sequences are made up: pages at random, KV random, any adapters; no prompt has to be computed first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from engine.batch import DeviceBatch
from engine.operator_profile import lora_us
from engine.requests import Request
from engine.residency import AdapterFootprint, AdapterState, ResidentAdapter
from engine.runner import Runner
from engine.sequence import Phase, Sequence
from engine.step import PrefillChunk, Step, StepShape
from engine.timing import event_us, series_us, synchronize

# A step is run about 50 ms long before it is timed: that many tokens go through an 8B model then, and a small step takes as long as so many tokens,
# because the weights are read. One with prompts 250 ms: its products take more power than the GPU may draw for longer than about 100 ms, and then
# the clock falls.
TOKENS_OF_WEIGHTS = 192
WARMUP_TOKENS, MOST_WARMUP = 2048, 12
HEATING_TOKENS, MOST_HEATING = 10_240, 40


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeUpStep:
    """decodes: (KV tokens before the step, adapter) of each row; chunks: (start, length, adapter), each ending its prompt."""

    decodes: tuple[tuple[int, str | None], ...] = ()
    chunks: tuple[tuple[int, int, str | None], ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens of the step."""
        return len(self.decodes) + sum(length for _, length, _ in self.chunks)


class StepBench:
    """Runs made-up steps on a runner whose pool is full of random numbers and whose adapters, or those of `names`, all are resident."""

    def __init__(self, runner: Runner, names: Collection[str] | None = None) -> None:
        self.runner = runner
        self.residents = _place_adapters(runner, runner.blueprint.adapters if names is None else names)
        used = sum(len(resident.pages) for resident in self.residents.values())
        # In order, as an engine takes fresh pages. At random over a pool of 100 GB they would be slower to find: decodes took 3 to 6 % longer.
        self._kv_pages = np.arange(used, runner.buffers.pool.shape[0])
        plan = runner.blueprint
        updates = 2 * plan.config.max_num_seqs * runner.buffers.page_table.shape[1]
        size = runner.device_metadata.numel() + updates
        pin = runner.device.type == "cuda"
        self._metadata = torch.zeros(size, dtype=torch.int32, pin_memory=pin)
        self._tokens = torch.zeros(plan.config.max_num_seqs, dtype=torch.int64, pin_memory=pin)

    @property
    def kv_capacity_tokens(self) -> int:
        return len(self._kv_pages) * self.runner.blueprint.config.page_tokens

    def prepare(self, wanted: MadeUpStep) -> tuple[Step, DeviceBatch]:
        """Write a made-up step into the host metadata and the device."""
        runner = self.runner
        step = self._step(wanted)
        builder = runner.builder
        updates = builder.apply(Step(index=0, shape=step.shape))
        for sequence in [*step.joined, *(chunk.sequence for chunk in step.prefills)]:
            builder.enter(sequence, updates)
        builder.apply(Step(index=0, shape=step.shape, joined=step.joined))
        key = runner.key(step)
        layout = runner.layout(key.tokens)
        # Different tokens: rows that are alike switch fewer transistors, and the GPU clocks higher than it does when it serves.
        rng, vocabulary = np.random.default_rng(1), runner.blueprint.model.vocab_size
        tokens_of = {
            chunk.sequence: rng.integers(0, vocabulary, chunk.start + chunk.length, dtype=np.int32)
            for chunk in step.prefills
        }
        builder.build(step, layout, layout.views(self._metadata.numpy()), tokens_of)
        runner.send(layout, self._metadata, updates)
        synchronize(runner.device)
        return step, DeviceBatch(layout, layout.views(runner.device_metadata), key.decode_only, key.with_lora)

    def measure_us(self, wanted: MadeUpStep) -> tuple[StepShape, float]:
        """Return a step's shape and its median time on a GPU that has been at it for a while, as one that serves has."""
        step, batch = self.prepare(wanted)
        prompts = step.shape.prefill_tokens > 0
        total, most = (HEATING_TOKENS, MOST_HEATING) if prompts else (WARMUP_TOKENS, MOST_WARMUP)
        # Not by the clock: under tensor parallelism all ranks must run it as often.
        warmup = min(most, 1 + total // max(step.shape.tokens, TOKENS_OF_WEIGHTS))
        return step.shape, event_us(self.caller(step, batch), self.runner.device, warmup=warmup)

    def series_us(
        self, wanted: MadeUpStep, rounds: int, after: MadeUpStep | None = None, times: int = 0
    ) -> list[float]:
        """Return the times of `rounds` of a step and, `times` after each, another one, from the first on. `after` has the decodes of `wanted`,
        whose pages are then the same."""
        calls = [self.caller(*self.prepare(step), keep=True) for step in (wanted, after or wanted)]
        return series_us([calls[0], *[calls[1]] * times] * rounds, self.runner.device)

    def caller(self, step: Step, batch: DeviceBatch, *, keep: bool = False) -> Callable[[], None]:
        """Return what runs a prepared step once; with `keep` also after another one was prepared."""
        runner, layout = self.runner, batch.layout
        key = runner.key(step)
        used = layout.used_size(self._metadata.numpy())
        metadata = self._metadata[:used]
        if keep:
            copy = torch.empty_like(metadata, pin_memory=self._metadata.is_pinned())
            metadata = copy.copy_(metadata)

        def call() -> None:
            runner.ops.fetch_from_host(metadata, runner.device_metadata[:used])
            tokens = runner.run(key, layout)
            runner.ops.send_to_host(tokens, self._tokens[: len(tokens)])

        return call

    def measure_lora_us(self, wanted: MadeUpStep) -> tuple[StepShape, float, int]:
        """Return a step's shape, the time of one layer's shrink and expand in it, and the tokens of a tile."""
        step, batch = self.prepare(wanted)
        return step.shape, lora_us(self.runner, batch), batch.layout.tile_tokens

    def _step(self, wanted: MadeUpStep) -> Step:
        self.runner.builder.clear()
        pages = iter(self._kv_pages.tolist())
        decodes = [
            self._sequence(slot, kv, name, pages, Phase.DECODE)
            for slot, (kv, name) in enumerate(wanted.decodes)
        ]
        chunks = []
        for offset, (start, length, name) in enumerate(wanted.chunks):
            sequence = self._sequence(len(decodes) + offset, start + length, name, pages, Phase.PREFILL)
            chunks.append(PrefillChunk(sequence, start, length, True))
        shape = made_up_shape(wanted, self.runner.blueprint.footprints)
        return Step(index=0, shape=shape, joined=decodes, prefills=chunks)

    def _sequence(
        self, slot: int, kv_tokens: int, name: str | None, pages: Iterator[int], phase: Phase
    ) -> Sequence:
        request = Request(
            request_id=slot, arrival_s=0.0, prompt_tokens=kv_tokens, output_tokens=1, adapter=name
        )
        needed = kv_tokens // self.runner.blueprint.config.page_tokens + 1
        return Sequence(
            request,
            slot,
            kv_tokens,
            phase,
            slot,
            [next(pages) for _ in range(needed)],
            resident=None if name is None else self.residents[name],
        )


def made_up_shape(wanted: MadeUpStep, footprints: Mapping[str, AdapterFootprint]) -> StepShape:
    """Return the shape that the scheduler would give such a step."""
    names = [name for _, name in wanted.decodes if name is not None]
    names += [name for _, length, name in wanted.chunks if name is not None for _ in range(length)]
    weight = {name: footprints[name].weight_bytes for name in set(names)}
    rows = Counter(name for _, name in wanted.decodes if name is not None)
    kv = [tokens + 1 for tokens, _ in wanted.decodes]
    return StepShape(
        decode_rows=len(kv),
        decode_kv_tokens=sum(kv),
        decode_kv_max=max(kv, default=0),
        prefill_tokens=sum(length for _, length, _ in wanted.chunks),
        prefill_chunks=len(wanted.chunks),
        prefill_pairs=sum(length * start + length * (length + 1) // 2 for start, length, _ in wanted.chunks),
        prefill_kv_tokens=sum(start + length for start, length, _ in wanted.chunks),
        prefill_kv_max=max((start + length for start, length, _ in wanted.chunks), default=0),
        sample_rows=len(kv) + len(wanted.chunks),
        lora_tokens=len(names),
        lora_adapters=len(weight),
        lora_bytes=sum(weight.values()),
        lora_single_bytes=sum(weight[name] for name, count in rows.items() if count == 1),
        lora_token_bytes=sum(weight[name] for name in names),
    )


def _place_adapters(runner: Runner, names: Collection[str]) -> dict[str, ResidentAdapter]:
    """Fill the pool with random numbers and write the adapters' row tables, as if all had been loaded."""
    pool = runner.buffers.pool
    for first in range(0, len(pool), 1024):
        pool[first : first + 1024].normal_(0, 0.02)
    residents: dict[str, ResidentAdapter] = {}
    page = 0
    for slot, name in enumerate(names):
        footprint = runner.blueprint.footprints[name]
        pages = list(range(page, page + footprint.pages))
        page += footprint.pages
        runner.loader.register(slot, pages, runner.blueprint.layout(name))
        table = torch.from_numpy(runner.blueprint.layout(name).table(pages))
        pool[pages[0]].view(torch.int32)[: len(table)] = table.to(pool.device)
        residents[name] = ResidentAdapter(name, slot, pages, footprint, AdapterState.RESIDENT)
    synchronize(runner.device)
    return residents
