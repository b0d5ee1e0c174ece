"""How the LoRA kernels are launched: one function from (tokens, rank, group) to launch parameters, used by the engine and the benchmark."""

from __future__ import annotations

from dataclasses import dataclass

# (in, out of all modules) of the groups of Llama-3.1-8B, when the caller names no other.
LLAMA_8B_IN = (4096, 4096, 4096, 14336)
NUM_SMS = 132  # H200


@dataclass(frozen=True, slots=True, kw_only=True)
class ShrinkTuning:
    """Constants of the shrink kernel that change its speed, not its result."""

    rank_block: int = 16  # A rows of an item; `plan_lora` must have cut the items by the same number
    row_k: int = 1024  # one-token tiles: elements of each A row held in registers at a time
    block_k: int = 128  # other tiles: depth of one matrix step
    num_stages: int = 4  # other tiles: matrix steps in flight
    num_warps: int = 4
    max_registers: int | None = None  # a cap a thread, to fit more programs on an SM
    pdl: bool = True  # start under the tail of the kernel before (programmatic dependent launch)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpandTuning:
    """Constants of the expand kernel that change its speed, not its result."""

    item_n: int = 512  # columns of an item
    block_n: int = 128  # tiles of several tokens: columns of one matrix step
    row_rank: int = 16  # one-token tiles: B rows in registers at a time
    rank_block: int = 32  # tiles of several tokens: depth of one matrix step
    num_warps: int = 4
    max_registers: int | None = None  # a cap a thread, to fit more programs on an SM
    pdl: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraLaunch:
    """Launch parameters of one group's shrink and expand."""

    tile_tokens: int
    splits: int
    shrink_programs: int
    expand_programs: int
    shrink: ShrinkTuning = ShrinkTuning()
    expand: ExpandTuning = ExpandTuning()


def lora_launch_config(
    tokens: int, rank_hint: int, group: int, *, in_features: int | None = None
) -> LoraLaunch:
    """Return the launch parameters for a step of `tokens` rows whose adapters' ranks are about `rank_hint`.

    group: 0 qkv, 1 o, 2 gate_up, 3 down. in_features: of this rank's shard; Llama-3.1-8B's if not given. `tile_tokens` depends on
    `tokens` alone, because the four groups share their tiles.
    Chosen by reasoning (see docs of each branch); not yet measured.
    """
    width = in_features or LLAMA_8B_IN[group]
    if tokens <= 128:
        # Most tiles are one token: a program holds one 16 x 512 piece of A or B at a time (16 KiB, 32 registers a thread), and
        # four of them an SM keep 64 KiB in flight, twice what 4.3 TB/s needs at 0.8 µs latency. Few tokens take a small grid.
        programs = NUM_SMS * (2 if tokens <= 2 else 4)
        return LoraLaunch(
            tile_tokens=16,
            splits=max(1, min(14, -(-width // 512))),
            shrink_programs=programs,
            expand_programs=programs,
            shrink=ShrinkTuning(row_k=512),
            expand=ExpandTuning(rank_block=16 if rank_hint <= 16 else 32, max_registers=128),
        )
    # y, read and written, is most of the bytes. h is summed over the splits once an item, so splits stay few and items wide.
    rows = (3, 1, 2, 1)[group] * rank_hint
    return LoraLaunch(
        tile_tokens=64,
        splits=4 if width <= 8192 else 7,
        shrink_programs=NUM_SMS * 2,
        expand_programs=NUM_SMS * 3,
        shrink=ShrinkTuning(
            rank_block=16 if rows <= 16 else 32 if rows <= 32 else 64, row_k=512, num_stages=3
        ),
        expand=ExpandTuning(
            block_n=64,
            rank_block=32 if rank_hint <= 32 else 64,
            item_n=512 if group != 2 else 1024,
            max_registers=168,
        ),
    )
