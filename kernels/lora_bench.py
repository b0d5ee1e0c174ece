"""Time LoRA shrink + expand at Llama-3.1-8B shapes, against their fp32 reference and their byte bound.

As the peers' bench does (shared/peers/bench.py): bf16, CUDA graphs, each graph walking so many weight sets that none is found in the 60 MB L2,
median of 20 replays, a layer = the sum over qkv, o, gate_up, down. Numbers are random, never zero.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from kernels.lora_expand import lora_expand_
from kernels.lora_expand_ref import lora_expand_ref_
from kernels.lora_launch import NUM_SMS, ExpandTuning, LoraLaunch, ShrinkTuning, lora_launch_config
from kernels.lora_pack import LLAMA_8B, PackedAdapters, pack_random
from kernels.lora_plan import GROUPS, TILE_COLUMNS, bridge_width, max_shrink_items, max_tiles, plan_lora
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
    sweep: bool = False,
    log: Callable = print,
) -> dict:
    """Check and time every case; return {"rows": […], "layer": […]}, with "sweep": […] too when variants were tried.

    quick: fewer replays. sweep: try launch variants and time the best beside the defaults. Raises RuntimeError if a result is wrong.
    """
    rows, layers, swept = [], [], []
    for rank in ranks:
        weights = Weights(rank)
        for tokens, adapters in cases:
            case = Case(rank=rank, tokens=tokens, adapters=adapters)
            launches = [lora_launch_config(tokens, group) for group in range(4)]
            if sweep:
                launches = [_sweep(case, weights, group, log) for group in range(4)]
                swept += [
                    dict(asdict(case), layer=GROUP_NAMES[g], launch=asdict(launches[g])) for g in range(4)
                ]
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
    return {"rows": rows, "layer": layers, **({"sweep": swept} if sweep else {})}


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
        tile_tokens = launches[0].tile_tokens
        capacity = max_tiles(case.tokens, case.adapters, tile_tokens)
        tiles = np.zeros((capacity, TILE_COLUMNS), np.int32)
        items = np.zeros((4, max_shrink_items(capacity, case.rank), 2), np.int32)
        num_tiles, num_items = plan_lora(
            slots, edges[:-1], np.diff(edges), weights.packed.adapter_meta, tile_tokens=tile_tokens, tiles_out=tiles,
            shrink_items_out=items, rank_blocks=[launch.shrink.rank_block for launch in launches],
        )  # fmt: skip
        self.tiles, self.items = torch.from_numpy(tiles).to(DEVICE), torch.from_numpy(items).to(DEVICE)
        self.num_tiles = torch.tensor([num_tiles], dtype=torch.int32, device=DEVICE)
        self.num_items = torch.tensor(num_items, dtype=torch.int32, device=DEVICE)


class Batch:
    """One group of one case with its buffers, ready to launch on any weight set."""

    def __init__(self, case: Case, weights: Weights, group: int, launch: LoraLaunch) -> None:
        self.case, self.weights, self.group, self.launch = case, weights, group, launch
        modules = range(*GROUPS[group])
        self.widths = [LLAMA_8B[m][1] for m in modules]
        self.x = torch.randn(case.tokens, LLAMA_8B[modules[0]][0], device=DEVICE).to(DTYPE)
        self.y = torch.randn(case.tokens, sum(self.widths), device=DEVICE).to(DTYPE)
        self.bridge = torch.full(
            (launch.splits, case.tokens, bridge_width(case.rank)), float("nan"), device=DEVICE
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
            self.x, self.weights.packed.pool, lists.tiles, lists.num_tiles, lists.items, lists.num_items, self.bridge,
            group=self.group, layer=layer, tile_tokens=launch.tile_tokens, splits=launch.splits,
            num_programs=launch.shrink_programs, tuning=launch.shrink,
        )  # fmt: skip

    def expand(self, layer: int, lists: Lists, launch: LoraLaunch | None = None) -> None:
        """Launch the expand of one weight set."""
        launch = launch or self.launch
        lora_expand_(
            self.y, self.bridge, self.weights.scales, self.weights.packed.pool, lists.tiles, lists.num_tiles,
            group=self.group, layer=layer, widths=self.widths, tile_tokens=launch.tile_tokens, splits=launch.splits,
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
        common = dict(
            group=self.group,
            layer=layer,
            tile_tokens=self.launch.tile_tokens,
            splits=self.launch.splits,
            num_programs=0,
        )
        pool = self.weights.packed.pool
        lora_shrink_ref(
            self.x,
            pool,
            lists.tiles,
            lists.num_tiles,
            lists.items,
            lists.num_items,
            bridge,
            tuning=self.launch.shrink,
            **common,
        )
        lora_expand_ref_(
            expected,
            bridge,
            self.weights.scales,
            pool,
            lists.tiles,
            lists.num_tiles,
            widths=self.widths,
            **common,
        )
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


def shrink_variants(launch: LoraLaunch, group: int) -> Iterator[LoraLaunch]:
    """Variants of a group's shrink worth timing: splits, blocks, warps, grid."""
    down = group == 3
    if launch.tile_tokens == 16:
        for splits, row_k, warps in itertools.product(
            (7, 14, 28) if down else (2, 4, 8, 16), (512, 1024), (4, 8)
        ):
            tuning = ShrinkTuning(row_k=row_k, num_warps=warps, block_k=256 if warps == 8 else 128)
            yield replace(launch, splits=splits, shrink=tuning)
        return
    for splits, rows, block_k, stages in itertools.product(
        (4, 7, 14) if down else (2, 4, 8), (32, 64, 128), (64, 128), (3, 4)
    ):
        if (64 + rows) * block_k * 2 * stages <= 200_000:
            tuning = replace(launch.shrink, rank_block=rows, block_k=block_k, num_stages=stages, num_warps=4)
            yield replace(launch, splits=splits, shrink=tuning)


def expand_variants(launch: LoraLaunch) -> Iterator[LoraLaunch]:
    """Variants of a group's expand worth timing, for one number of splits."""
    if launch.tile_tokens == 16:
        for item_n, row_rank, block_n, warps in itertools.product(
            (256, 512, 1024), (16, 32), (128, 256), (4, 8)
        ):
            if 4096 * warps // 4 <= item_n * row_rank <= 16384 * warps // 4:
                tuning = replace(
                    launch.expand, item_n=item_n, row_rank=row_rank, num_warps=warps, block_n=block_n
                )
                yield replace(launch, expand=tuning)
        return
    for item_n, (block_n, registers), rank_block in itertools.product(
        (256, 512, 1024), ((64, 168), (64, 128), (128, None)), (32, 64)
    ):
        tuning = replace(
            launch.expand, item_n=item_n, block_n=block_n, rank_block=rank_block, max_registers=registers
        )
        yield replace(launch, expand=tuning)


def _sweep(case: Case, weights: Weights, group: int, log: Callable) -> LoraLaunch:
    """Return the fastest launch of one group: the best shrink for each number of splits, the best expand behind it."""
    default = lora_launch_config(case.tokens, group)
    began = time.monotonic()
    best_shrink: dict[int, tuple[float, LoraLaunch]] = {}
    for variant in shrink_variants(default, group):
        timed = _best_grid("lora_shrink", Batch(case, weights, group, variant), variant)
        if variant.splits not in best_shrink or timed[0] < best_shrink[variant.splits][0]:
            best_shrink[variant.splits] = timed
    # The number of planes moves the expand little, so its blocks are searched once and then held against every number of splits.
    start = min(best_shrink.values(), key=lambda timed: timed[0])[1]
    expands = [_best_grid("lora_expand", Batch(case, weights, group, v), v) for v in expand_variants(start)]
    expands.sort(key=lambda timed: timed[0])
    pairs = []
    for _, shrink in best_shrink.values():
        for _, expand in expands[:2]:
            launch = replace(shrink, expand=expand.expand, expand_programs=expand.expand_programs)
            pairs.append((Batch(case, weights, group, launch).time_us("lora", 10), launch))
    pairs.append((Batch(case, weights, group, default).time_us("lora", 10), default))
    pairs.sort(key=lambda timed: timed[0])
    best = pairs[0][1]
    plain = replace(best, shrink=replace(best.shrink, pdl=False), expand=replace(best.expand, pdl=False))
    without_pdl = Batch(case, weights, group, plain).time_us("lora", 10)
    log(
        f"sweep {GROUP_NAMES[group]} {case} ({time.monotonic() - began:.0f} s): default {_time_of(pairs, default):.2f} µs, "
        f"best without PDL {without_pdl:.2f} µs"
    )
    for us, launch in pairs[:3]:
        log(f"    {us:.2f} µs  {describe(launch)}")
    for us, launch in sorted(best_shrink.values(), key=lambda timed: timed[0])[:3]:
        log(f"    shrink {us:.2f} µs  {describe(launch)}")
    for us, launch in expands[:3]:
        log(f"    expand {us:.2f} µs  {describe(launch)}")
    return best


def _best_grid(op: str, batch: Batch, launch: LoraLaunch) -> tuple[float, LoraLaunch]:
    """Time one variant at several grid sizes (no recompilation) and return the best; infinity if it does not fit the chip."""
    field = "shrink_programs" if op == "lora_shrink" else "expand_programs"
    timed = []
    for a_multiple in (2, 4, 6, 8):
        grid: Any = {field: NUM_SMS * a_multiple}
        variant = replace(launch, **grid)
        timed.append((batch.time_us(op, 5, variant), variant))
    return min(timed, key=lambda entry: entry[0])


def _time_of(pairs: list[tuple[float, LoraLaunch]], launch: LoraLaunch) -> float:
    return next(us for us, other in pairs if other is launch)


def describe(launch: LoraLaunch) -> str:
    """One line naming what differs from the tunings' defaults."""
    parts = [
        f"tile={launch.tile_tokens} splits={launch.splits} grid={launch.shrink_programs}/{launch.expand_programs}"
    ]
    for name, tuning, default in (
        ("shrink", launch.shrink, ShrinkTuning()),
        ("expand", launch.expand, ExpandTuning()),
    ):
        changed = {k: v for k, v in asdict(tuning).items() if v != asdict(default)[k]}
        parts.append(f"{name}({', '.join(f'{k}={v}' for k, v in changed.items())})")
    return " ".join(parts)
