"""Check and time what dynamic adapters add to one Llama-3.1-8B layer: merging experts into its weights, and unmerged experts beside its products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from kernels import expert_expand_ref, expert_shrink_ref, sgmm_ref
from kernels.expert_expand import expert_expand_
from kernels.expert_launch import expert_launch, tile_tokens_of
from kernels.expert_shrink import expert_shrink
from kernels.graph_time import bytes_us, check_error, graph_us, relative_error, timed
from kernels.route_top_k import route_top_k, touched_slots
from kernels.sgmm import Sgmm
from kernels.sgmm_bench import bound_us
from kernels.sgmm_plan import SgmmPlan, SgmmWeight, plan_sgmm

DEVICE, DTYPE = "cuda", torch.bfloat16
GROUPS = ((4096, (4096, 1024, 1024)), (4096, (4096,)), (4096, (14336, 14336)), (14336, (4096,)))  # in, outs
EXPERTS, TOP_K = 8, 2
RANKS, TOKENS = (64, 128), (1, 8, 32)
SETS = 8  # layers of experts in turn, so that L2 holds none

Log = Callable[[str], object]


@dataclass(slots=True)
class _Group:
    """One group of linears with experts, and what a step of it reads and writes."""

    x: torch.Tensor
    y: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    widths: tuple[int, ...]


@dataclass(slots=True)
class _Route:
    """Where a batch's tokens go."""

    dense: torch.Tensor
    touched: torch.Tensor


def bench_switch(*, quick: bool = False, log: Log = print) -> list[dict]:
    """Check and time both forms of the merge, and unmerged experts by batch; return a row each. Raises WrongResultError if a result is wrong."""
    replays = 5 if quick else 20
    rows = []
    for rank in RANKS:
        rows += [bench_merge(rank, form, replays) for form in (False, True)]
        rows += [bench_experts(rank, tokens, replays) for tokens in TOKENS]
        log(f"experts, r={rank}: " + ", ".join(f"{row['op']} {row['us']:.1f}" for row in rows[-5:]) + " µs")
    return rows


def bench_merge(rank: int, in_place: bool, replays: int) -> dict:
    """Check and time the segmented product over one layer's weights, its stage included."""
    plan, expected = merge_plan(rank, in_place), merge_plan(rank, in_place)
    route = torch.arange(plan.segments, dtype=torch.int32, device=DEVICE) % EXPERTS
    gates = torch.tensor([0.6, 0.2], device=DEVICE)
    merge = Sgmm(plan)

    def run() -> None:
        merge.stage_(route, gates)
        merge.merge_(route)

    run()
    sgmm_ref.stage_down_(expected, route, gates)
    sgmm_ref.merge_(expected, route)
    pairs = zip(plan.weights, expected.weights, strict=True)
    name = "sgmm_in_place" if in_place else "sgmm_pristine"
    error = check_error(name, max(relative_error(mine.target, ref.target) for mine, ref in pairs))
    del expected
    return {
        "op": name,
        "rank": rank,
        "tokens": 1,
        **timed(graph_us(run, replays), bound_us(plan)),
        "rel_err": error,
    }


def merge_plan(rank: int, in_place: bool) -> SgmmPlan:
    """Return the plan of one layer with random experts; equal calls give equal numbers."""
    generator = torch.Generator(DEVICE).manual_seed(rank)
    items = []
    for inputs, outs in GROUPS:
        source = draw(generator, sum(outs), inputs)
        target = source if in_place else torch.empty_like(source)
        up, down = draw(generator, EXPERTS, rank, sum(outs)), draw(generator, EXPERTS, rank, inputs)
        items.append(SgmmWeight(target=target, source=source, up=up, down=down))
    return plan_sgmm(items, TOP_K, in_place=in_place)


def bench_experts(rank: int, tokens: int, replays: int) -> dict:
    """Check and time shrink and expand of one layer's four groups."""
    generator = torch.Generator(DEVICE).manual_seed(rank)
    layers = [[_group(generator, rank, tokens, *sizes) for sizes in GROUPS] for _ in range(SETS)]
    route = _routed(generator, tokens)

    def run_layer(groups: list[_Group], shrink: Callable, expand: Callable) -> None:
        for group in groups:
            launch = expert_launch(tokens, group.x.shape[1], sum(group.widths))
            size = (launch.parts(group.x.shape[1]), route.touched.shape[1], tokens, group.a.shape[1])
            bridge = torch.empty(size, device=DEVICE)
            shrink(group.x, group.a, route.touched, bridge, launch=launch, settled=True)
            expand(
                group.y, bridge, group.b, route.dense, route.touched, rank=rank, widths=group.widths,
                targets=(True,) * len(group.widths), launch=launch, settled=True,
            )  # fmt: skip

    expected = [replace(group, y=group.y.clone()) for group in layers[0]]
    run_layer(layers[0], expert_shrink, expert_expand_)
    run_layer(expected, expert_shrink_ref.expert_shrink, expert_expand_ref.expert_expand_)
    pairs = zip(layers[0], expected, strict=True)
    error = check_error("experts", max(relative_error(mine.y, ref.y) for mine, ref in pairs))

    def run() -> None:
        for groups in layers:
            run_layer(groups, expert_shrink, expert_expand_)

    us = graph_us(run, replays)
    chosen = int((route.touched >= 0).sum())
    moved = sum(
        chosen * (group.a[0].numel() + group.b[0].numel()) + group.x.numel() + 2 * group.y.numel()
        for group in layers[0]
    )
    return {
        "op": "experts",
        "rank": rank,
        "tokens": tokens,
        **timed(us / SETS, bytes_us(moved * DTYPE.itemsize)),
        "rel_err": error,
    }


def _routed(generator: torch.Generator, tokens: int) -> _Route:
    tile = tile_tokens_of(tokens)
    indices = torch.empty(tokens, TOP_K, dtype=torch.int32, device=DEVICE)
    gates, dense = torch.empty(tokens, TOP_K, device=DEVICE), torch.empty(tokens, EXPERTS, device=DEVICE)
    slots = touched_slots(EXPERTS, TOP_K, tile)
    touched = torch.empty(-(-tokens // tile), slots, dtype=torch.int32, device=DEVICE)
    logits = torch.randn(tokens, EXPERTS, generator=generator, device=DEVICE)
    route_top_k(logits, indices, gates, dense, touched, tile_tokens=tile)
    return _Route(dense, touched)


def _group(generator: torch.Generator, rank: int, tokens: int, inputs: int, outs: tuple[int, ...]) -> _Group:
    return _Group(
        x=draw(generator, tokens, inputs),
        y=draw(generator, tokens, sum(outs)),
        a=draw(generator, EXPERTS, rank * len(outs), inputs),
        b=draw(generator, EXPERTS, rank * sum(outs)),
        widths=outs,
    )


def draw(generator: torch.Generator, *size: int) -> torch.Tensor:
    """Return N(0, 0.1²)."""
    return (torch.randn(*size, generator=generator, device=DEVICE) * 0.1).to(DTYPE)
