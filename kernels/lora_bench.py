"""Time LoRA shrink + expand at Llama-3.1-8B shapes, against their fp32 reference and their byte bound.

As the peers' bench does (shared/peers/bench.py): bf16, CUDA graphs, each graph walking so many weight sets that none is found in the 60 MB L2,
median of 20 replays, a layer = the sum over qkv, o, gate_up, down. Numbers are random, never zero.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from kernels.graph_time import ROTATED_BYTES, check_error, graph_us, relative_error, timed
from kernels.lora_cases import GROUP_NAMES, Case
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

NUM_ADAPTERS = 32  # that batches of one rank take theirs from
DEVICE, DTYPE = "cuda", torch.bfloat16


def bench_lora(cases: Sequence[Case], *, quick: bool = False, log: Callable[[str], object] = print) -> dict:
    """Check and time every case; return {"rows": […], "layer": […], "mixed_ranks": None or the mixed batch beside the uniform one}.

    quick: fewer replays. Raises WrongResultError if a result is wrong.
    """
    rows, layers = [], []
    pools = itertools.groupby(cases, lambda case: pool_ranks(case, cases))
    for ranks, batches in pools:
        weights = Weights(ranks)
        for case in batches:
            case_rows, layer = bench_case(case, weights, quick=quick, log=log)
            rows += case_rows
            layers.append(layer)
        del weights
    return {"rows": rows, "layer": layers, "mixed_ranks": compare_mixed(layers)}


def bench_case(
    case: Case, weights: Weights, *, quick: bool, log: Callable[[str], object]
) -> tuple[list[dict], dict]:
    """Check and time one case; return its rows, three a group, and the row of the layer."""
    rows: list[dict[str, Any]] = []
    total = 0.0
    launches = [lora_launch_config(case.tokens, group) for group in range(NUM_GROUPS)]
    for group, launch in enumerate(launches):
        batch = Batch(case, weights, group, launch)
        error = check_error(f"lora {GROUP_NAMES[group]} {case}", batch.relative_error())
        for op in ("lora_shrink", "lora_expand", "lora"):
            us = batch.time_us(op, replays=10 if quick else 20)
            fields = timed(us, case.bound_us(group))
            rows.append({"op": op, "layer": GROUP_NAMES[group], **case.shape, **fields, "rel_err": error})
        total += us
    chain = layer_chain_us(case, weights, launches)
    moved = sum(map(case.moved_bytes, range(NUM_GROUPS)))
    bound = sum(map(case.bound_us, range(NUM_GROUPS)))
    layer = {**case.shape, **timed(total, bound), "chain_us": round(chain, 2), "bytes": moved}
    shown = " ".join(f"{row['op'][5:] or row['layer']} {row['us']:.1f}" for row in rows)
    log(
        f"lora {' '.join(f'{k}={v}' for k, v in case.shape.items())}: {total:.1f} µs, bound {bound:.1f} ({shown})"
    )
    return rows, layer


def compare_mixed(layers: list[dict]) -> dict | None:
    """Return what a byte costs in the mixed batch as a multiple of what it costs in the uniform one; None if not both were timed."""
    found = {layer["case"]: layer for layer in layers}
    if not {"mixed", "as mixed"} <= found.keys():
        return None
    mixed, uniform = found["mixed"], found["as mixed"]
    quotient = (mixed["us"] / mixed["bytes"]) / (uniform["us"] / uniform["bytes"])
    sides = {
        f"{name}_{field}": layer[field]
        for name, layer in (("mixed", mixed), ("uniform", uniform))
        for field in ("rank", "bytes", "us")
    }
    return {**sides, "time_per_byte_quotient": round(quotient, 3)}


def pool_ranks(case: Case, cases: Sequence[Case]) -> tuple[int, ...]:
    """Return the ranks of the adapters in the pool that a case is served from: NUM_ADAPTERS or more of one rank, or its own."""
    if case.name != "uniform":
        return case.adapter_ranks
    most = max(other.adapters for other in cases if other.name == "uniform" and other.rank == case.rank)
    return (case.rank,) * max(NUM_ADAPTERS, most)


class Weights:
    """Random adapters of given ranks, over so many layers that every group's weights exceed the cache."""

    def __init__(self, ranks: Sequence[int], num_layers: int | None = None) -> None:
        self.num_adapters = len(ranks)
        smallest = sum(ranks) * 2 * min(sum(sum(LLAMA_8B[m]) for m in range(*group)) for group in GROUPS)
        self.num_layers = num_layers or -(-int(ROTATED_BYTES) // smallest)
        self.packed: PackedAdapters = pack_random(
            [[rank] * 7 for rank in ranks], num_layers=self.num_layers, dtype=DTYPE, device=DEVICE
        )
        self.scales = torch.full((len(ranks), 7), 0.5, device=DEVICE)


class Lists:
    """The device's work lists for one batch of segments."""

    def __init__(self, case: Case, weights: Weights, launches: list[LoraLaunch], first_slot: int) -> None:
        slots = (first_slot + np.arange(case.adapters, dtype=np.int32)) % np.int32(weights.num_adapters)
        counts = np.array(case.row_counts, np.int32)
        starts = np.cumsum(counts, dtype=np.int32) - counts
        tiles = np.zeros(
            (max_tiles(case.tokens, case.adapters, launches[0].tile_tokens), TILE_COLUMNS), np.int32
        )
        items = np.zeros((max_shrink_items(len(tiles), case.rank), ITEM_COLUMNS), np.int32)
        headers = np.zeros((NUM_GROUPS, HEADER_COLUMNS), np.int32)
        num_tiles, _ = plan_lora(
            slots, starts, counts, weights.packed.adapter_meta, launches=launches,
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
        slots = range(0, weights.num_adapters, case.adapters)
        self.lists = [Lists(case, weights, [launch] * 4, slot) for slot in slots]
        set_bytes = sum(case.adapter_ranks) * 2 * sum(sum(LLAMA_8B[m]) for m in modules)
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
        return relative_error(self.y, expected)

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
