"""Runs planned steps: builds the batch, sends it in one copy, replays a CUDA graph (or runs eagerly), and fetches the sampled tokens.

On a CPU the same steps run eagerly and at once.

How a sequence's tokens are chosen is told when it prefills: `launch(step, tokens_of, sampling_of)` with a `Sampling` for the sequences of
`step.prefills` (greedy where there is none). It is taken over with a sequence's first chunk and kept until its slot goes to another.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engine.adapter_loader import AdapterLoader
from engine.batch import BatchLayout, BatchLimits, DeviceBatch, PageUpdates, batch_layout
from engine.batch_builder import BatchBuilder, SampledRows
from engine.blueprint import Blueprint
from engine.communicator import Communicator, leave
from engine.errors import UserError
from engine.expert_layers import experts_of
from engine.followers import Followers, GroupLoader
from engine.graph_sizes import graph_sizes, padded_tokens
from engine.group_store import GroupStore
from engine.host_store import HostStore
from engine.merging import Merging
from engine.model import DECODE_PROGRAMS, Model, lora_widths, new_buffers
from engine.model_shape import GROUPS
from engine.ops import ops_for
from engine.sampling import Sampling
from engine.sequence import Sequence
from engine.step import Load, Step
from engine.tensor_parallel import TensorParallel
from engine.weights import ModelWeights
from kernels.lora_launch import LAUNCH_BOUNDARIES
from kernels.lora_plan import bridge_width

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
RING = 3  # host buffers: one being written, one on the GPU, one whose tokens are being fetched


@dataclass(slots=True)
class _HostBuffers:
    """Pinned memory of one step in flight."""

    metadata: torch.Tensor
    tokens: torch.Tensor


@dataclass(slots=True)
class InFlight:
    """A launched step; `wait` ends it."""

    step: Step
    sampled: SampledRows
    host: _HostBuffers
    launched_s: float
    started: torch.cuda.Event | None
    ended: torch.cuda.Event | None


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphKey:
    """Which captured graph a step runs: padded tokens, without prefill chunks, with adapters, with dynamic ones."""

    tokens: int
    decode_only: bool
    with_lora: bool
    with_experts: bool = False


class Runner:
    """One rank of a replica: device memory, model, adapters and graphs."""

    def __init__(
        self,
        blueprint: Blueprint,
        weights: ModelWeights,
        device: torch.device,
        *,
        seed: int = 0,
        communicator: Communicator | None = None,
        followers: Followers | None = None,
    ) -> None:
        config = blueprint.config
        if config.tp > 1 and communicator is None:
            raise UserError(f"tp={config.tp}: a rank needs the others; engine.build starts them")
        self._followers = followers
        self.blueprint = blueprint
        self.device = device
        self.dtype = DTYPES[config.dtype]
        self._limits = _limits_of(blueprint)
        self._layouts: dict[int, BatchLayout] = {}
        most_tokens = padded_tokens(config.max_num_batched_tokens, config.graph_max_tokens)
        bridge = self._bridge_elems(most_tokens)
        self.ops = ops_for(config.backend)
        self.buffers = new_buffers(
            config,
            blueprint.model,
            blueprint.geometry,
            num_pages=blueprint.memory.num_pages,
            num_adapters=blueprint.max_adapters,
            bridge_elems=bridge,
            device=device,
            dtype=self.dtype,
        )
        parallel = None
        if communicator is not None:
            parallel = TensorParallel(
                communicator,
                config,
                self.ops,
                hidden=blueprint.model.hidden_size,
                rows=most_tokens,
                max_rank=self._limits.max_rank,
                bridge_elems=bridge,
                device=device,
                dtype=self.dtype,
            )
        self.model = Model(
            blueprint.model,
            config,
            blueprint.geometry,
            weights,
            self.ops,
            self.buffers,
            self._limits.max_rank,
            parallel,
            experts_of(blueprint, seed=seed, dtype=self.dtype, device=device, most_tokens=most_tokens),
        )
        rank = 0 if communicator is None else communicator.rank
        self.store: HostStore | GroupStore = HostStore(blueprint, self.dtype, device, seed=seed, rank=rank)
        own_loader = AdapterLoader(
            self.store, self.buffers, blueprint.max_adapters, blueprint.geometry.units_per_page
        )
        self.loader = own_loader if followers is None else GroupLoader(own_loader, followers, config.tp)
        self.merging: Merging | None = None
        if config.merge != "never":
            self.merging = Merging(blueprint, weights, self.buffers, own_loader)
        first_fixed = int(blueprint.hot is not None)  # the scheduler holds them first, in this order
        self.builder = BatchBuilder(
            max_num_seqs=config.max_num_seqs,
            max_pages_per_seq=self.buffers.page_table.shape[1],
            page_tokens=config.page_tokens,
            attention_items=max(1, DECODE_PROGRAMS // blueprint.model.kv_heads_per_rank(config.tp)),
            adapter_meta=self.loader.adapter_meta,
            dynamic_slots=range(first_fixed, first_fixed + len(blueprint.dynamic)),
        )
        pin = device.type == "cuda"
        updates = 2 * config.max_num_seqs * self.buffers.page_table.shape[1]
        metadata = max(self.layout(size).size for size in self._sizes(most_tokens))
        self.device_metadata = torch.zeros(metadata, dtype=torch.int32, device=device)
        self._host = [
            _HostBuffers(
                torch.zeros(metadata + updates, dtype=torch.int32, pin_memory=pin),
                torch.zeros(config.max_num_seqs, dtype=torch.int64, pin_memory=pin),
            )
            for _ in range(RING)
        ]
        self._turn = 0
        self._graphs: dict[GraphKey, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._graph_pool: Any = None  # memory that all graphs share, as one runs at a time

    def _bridge_elems(self, most_tokens: int) -> int:
        if not self._limits.max_rank:
            return 1
        sizes = self._sizes(most_tokens)
        width = bridge_width(self._limits.max_rank)
        return max(
            size * max(launch.max_splits for launch in self.layout(size).lora) * width for size in sizes
        )

    def _sizes(self, most_tokens: int) -> set[int]:
        """Return the padded sizes among which every buffer's largest need is: needs grow with tokens between launch boundaries."""
        return {most_tokens, *(min(boundary, most_tokens) for boundary in LAUNCH_BOUNDARIES)}

    def layout(self, tokens: int) -> BatchLayout:
        """Return the layout of steps of `tokens` padded rows."""
        layout = self._layouts.get(tokens)
        if layout is None:
            layout = self._layouts[tokens] = batch_layout(tokens, self._limits)
        return layout

    # ---- steps ----

    def launch(
        self,
        step: Step,
        tokens_of: dict[Sequence, NDArray[np.int32]],
        sampling_of: Mapping[Sequence, Sampling] | None = None,
    ) -> InFlight:
        """Start a planned step. tokens_of: prompt and generated tokens of the sequences that prefill in it; sampling_of: how theirs are chosen."""
        launched_s = time.perf_counter()
        host = self._host[self._turn % RING]
        self._turn += 1
        updates = self.builder.apply(step, sampling_of)
        key = self.key(step)
        layout = self.layout(key.tokens)
        views = layout.views(host.metadata.numpy())
        sampled = self.builder.build(step, layout, views, tokens_of)
        if self._followers is not None:
            metadata = host.metadata.numpy()
            pairs = np.array([updates.index, updates.page], dtype=np.int32)
            self._followers.step(key, metadata[: layout.used_size(metadata)], pairs)
        started, ended = self._new_event(), self._new_event()
        if started is not None:
            started.record()  # before the copy: that too takes the GPU's time
        if self.merging is not None:
            self.merging.follow(step.merged)
        self.send(layout, host.metadata, updates)
        tokens = self.run(key, layout)
        self.ops.send_to_host(tokens, host.tokens[: len(tokens)])
        if ended is not None:
            ended.record()
        return InFlight(step, sampled, host, launched_s, started, ended)

    def wait(self, flight: InFlight) -> tuple[NDArray[np.int64], float]:
        """Wait for a step; return its sampled tokens (in the order of `sampled.sequences`) and its seconds on the GPU."""
        duration_s = 0.0
        if flight.ended is not None and flight.started is not None:
            flight.ended.synchronize()
            duration_s = flight.started.elapsed_time(flight.ended) * 1e-3
        else:
            duration_s = time.perf_counter() - flight.launched_s
        return flight.host.tokens[: len(flight.sampled.sequences)].numpy().copy(), duration_s

    def follow(self, key: GraphKey, metadata: NDArray[np.int32], pairs: NDArray[np.int32]) -> None:
        """Run a step that another rank planned. pairs: the page table's changes, [2, n]."""
        host = self._host[self._turn % RING]
        self._turn += 1
        layout = self.layout(key.tokens)
        host.metadata.numpy()[: len(metadata)] = metadata
        self.send(layout, host.metadata, PageUpdates(list(pairs[0]), list(pairs[1])))
        self.run(key, layout)

    def reset(self) -> None:
        """Forget what ran and what was being loaded, once the GPU has done with it."""
        if self._followers is not None:
            self._followers.reset()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.loader.reset()
        self.builder.clear()

    def start_load(self, load: Load) -> None:
        """Start copying an adapter to the GPU."""
        self.loader.start(load)

    def close(self) -> None:
        """End the other ranks' processes, where there are any, and part from them.

        NCCL waits until the graphs that use it are gone, and until all ranks part from each other: so graphs first, and processes last.
        """
        if self.model.parallel is None:
            return
        if self._followers is not None and not self._followers.part():
            self._followers.close()
            return
        self._graphs.clear()
        leave()
        if self._followers is not None:
            self._followers.close()

    def _new_event(self) -> torch.cuda.Event | None:
        return torch.cuda.Event(enable_timing=True) if self.device.type == "cuda" else None

    def key(self, step: Step) -> GraphKey:
        tokens = padded_tokens(step.shape.tokens, self.blueprint.config.graph_max_tokens)
        decode_only = step.shape.prefill_tokens == 0
        if self.model.experts is not None:
            return self._key_with_experts(step, tokens, decode_only)
        return GraphKey(tokens=tokens, decode_only=decode_only, with_lora=step.shape.lora_tokens > 0)

    def _key_with_experts(self, step: Step, tokens: int, decode_only: bool) -> GraphKey:
        """Where there are dynamic adapters: a step with some of them runs LoRA's kernels too, if there may be ordinary ones."""
        experts = self.builder.has_experts(step)
        lora = self._limits.max_rank > 0 and (experts or step.shape.lora_tokens > 0)
        return GraphKey(tokens=tokens, decode_only=decode_only, with_lora=lora, with_experts=experts)

    def send(self, layout: BatchLayout, metadata: torch.Tensor, updates: PageUpdates) -> None:
        """Copy a step's metadata and page table changes to the device. metadata: pinned int32, with room for the changes behind the layout."""
        used = layout.used_size(metadata.numpy())
        self.ops.fetch_from_host(metadata[:used], self.device_metadata[:used])
        count = len(updates.index)
        if count:
            pairs = metadata[layout.size : layout.size + 2 * count].view(2, count)
            pairs.numpy()[:] = (updates.index, updates.page)
            self.ops.scatter_from_host_(pairs, self.buffers.page_table.view(-1))

    def run(self, key: GraphKey, layout: BatchLayout) -> torch.Tensor:
        """Run the step that the device's metadata describes; return its sampled tokens on the device."""
        captured = self._graphs.get(key)
        if captured is not None:
            captured[0].replay()
            return captured[1]
        return self._forward(key, layout)

    def _forward(self, key: GraphKey, layout: BatchLayout) -> torch.Tensor:
        views = layout.views(self.device_metadata)
        batch = DeviceBatch(layout, views, key.decode_only, key.with_lora, key.with_experts)
        with torch.inference_mode():
            return self.model.forward(batch)

    # ---- graphs ----

    def capture(self, keys: Iterable[GraphKey] | None = None) -> Iterator[GraphKey]:
        """Capture a graph for every padded size, decodes alone and mixed, with and without adapters, or for `keys`; yield each when done.

        The metadata is empty while capturing: no row is real, so nothing is read or written through the page table.
        """
        if self.device.type != "cuda":
            return
        self._compile_exchanges()
        gc.collect()
        gc.disable()  # what is freed while a graph is captured may call CUDA, and that spoils the capture
        try:
            for key in self.graph_keys() if keys is None else keys:
                if key not in self._graphs:
                    self._capture_one(key)
                    yield key
        finally:
            gc.enable()

    def _compile_exchanges(self) -> None:
        """Run what a step exchanges with the host once in each way that Triton compiles it, so that no step waits for the compiler."""
        here = torch.zeros(64, dtype=torch.int32, pin_memory=True)
        there = torch.zeros(64, dtype=torch.int32, device=self.device)
        for count in (1, 2, 16):
            for start in (0, 1):  # aligned to 16 bytes, and not
                self.ops.fetch_from_host(here[start : start + count], there[:count])
                self.ops.scatter_from_host_(here[start : start + 2 * count].view(2, count), there)
            self.ops.send_to_host(there.view(torch.int64)[:count], here.view(torch.int64)[:count])
        torch.cuda.synchronize()

    def graph_keys(self) -> Iterator[GraphKey]:
        """Yield what a step can run as, the largest first."""
        config = self.blueprint.config
        most_tokens = padded_tokens(config.max_num_batched_tokens, config.graph_max_tokens)
        for tokens in reversed(graph_sizes(config.graph_max_tokens)):
            if tokens > most_tokens:
                continue
            for decode_only in (False, True):
                if decode_only and padded_tokens(config.max_num_seqs, config.graph_max_tokens) < tokens:
                    continue
                for with_lora in (False, True) if self._limits.max_rank else (False,):
                    yield GraphKey(tokens=tokens, decode_only=decode_only, with_lora=with_lora)
                if self.model.experts is not None:
                    lora = self._limits.max_rank > 0
                    yield GraphKey(tokens=tokens, decode_only=decode_only, with_lora=lora, with_experts=True)

    def _capture_one(self, key: GraphKey) -> None:
        if self._graph_pool is None:
            self._graph_pool = torch.cuda.graph_pool_handle()
        layout = self.layout(key.tokens)
        self.clear_metadata(layout)
        self._forward(key, layout)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._graph_pool):
            tokens = self._forward(key, layout)
        self._graphs[key] = (graph, tokens)

    def clear_metadata(self, layout: BatchLayout) -> None:
        """Make the device's metadata that of a step without rows."""
        self.device_metadata.zero_()
        views = layout.views(self.device_metadata)
        views["sequence_slots"].fill_(-1)
        views["sample_slots"].fill_(self.blueprint.config.max_num_seqs)


def _limits_of(blueprint: Blueprint) -> BatchLimits:
    config, model = blueprint.config, blueprint.model
    linears = model.linear_shapes(config.tp)
    inputs = tuple(linears[group[0]][1] for group in GROUPS)
    return BatchLimits(
        max_num_seqs=config.max_num_seqs,
        max_rank=blueprint.row_rank,
        num_heads=model.heads_per_rank(config.tp),
        num_kv_heads=model.kv_heads_per_rank(config.tp),
        in_features=(inputs[0], inputs[1], inputs[2], inputs[3]),
        widths=lora_widths(model, config),
        lora_shards=config.tp if config.exchanges_lora else 1,
        num_dynamic=len(blueprint.dynamic),
    )
