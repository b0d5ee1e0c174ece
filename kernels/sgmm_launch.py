"""How the segmented gather matrix multiplication is launched: its tunings, and the one in use."""

from __future__ import annotations

from dataclasses import dataclass

NUM_SMS = 132  # H200


@dataclass(frozen=True, slots=True, kw_only=True)
class SgmmTuning:
    """Constants that change the kernel's speed, not its result."""

    block_out: int = 128  # rows of W of a tile
    block_in: int = 128  # columns of W
    block_k: int = 64  # depth of one matrix step: ranks of one expert
    num_stages: int = 3  # matrix steps in flight, and one more
    num_warps: int = 8
    programs_per_sm: int = 2
    max_registers: int | None = None  # a cap a thread, to fit more programs on an SM
    flatten: bool = (
        False  # one loop over tiles and matrix steps, so that the next tile's factors are on their way
    )

    @property
    def name(self) -> str:
        """Return a short name, for tables."""
        flat = " flat" if self.flatten else ""
        blocks = f"{self.block_out}x{self.block_in}x{self.block_k}"
        return f"{blocks} w{self.num_warps} s{self.num_stages} p{self.programs_per_sm}{flat}"


CANDIDATES = (
    SgmmTuning(max_registers=128),
    SgmmTuning(num_stages=2, max_registers=128),
    SgmmTuning(num_stages=2, max_registers=128, flatten=True),
    SgmmTuning(num_warps=4),
    SgmmTuning(num_warps=4, num_stages=2),
    SgmmTuning(block_in=256, num_stages=3, programs_per_sm=1),
    SgmmTuning(block_in=256, num_stages=4, programs_per_sm=1),
    SgmmTuning(block_in=256, num_stages=3, programs_per_sm=1, flatten=True),
    SgmmTuning(block_in=256, num_stages=4, programs_per_sm=1, flatten=True),
    SgmmTuning(block_out=256, num_stages=3, programs_per_sm=1),
    SgmmTuning(block_out=256, num_stages=3, programs_per_sm=1, flatten=True),
    SgmmTuning(block_out=64, block_in=256, num_warps=4, num_stages=2),
    SgmmTuning(block_out=64, num_warps=4, num_stages=2, programs_per_sm=3),
)
"""What the benchmark times, all in one visit."""


def sgmm_tuning(inner: int) -> SgmmTuning:
    """Return the tuning for an inner dimension (ranks of all experts of a product). Not measured yet: docs/measured/switch.py says which."""
    return CANDIDATES[0] if inner <= 256 else CANDIDATES[7]
