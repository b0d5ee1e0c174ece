"""Time LoRA shrink + expand at Llama-3.1-8B shapes, against their fp32 reference and their byte bound.

As the peers' bench does (shared/peers/bench.py): bf16, CUDA graphs, each graph walking so many weight sets that none is found in the 60 MB L2,
median of 20 replays, a layer = the sum over qkv, o, gate_up, down. Numbers are random, never zero.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from kernels.lora_expand import lora_expand_
from kernels.lora_expand_ref import lora_expand_ref_
from kernels.lora_launch import LoraLaunch, lora_launch_config
from kernels.lora_pack import LLAMA_8B, PackedAdapters, pack_random
from kernels.lora_plan import (
    GROUPS,
    HEADER_COLUMNS,
    ITEM_COLUMNS,
    NUM_GROUPS,
    TILE_COLUMNS,
    bridge_width,
    max_shrink_items,
    max_tiles,
    plan_lora,
)
from kernels.lora_shrink import lora_shrink
from kernels.lora_shrink_ref import lora_shrink_ref

GROUP_NAMES = ("qkv", "o", "gate_up", "down")
BYTES_PER_S = 4.3e12  # H200, between its measured read and copy rates (shared/facts/h200.md, 2026-11-21)
NUM_ADAPTERS = 32
DEVICE, DTYPE = "cuda", torch.bfloat16
ROTATED_BYTES = 150e6
MAX_RELATIVE_ERROR = 1e-2  # bf16
CASES = ((1, 1), (32, 32), (128, 32), (1024, 1), (1024, 32))  # (tokens, adapters), issue 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One batch: `tokens` rows spread evenly over `adapters` adapters of one rank."""

    rank: int
    tokens: int
    adapters: int

    def bound_us(self, group: int) -> float:
        """Time to move each adapter row in use, x once, and y in and out."""
        modules = range(*GROUPS[group])
        weights = self.adapters * self.rank * sum(sum(LLAMA_8B[m]) for m in modules)
        activations = self.tokens * (LLAMA_8B[modules[0]][0] + 2 * sum(LLAMA_8B[m][1] for m in modules))
        return 2 * (weights + activations) / BYTES_PER_S * 1e6


def bench_lora(
    *,
    ranks: tuple[int, ...] = (16, 64),
    cases=CASES,
    quick: bool = False,
    log: Callable = print,
) -> dict:
    """Check and time every case; return {"rows": […], "layer": […]}.

    quick: fewer replays. Raises RuntimeError if a result is wrong.
    """
    rows, layers = [], []
    for rank in ranks:
        weights = Weights(rank)
        for tokens, adapters in cases:
            case = Case(rank=rank, tokens=tokens, adapters=adapters)
            launches = [lora_launch_config(tokens, group) for group in range(4)]
            total = 0.0
            for group, launch in enumerate(launches):
                batch = Batch(case, weights, group, launch)
                error = batch.relative_error()
                if not error < MAX_RELATIVE_ERROR:
                    raise RuntimeError(f"lora {GROUP_NAMES[group]} {case}: relative error {error:.2e}")
                times = {
                    op: batch.time_us(op, replays=10 if quick else 20)
                    for op in ("lora_shrink", "lora_expand", "lora")
                }
                total += times["lora"]
                common = dict(layer=GROUP_NAMES[group], rank=rank, tokens=tokens, adapters=adapters)
                rows += [
                    dict(
                        op=op,
                        **common,
                        us=round(us, 2),
                        bound_us=round(case.bound_us(group), 2),
                        rel_err=error,
                    )
                    for op, us in times.items()
                ]
                shown = " ".join(f"{op[5:] or 'both'} {us:.2f}" for op, us in times.items())
                log(
                    f"  {GROUP_NAMES[group]:8} {shown}  bound {case.bound_us(group):.2f} µs  error {error:.1e}"
                )
            chain = layer_chain_us(case, weights, launches)
            bound = sum(map(case.bound_us, range(4)))
            layers.append(
                dict(
                    rank=rank,
                    tokens=tokens,
                    adapters=adapters,
                    us=round(total, 2),
                    bound_us=round(bound, 2),
                    chain_us=round(chain, 2),
                )
            )
            log(
                f"layer r={rank} tokens={tokens} adapters={adapters}: {total:.1f} µs (chain {chain:.1f}, bound {bound:.1f})"
            )
    return {"rows": rows, "layer": layers}


class Weights:
    """`NUM_ADAPTERS` random adapters over so many layers that every group's weights exceed the cache."""

    def __init__(self, rank: int) -> None:
        smallest = (
            NUM_ADAPTERS * rank * 2 * min(sum(sum(LLAMA_8B[m]) for m in range(*group)) for group in GROUPS)
        )
        self.num_layers = -(-int(ROTATED_BYTES) // smallest)
        self.rank = rank
        self.packed: PackedAdapters = pack_random(
            [[rank] * 7] * NUM_ADAPTERS, num_layers=self.num_layers, dtype=DTYPE, device=DEVICE
        )
        self.scales = torch.full((NUM_ADAPTERS, 7), 0.5, device=DEVICE)


class Lists:
    """The device's work lists for one batch of segments."""

    def __init__(self, case: Case, weights: Weights, launches: list[LoraLaunch], first_slot: int) -> None:
        slots = (first_slot + np.arange(case.adapters, dtype=np.int32)) % NUM_ADAPTERS
        edges = np.linspace(0, case.tokens, case.adapters + 1).astype(np.int32)
        tiles = np.zeros(
            (max_tiles(case.tokens, case.adapters, launches[0].tile_tokens), TILE_COLUMNS), np.int32
        )
        items = np.zeros((max_shrink_items(len(tiles), case.rank), ITEM_COLUMNS), np.int32)
        headers = np.zeros((NUM_GROUPS, HEADER_COLUMNS), np.int32)
        num_tiles, _ = plan_lora(
            slots, edges[:-1], np.diff(edges), weights.packed.adapter_meta, launches=launches,
            in_features=[LLAMA_8B[group[0]][0] for group in GROUPS],
            widths=[[LLAMA_8B[module][1] for module in range(*group)] for group in GROUPS], tiles_out=tiles, headers_out=headers, items_out=items,
        )  # fmt: skip
        self.tiles, self.items, self.headers = (
            torch.from_numpy(a).to(DEVICE) for a in (tiles, items, headers)
        )
        self.num_tiles = torch.tensor([num_tiles], dtype=torch.int32, device=DEVICE)


class Batch:
    """One group of one case with its buffers, ready to launch on any weight set."""

    def __init__(self, case: Case, weights: Weights, group: int, launch: LoraLaunch) -> None:
        self.case, self.weights, self.group, self.launch = case, weights, group, launch
        modules = range(*GROUPS[group])
        self.widths = [LLAMA_8B[m][1] for m in modules]
        self.x = torch.randn(case.tokens, LLAMA_8B[modules[0]][0], device=DEVICE).to(DTYPE)
        self.y = torch.randn(case.tokens, sum(self.widths), device=DEVICE).to(DTYPE)
        self.bridge = torch.full(
            (launch.max_splits, case.tokens, bridge_width(case.rank)), float("nan"), device=DEVICE
        )
        slots = range(0, NUM_ADAPTERS, case.adapters)
        self.lists = [Lists(case, weights, [launch] * 4, slot) for slot in slots]
        set_bytes = case.adapters * case.rank * 2 * sum(sum(LLAMA_8B[m]) for m in modules)
        sets = itertools.product(range(weights.num_layers), self.lists)
        self.sets = list(itertools.islice(sets, -(-int(ROTATED_BYTES) // set_bytes)))

    def shrink(self, layer: int, lists: Lists, launch: LoraLaunch | None = None) -> None:
        """Launch the shrink of one weight set."""
        launch = launch or self.launch
        lora_shrink(
            self.x, self.weights.packed.pool, lists.headers, lists.items, self.bridge,
            group=self.group, layer=layer, tile_tokens=launch.tile_tokens,
            num_programs=launch.shrink_programs, tuning=launch.shrink,
        )  # fmt: skip

    def expand(self, layer: int, lists: Lists, launch: LoraLaunch | None = None) -> None:
        """Launch the expand of one weight set."""
        launch = launch or self.launch
        lora_expand_(
            self.y, self.bridge, self.weights.scales, self.weights.packed.pool, lists.tiles, lists.num_tiles, lists.headers,
            group=self.group, layer=layer, widths=self.widths, tile_tokens=launch.tile_tokens,
            num_programs=launch.expand_programs, tuning=launch.expand,
        )  # fmt: skip

    def relative_error(self) -> float:
        """Return ‖y − reference‖ / ‖reference‖ of one weight set; infinity if anything is not finite."""
        lists, layer = self.lists[-1], self.weights.num_layers - 1
        self.y.normal_()
        expected, bridge = self.y.float(), torch.zeros_like(self.bridge)
        self.bridge.fill_(float("nan"))
        self.shrink(layer, lists)
        self.expand(layer, lists)
        common: dict[str, Any] = dict(
            group=self.group, layer=layer, tile_tokens=self.launch.tile_tokens, num_programs=0
        )
        pool = self.weights.packed.pool
        lora_shrink_ref(self.x, pool, lists.headers, lists.items, bridge, **common)
        lora_expand_ref_(
            expected, bridge, self.weights.scales, pool, lists.tiles, lists.num_tiles, lists.headers,
            widths=self.widths, **common,
        )  # fmt: skip
        error = ((self.y.float() - expected).norm() / expected.norm()).item()
        return error if error == error else float("inf")

    def time_us(self, op: str, replays: int = 20, launch: LoraLaunch | None = None) -> float:
        """Return the median time of one call of `op` (lora_shrink, lora_expand, or lora for both)."""

        def run() -> None:
            for layer, lists in self.sets:
                if op != "lora_expand":
                    self.shrink(layer, lists, launch)
                if op != "lora_shrink":
                    self.expand(layer, lists, launch)

        self.y.normal_()
        if op == "lora_expand":
            self.bridge.normal_(std=0.01)
        return graph_us(run, replays) / len(self.sets)


def graph_us(run: Callable[[], None], replays: int) -> float:
    """Capture `run` in a CUDA graph and return the median time of a replay."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for _ in range(3):
        graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    return 1e3 * float(np.median([a.elapsed_time(b) for a, b in itertools.pairwise(events)]))


def layer_chain_us(case: Case, weights: Weights, launches: list[LoraLaunch]) -> float:
    """Return the time of a layer's eight kernels one after the other, as a model would run them."""
    batches = [Batch(case, weights, group, replace(launch)) for group, launch in enumerate(launches)]
    sets = max((batch.sets for batch in batches), key=len)[: max(8, weights.num_layers)]
    positions = [(layer, batches[0].lists.index(lists)) for layer, lists in _aligned_sets(batches, len(sets))]

    def run() -> None:
        for layer, which in positions:
            for batch in batches:
                batch.shrink(layer, batch.lists[which])
                batch.expand(layer, batch.lists[which])

    return graph_us(run, 20) / len(positions)


def _aligned_sets(batches: list[Batch], count: int) -> Iterator[tuple[int, Lists]]:
    """Weight sets that all four groups have, first over adapters, then over layers."""
    layers = range(batches[0].weights.num_layers)
    return itertools.islice(itertools.cycle(itertools.product(layers, batches[0].lists)), count)
