"""What S-LoRA's tensor parallelism puts between shrink and expand: every GPU has a part of h = x · Aᵀ, and each needs all of it.

Of q, k, v, gate and up a GPU has a part of the ranks, so parts are put side by side; of o and down it has a part of `in`, so they are summed:

    column-parallel   h[t, i] = Σ_s part_g[s, t, i mod p]    g = i // p, p = ceil(rank / GPUs), planes s of the shrink
    row-parallel      h[t, i] = Σ_g Σ_s part_g[s, t, i]

`lora_collect_peers` reads the other GPUs' planes where they lie, over NVLink, in one kernel. For collectives of a library `lora_pack_part` makes
this GPU's message, and `lora_collect` takes the received ones. All leave h as the only plane of a bridge for the expand (`summed`).
Source of the sharding: S-LoRA, arXiv:2311.03285.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.checks import check_tensor
from kernels.launch import launch_options, let_successor_start, wait_for_predecessors
from kernels.lora_check import check, check_bridge, check_headers, check_launch, check_tiles
from kernels.lora_plan import COLUMN_PARALLEL, GROUPS
from kernels.peers import await_signals, signal

BLOCK = 32  # ranks at a time


@triton.jit
def _locate(work, tiles, FIRST: tl.constexpr, MODULES: tl.constexpr, SHARDS: tl.constexpr):
    """Find an item: first row and rows of its tile, its module's number in the group, rank, ranks a GPU, first column of h and of a part."""
    record = tiles + work // MODULES * 16
    number = work % MODULES
    rank = tl.load(record + 4 + FIRST + number)
    first = tl.full((), 0, tl.int32)
    part_first = tl.full((), 0, tl.int32)
    for module in tl.static_range(0, MODULES - 1):
        before = tl.where(module < number, tl.load(record + 4 + FIRST + module), 0)
        first += before
        part_first += (before + SHARDS - 1) // SHARDS
    row_start = tl.load(record + 1).to(tl.int64)
    return row_start, tl.load(record + 2), number, rank, (rank + SHARDS - 1) // SHARDS, first, part_first


@triton.jit
def _sum_planes(planes, stride_plane, splits, at, keep):
    total = tl.zeros(at.shape, tl.float32)
    for plane in tl.range(0, splits, num_stages=1):
        total += tl.load(planes + plane * stride_plane + at, mask=keep, other=0.0)
    return total


@triton.jit
def _pack_part_kernel(
    bridge, tiles, num_tiles, headers, message, stride_plane, stride_bridge, stride_module, stride_message,
    GROUP: tl.constexpr, FIRST: tl.constexpr, MODULES: tl.constexpr, SHARDS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    let_successor_start(PDL)
    t = tl.arange(0, TILE)[:, None]
    splits = tl.load(headers + GROUP * 8 + 3)
    total = tl.load(num_tiles) * MODULES
    wait_for_predecessors(PDL)
    for item in tl.range(tl.program_id(0), total, tl.num_programs(0), num_stages=1):
        work = tl.full((), 0, tl.int32) + item
        row_start, row_count, number, _, part, _, part_first = _locate(work, tiles, FIRST, MODULES, SHARDS)
        source = bridge + row_start * stride_bridge + part_first
        target = message + number.to(tl.int64) * stride_module + row_start * stride_message
        for low in tl.range(0, part, BLOCK, num_stages=1):
            column = (low + tl.arange(0, BLOCK))[None, :]
            keep = (t < row_count) & (column < part)
            h = _sum_planes(source, stride_plane, splits, t * stride_bridge + column, keep)
            tl.store(target + t * stride_message + column, h.to(message.dtype.element_ty), mask=keep)


@triton.jit
def _collect_kernel(
    received, tiles, num_tiles, out, stride_module, stride_shard, stride_received, stride_out,
    FIRST: tl.constexpr, MODULES: tl.constexpr, SHARDS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_successor_start(PDL)
    t = tl.arange(0, TILE)[:, None]
    total = tl.load(num_tiles) * MODULES
    wait_for_predecessors(PDL)
    for item in tl.range(tl.program_id(0), total, tl.num_programs(0), num_stages=1):
        work = tl.full((), 0, tl.int32) + item
        row_start, row_count, number, rank, part, first, _ = _locate(work, tiles, FIRST, MODULES, SHARDS)
        source = received + number.to(tl.int64) * stride_module + row_start * stride_received
        target = out + row_start * stride_out + first
        part = tl.maximum(part, 1)
        for low in tl.range(0, rank, BLOCK, num_stages=1):
            column = (low + tl.arange(0, BLOCK))[None, :]
            keep = (t < row_count) & (column < rank)
            at = (column // part) * stride_shard + t * stride_received + column % part
            h = tl.load(source + at, mask=keep, other=0.0).to(tl.float32)
            tl.store(target + t * stride_out + column, h, mask=keep)


@triton.jit
def _collect_peers_kernel(
    bridge, buffers, pads, offset, tiles, num_tiles, headers, out, stride_plane, stride_bridge, stride_out,
    GROUP: tl.constexpr, FIRST: tl.constexpr, MODULES: tl.constexpr, SHARDS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    RANK: tl.constexpr, RANKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_successor_start(PDL)
    t = tl.arange(0, TILE)[:, None]
    splits = tl.load(headers + GROUP * 8 + 3)
    total = tl.load(num_tiles) * MODULES
    wait_for_predecessors(PDL)
    if tl.program_id(0) < total:
        signal(pads, tl.program_id(0), RANK, RANKS)
        await_signals(pads, tl.program_id(0), RANK, RANKS)
        tl.debug_barrier()  # the wait is one thread's; what follows is all threads'
        for item in tl.range(tl.program_id(0), total, tl.num_programs(0), num_stages=1):
            work = tl.full((), 0, tl.int32) + item
            row_start, row_count, _, rank, part, first, part_first = _locate(
                work, tiles, FIRST, MODULES, SHARDS
            )
            source = offset + row_start * stride_bridge + part_first
            target = out + row_start * stride_out + first
            part = tl.maximum(part, 1)
            for low in tl.range(0, rank, BLOCK, num_stages=1):
                column = (low + tl.arange(0, BLOCK))[None, :]
                keep = (t < row_count) & (column < rank)
                h = tl.zeros([TILE, BLOCK], tl.float32)
                for peer in tl.static_range(0, RANKS):
                    planes = tl.load(buffers + peer).to(bridge.dtype) + source
                    if SHARDS == 1:
                        h += _sum_planes(planes, stride_plane, splits, t * stride_bridge + column, keep)
                    else:
                        mine = keep & (column // part == peer)
                        h += _sum_planes(
                            planes, stride_plane, splits, t * stride_bridge + column % part, mine
                        )
                tl.store(target + t * stride_out + column, h, mask=keep)


def lora_pack_part(
    bridge: torch.Tensor,
    tiles: torch.Tensor,
    num_tiles: torch.Tensor,
    headers: torch.Tensor,
    message: torch.Tensor,
    *,
    group: int,
    ranks: int,
    tile_tokens: int,
    num_programs: int,
) -> torch.Tensor:
    """Write this GPU's part of a group's h to `message`, and return it.

    bridge: fp32 [>= parts, >= T, width], what `lora_shrink` wrote. tiles, num_tiles, headers, group, tile_tokens, num_programs: as of
    `lora_expand_`. ranks: the GPUs. message: [modules of the group, >= T, largest part], rows contiguous; columns past a part keep what they had.
    Raises ValueError on a shape, dtype, stride or device that does not fit.
    """
    check_bridge(bridge, 0, bridge.device)
    _check_lists(tiles, num_tiles, headers, group, tile_tokens, num_programs, bridge.device)
    _check_message("message", message, group, 3, bridge.device)
    first, last = GROUPS[group]
    _pack_part_kernel[(num_programs,)](
        bridge, tiles, num_tiles, headers, message, bridge.stride(0), bridge.stride(1), message.stride(0), message.stride(1),
        GROUP=group, FIRST=first, MODULES=last - first, SHARDS=_shards(group, ranks), TILE=tile_tokens, BLOCK=BLOCK,
        **launch_options(bridge.device),
    )  # fmt: skip
    return message


def lora_collect(
    received: torch.Tensor,
    tiles: torch.Tensor,
    num_tiles: torch.Tensor,
    headers: torch.Tensor,
    out: torch.Tensor,
    *,
    group: int,
    ranks: int,
    tile_tokens: int,
    num_programs: int,
) -> torch.Tensor:
    """Write a group's h to `out`'s only plane from what came in, and return it.

    received: column-parallel, [modules, GPUs, >= T, largest part], the GPUs' messages in any strides whose rows are contiguous; row-parallel,
    [1, 1, >= T, rank], already summed. out: fp32 [1, >= T, width]. The rest as of `lora_pack_part`.
    Raises ValueError on a shape, dtype, stride or device that does not fit.
    """
    check_bridge(out, 0, out.device)
    _check_lists(tiles, num_tiles, headers, group, tile_tokens, num_programs, out.device)
    _check_message("received", received, group, 4, out.device)
    shards = _shards(group, ranks)
    check(received.shape[1] == shards, f"received must have {shards} parts, got {received.shape[1]}")
    first, last = GROUPS[group]
    _collect_kernel[(num_programs,)](
        received, tiles, num_tiles, out, received.stride(0), received.stride(1), received.stride(2), out.stride(1),
        FIRST=first, MODULES=last - first, SHARDS=shards, TILE=tile_tokens, BLOCK=BLOCK, **launch_options(out.device),
    )  # fmt: skip
    return out


def lora_collect_peers(
    bridge: torch.Tensor,
    buffers: torch.Tensor,
    pads: torch.Tensor,
    offset: int,
    tiles: torch.Tensor,
    num_tiles: torch.Tensor,
    headers: torch.Tensor,
    out: torch.Tensor,
    *,
    group: int,
    rank: int,
    ranks: int,
    tile_tokens: int,
    num_programs: int,
) -> torch.Tensor:
    """Write a group's h to `out`'s only plane from the bridges of all GPUs, and return it.

    bridge: this GPU's, `offset` elements into its shared buffer; the others' lie at the same offset in theirs and have the same strides. buffers,
    pads: uint64 [ranks], the addresses of all GPUs' buffers and signal pads (kernels/peers.py); pads have room for `num_programs`. A bridge may be
    written again after the next hand-shake but one, so two take turns. The rest as of `lora_collect`.
    Raises ValueError on a shape, dtype, stride or device that does not fit.
    """
    check_bridge(bridge, 0, bridge.device)
    check_bridge(out, 0, bridge.device)
    _check_lists(tiles, num_tiles, headers, group, tile_tokens, num_programs, bridge.device)
    for name, table in (("buffers", buffers), ("pads", pads)):
        check_tensor(name, table, shape=(ranks,), dtypes=(torch.uint64,), device=bridge.device)
    first, last = GROUPS[group]
    _collect_peers_kernel[(num_programs,)](
        bridge, buffers, pads, offset, tiles, num_tiles, headers, out, bridge.stride(0), bridge.stride(1), out.stride(1),
        GROUP=group, FIRST=first, MODULES=last - first, SHARDS=_shards(group, ranks), TILE=tile_tokens, BLOCK=BLOCK, RANK=rank, RANKS=ranks,
        **launch_options(bridge.device),
    )  # fmt: skip
    return out


def _shards(group: int, ranks: int) -> int:
    """Return over how many GPUs the ranks of a group's modules are spread."""
    return ranks if COLUMN_PARALLEL[GROUPS[group][0]] else 1


def _check_lists(
    tiles: torch.Tensor,
    num_tiles: torch.Tensor,
    headers: torch.Tensor,
    group: int,
    tile_tokens: int,
    num_programs: int,
    device: torch.device,
) -> None:
    check_launch(group, 0, tile_tokens, num_programs)
    check_tiles(tiles, num_tiles, device)
    check_headers(headers, device)


def _check_message(name: str, message: torch.Tensor, group: int, dims: int, device: torch.device) -> None:
    modules = GROUPS[group][1] - GROUPS[group][0]
    check(message.ndim == dims and message.stride(-1) == 1, f"{name} must be {dims}-D with contiguous rows")
    check(message.shape[0] == modules, f"{name} must have {modules} modules, got {message.shape[0]}")
    check(message.device == device, f"{name} must be on {device}, got {message.device}")
