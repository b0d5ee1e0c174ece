"""How the LoRA kernels are launched: one function from (tokens, group) to launch parameters, used by the engine and the benchmark."""

from __future__ import annotations

from dataclasses import dataclass

NUM_SMS = 132  # H200


@dataclass(frozen=True, slots=True, kw_only=True)
class ShrinkTuning:
    """Constants of the shrink kernel that change its speed, not its result."""

    block_k: int = 256  # depth of one matrix step of a small tile with at most 16 rows of A,
    wide_block_k: int = 128  # with more,
    large_block_k: int = 64  # and of a larger tile
    num_stages: int = 3  # matrix steps in flight, and one more
    num_warps: int = 4
    max_registers: int | None = 128  # a cap a thread, to fit more programs on an SM
    pdl: bool = True  # start under the tail of the kernel before (programmatic dependent launch)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpandTuning:
    """Constants of the expand kernel that change its speed, not its result."""

    row_path: bool = True  # one row of low rank goes without shared memory
    num_stages: int = 3
    num_warps: int = 4
    max_registers: int | None = 128
    pdl: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraLaunch:
    """Launch parameters of one group's shrink and expand."""

    tile_tokens: int  # rows of the largest tile
    max_splits: int  # planes of the bridge: parts that `in` may be cut into
    shrink_programs: int
    expand_programs: int
    shrink: ShrinkTuning = ShrinkTuning()
    expand: ExpandTuning = ExpandTuning()


# Token counts at which launches change: between two of them every buffer's need grows with the tokens.
LAUNCH_BOUNDARIES = (16, 512, 1024)


def lora_launch_config(tokens: int, group: int) -> LoraLaunch:
    """Return the launch parameters for a step of `tokens` rows.

    group: 0 qkv, 1 o, 2 gate_up, 3 down. They depend neither on ranks nor on what is registered, so that costs measured with some adapters
    hold for others; `tile_tokens` depends on `tokens` alone, because the four groups share their tiles.

    Chosen on an H200, 2026-11-22, one layer of Llama-3.1-8B in µs: at most 8 parts of `in` against 16, 32 tokens of 32 adapters 45 against
    48, but 1,024 of one 99 against 88. Few tokens: 8 warps and 2 programs an SM 17 against 18.
    """
    if tokens <= 16:
        return LoraLaunch(
            tile_tokens=16,
            max_splits=16,
            shrink_programs=NUM_SMS * 2,
            expand_programs=NUM_SMS * 2,
            shrink=ShrinkTuning(num_warps=8, max_registers=None),
            expand=ExpandTuning(num_warps=8, max_registers=None),
        )
    return LoraLaunch(
        tile_tokens=32,
        max_splits=4 if tokens > 1024 else 8 if tokens <= 512 and group != 3 else 16,
        shrink_programs=NUM_SMS * 4,
        expand_programs=NUM_SMS * 4,
    )
