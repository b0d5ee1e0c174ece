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


# Token counts at which launches change: between two of them every buffer's need grows with the tokens.
LAUNCH_BOUNDARIES = (2, 8, 1024)


def lora_launch_config(tokens: int, group: int, *, in_features: int | None = None) -> LoraLaunch:
    """Return the launch parameters for a step of `tokens` rows.

    group: 0 qkv, 1 o, 2 gate_up, 3 down. in_features: of this rank's shard; Llama-3.1-8B's if not given. They depend neither on ranks
    nor on what is registered, so that costs measured with some adapters hold for others; `tile_tokens` depends on `tokens` alone, because
    the four groups share their tiles.

    Chosen on an H200, 2026-11-22, one layer of Llama-3.1-8B in µs, tiles of 16 tokens against 64: 256 tokens of 200 adapters of rank 16
    253 against 431; 250 such and 768 prefill tokens 324 against 498; 1,024 tokens of one adapter of rank 16 124 against 145, but of rank
    64 271 against 151. Items of 1,024 columns against 512: 32 tokens of 32 adapters 49 against 56, 128 of 128 129 against 173, but 128 of
    32 84 against 72.
    """
    width = in_features or LLAMA_8B_IN[group]
    if tokens <= 1024:
        # A one-token tile holds one 16 x 512 piece of A or B at a time (16 KiB, 32 registers a thread), and four programs an SM keep
        # 64 KiB in flight, twice what 4.3 TB/s needs at 0.8 µs latency. Few tokens take a small grid, more splits and narrow items.
        few = tokens <= 8
        programs = NUM_SMS * (2 if tokens <= 2 else 4)
        most_splits, piece = (14, 512) if few else (7, 1024)
        return LoraLaunch(
            tile_tokens=16,
            splits=max(1, min(most_splits, -(-width // piece))),
            shrink_programs=programs,
            expand_programs=programs,
            shrink=ShrinkTuning(row_k=512),
            expand=ExpandTuning(item_n=512 if few else 1024, rank_block=32, max_registers=128),
        )
    # y, read and written, is most of the bytes. h is summed over the splits once an item, so splits stay few and items wide.
    return LoraLaunch(
        tile_tokens=64,
        splits=4 if width <= 8192 else 7,
        shrink_programs=NUM_SMS * 2,
        expand_programs=NUM_SMS * 3,
        shrink=ShrinkTuning(rank_block=64 if group in (0, 2) else 32, row_k=512, num_stages=3),
        expand=ExpandTuning(block_n=64, rank_block=32, item_n=512 if group != 2 else 1024, max_registers=168),
    )
