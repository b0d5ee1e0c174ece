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
    parts: int = (
        1  # with a panel: 2 are groups of so many warps that share it, with tiles and buffers of their own
    )

    @property
    def name(self) -> str:
        """Return a short name, for tables."""
        kind = " flat" * self.flatten + " panel" * self.panel + " overlap" * self.overlap
        blocks = f"{self.block_out}x{self.block_in}x{self.block_k}"
        warps = f"{self.parts}x{self.num_warps}" if self.parts > 1 else self.num_warps
        return f"{blocks} w{warps} s{self.num_stages} p{self.programs_per_sm}{kind}"

    def panel_block_k(self, inner: int) -> int:
        """Return the depth of a matrix step with a panel of so many ranks: a power of two that divides them."""
        return min(self.block_k, inner & -inner)

    def panel_bytes(self, inner: int) -> int:
        """Return the shared memory of a program with a panel: it and the buffers, of two-byte elements."""
        ring = self.num_stages * self.panel_block_k(inner) * self.block_out
        meeting = 256 if self.parts > 1 else 0
        return 2 * (inner * self.block_in + self.parts * ring) + meeting

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
WIDE = SgmmTuning(block_in=256, programs_per_sm=1, flatten=True)
NARROW = SgmmTuning(block_out=64, block_k=128, num_warps=4, panel=True)
LOW = replace(NARROW, num_stages=2, programs_per_sm=3)
TWO = replace(NARROW, block_k=64, num_stages=6, programs_per_sm=1, overlap=True, parts=2)
TWO_WIDE = replace(TWO, block_in=256)
CANDIDATES = (PLAIN, LOW, NARROW, TWO, TWO_WIDE)
"""What the benchmark times: those in use, and the best panel of one part at inner 256 (NARROW, 1.43 times the bound in place)."""


def sgmm_tuning(inner: int, columns: int = 256) -> SgmmTuning:
    """Return the tuning for an inner dimension (ranks of all experts of a product); `Sgmm` takes PLAIN instead of a panel that it cannot use.

    columns: a number that divides the width of every weight. The fastest of 15 panels and PLAIN on one H200, 2026-11-22, Llama-3.1-8B, times
    over the bound, gates included: inner 32 LOW 1.16, 128 TWO_WIDE 1.31, 256 TWO_WIDE 1.38 to 1.39, 512 TWO 1.38 (1.66 when it runs for long).
    Below 32 no panel was measured (PLAIN: 1.28 at 16). Where no panel fits, WIDE was the fastest without one.
    """
    if inner < 128:
        return LOW if inner >= 32 and LOW.panel_fits(inner) else PLAIN
    if columns % TWO_WIDE.block_in == 0 and TWO_WIDE.panel_fits(inner):
        return TWO_WIDE
    return TWO if TWO.panel_fits(inner) else WIDE
