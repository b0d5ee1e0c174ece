"""How the segmented gather matrix multiplication is launched: its tunings, and the one in use."""

from __future__ import annotations

from dataclasses import dataclass, replace

NUM_SMS = 132  # H200


SHARED_BYTES = 232_448  # of a program, at most
SM_SHARED_BYTES = 233_472  # of all programs on an SM, 1 KiB more for each than it asks for


@dataclass(frozen=True, slots=True, kw_only=True)
class SgmmTuning:
    """Constants that change the kernel's speed, not its result."""

    block_out: int = 128  # rows of W of a tile
    block_in: int = 128  # columns of W
    block_k: int = 64  # depth of one matrix step: ranks of one expert, with a panel of all of them
    num_stages: int = 3  # matrix steps in flight, and one more; with a panel, buffers of UP
    num_warps: int = 8
    programs_per_sm: int = 2
    max_registers: int | None = None  # a cap a thread, to fit more programs on an SM
    flatten: bool = (
        False  # one loop over tiles and matrix steps, so that the next tile's factors are on their way
    )
    panel: bool = False  # DOWN stays in shared memory, W goes by it (kernels/sgmm_panel.py)
    overlap: bool = False  # with a panel: begin a matrix step before the last one's end

    @property
    def name(self) -> str:
        """Return a short name, for tables."""
        kind = " flat" * self.flatten + " panel" * self.panel + " overlap" * self.overlap
        blocks = f"{self.block_out}x{self.block_in}x{self.block_k}"
        return f"{blocks} w{self.num_warps} s{self.num_stages} p{self.programs_per_sm}{kind}"

    def panel_block_k(self, inner: int) -> int:
        """Return the depth of a matrix step with a panel of so many ranks: a power of two that divides them."""
        return min(self.block_k, inner & -inner)

    def panel_bytes(self, inner: int) -> int:
        """Return the shared memory of a program with a panel: it and the buffers, of two-byte elements."""
        return 2 * (inner * self.block_in + self.num_stages * self.panel_block_k(inner) * self.block_out)

    def panel_fits(self, inner: int) -> bool:
        """Return whether as many programs as wanted have room for a panel of so many ranks, in steps that pay."""
        all_bytes = self.programs_per_sm * (self.panel_bytes(inner) + 1024)
        block_k = self.panel_block_k(inner)
        return (
            block_k >= 16
            and inner <= 8 * block_k
            and self.panel_bytes(inner) <= SHARED_BYTES
            and all_bytes <= SM_SHARED_BYTES
        )


PLAIN = SgmmTuning(max_registers=128)
FLAT = SgmmTuning(num_stages=2, max_registers=128, flatten=True)
WIDE = SgmmTuning(block_in=256, programs_per_sm=1, flatten=True)
PANEL = SgmmTuning(block_out=64, block_in=256, block_k=256, programs_per_sm=1, panel=True)
NARROW = SgmmTuning(block_out=64, block_k=128, num_warps=4, panel=True)
SQUARE = SgmmTuning(block_k=128, programs_per_sm=1, panel=True)
CANDIDATES = (
    PLAIN,
    FLAT,
    WIDE,
    PANEL,
    replace(PANEL, block_k=128, num_stages=4),
    replace(PANEL, block_k=64, num_stages=6, overlap=True),
    replace(PANEL, block_k=128, num_warps=4, programs_per_sm=2),
    replace(PANEL, block_out=128, block_k=128, num_stages=4),
    NARROW,
    replace(NARROW, block_k=64, num_stages=6, overlap=True),
    replace(NARROW, num_stages=2, programs_per_sm=3),
    SQUARE,
    replace(SQUARE, overlap=True),
    replace(SQUARE, block_k=64, num_stages=6, overlap=True),
    replace(NARROW, num_stages=6, programs_per_sm=1, overlap=True),
)
"""What the benchmark times, all in one visit: the best of 2026-11-22's (one H200), and panels, which no GPU has seen yet."""


def sgmm_tuning(inner: int) -> SgmmTuning:
    """Return the tuning for an inner dimension (ranks of all experts of a product).

    The fastest of those measured on one H200, 2026-11-22, on Llama-3.1-8B and Llama-2-7B: 128 FLAT, 256 and 512 WIDE; below, PLAIN alone was.
    """
    if inner < 128:
        return PLAIN
    return FLAT if inner < 256 else WIDE
