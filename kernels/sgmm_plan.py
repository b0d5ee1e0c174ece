"""What the segmented gather matrix multiplication walks: a table of weights and a list of their tiles, both on the device.

Made once an adapter and kept: addresses, shapes and strides do not change from token to token, only the route does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

# Columns of a weight's record, int64: addresses in bytes, the rest in elements.
TARGET, SOURCE, UP, DOWN, STAGE, OUT, IN, RANK = range(8)
TARGET_STRIDE, SOURCE_STRIDE, UP_STRIDE, DOWN_STRIDE, STAGE_ROWS = range(8, 13)
RECORD_COLUMNS = 16
GROUP_ROWS = 8  # tiles that run at the same time are near squares of so many rows of blocks, so that they share factors in L2
PANEL_TILES = 2  # what it costs to load a panel of DOWN, about: only how launches of one weight are cut


@dataclass(frozen=True, slots=True, kw_only=True)
class SgmmWeight:
    """One linear that experts change.

    target: W [out, in], written. source: W_0 likewise, or `target` itself: in place. up: [N, r, out], the experts' B transposed; down:
    [N, r, in], their A; rows contiguous and back to back, any stride between experts.
    """

    target: torch.Tensor
    source: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor

    @property
    def rank(self) -> int:
        """Ranks of one expert."""
        return self.up.shape[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class SgmmPlan:
    """Weights on the device, as `kernels.sgmm` takes them.

    records: int64 [weights, 16]. stage: each weight's gated DOWN, [segments · r, in] back to back. gates: fp32 [weights, segments], what each
    expert's DOWN is multiplied by. segments: experts of a product, the k of this token, and in place also the k of the last one.
    """

    weights: tuple[SgmmWeight, ...]
    records: torch.Tensor
    stage: torch.Tensor
    gates: torch.Tensor
    top_k: int
    segments: int
    staged: bool = True

    @property
    def dtype(self) -> torch.dtype:
        """Element type of weights and factors."""
        return self.weights[0].target.dtype

    @property
    def in_place(self) -> bool:
        """Whether W itself is what is added to."""
        return self.segments > self.top_k

    @property
    def moved_bytes(self) -> int:
        """Bytes that a merge cannot avoid: W read and written."""
        return sum(2 * weight.target.numel() * weight.target.element_size() for weight in self.weights)

    @property
    def flops(self) -> int:
        """Operations of a merge."""
        return sum(2 * weight.target.numel() * self.segments * weight.rank for weight in self.weights)

    def fits(self, block_out: int, block_in: int, block_k: int) -> bool:
        """Return whether blocks of these sizes fill every weight, and rows start at multiples of 16 bytes: no masks then."""
        unit = 16 // self.dtype.itemsize
        return all(
            weight.target.shape[0] % block_out == 0
            and weight.target.shape[1] % block_in == 0
            and weight.rank % block_k == 0
            and all(t.stride(0) % unit == 0 and t.data_ptr() % 16 == 0 for t in _tensors(weight))
            for weight in self.weights
        )

    def tiles(self, block_out: int, block_in: int) -> tuple[torch.Tensor, list[int]]:
        """Return the tiles of all weights, int32 [n, 4] (weight, row, column, 0), and where each weight's begin, with the end."""
        lists = [
            _tiles_of(index, weight.target.shape[0], weight.target.shape[1], block_out, block_in)
            for index, weight in enumerate(self.weights)
        ]
        starts = np.cumsum([0] + [len(tiles) for tiles in lists]).tolist()
        return torch.from_numpy(np.concatenate(lists)).to(self.records.device), starts

    def runs(
        self, block_out: int, block_in: int, programs: int, longest: int
    ) -> tuple[torch.Tensor, list[int]]:
        """Return runs of tiles, one below the other, int32 [n, 4] (weight, row, column, tiles), and where lists of them begin, with the end.

        A list for each weight, for launches of one weight by so many programs; then one of all weights, long runs first, so that programs
        that take them in turn get about as much each.
        """
        shapes = [weight.target.shape for weight in self.weights]
        lists = [
            _runs_of(
                index, shape, block_out, block_in, _spread(shape, block_out, block_in, programs, longest)
            )
            for index, shape in enumerate(shapes)
        ]
        every = np.concatenate(
            [_runs_of(index, shape, block_out, block_in, longest) for index, shape in enumerate(shapes)]
        )
        lists.append(every[np.argsort(-every[:, 3], kind="stable")])
        starts = np.cumsum([0] + [len(runs) for runs in lists]).tolist()
        return torch.from_numpy(np.concatenate(lists)).to(self.records.device), starts


def plan_sgmm(weights: Sequence[SgmmWeight], top_k: int, *, in_place: bool, staged: bool = True) -> SgmmPlan:
    """Return the plan of merging `top_k` experts into each of the weights.

    With `in_place` every weight's source must be its target, and the last token's experts are taken out in the same product. staged=False:
    DOWN is multiplied as it is, ungated, for one expert: an ordinary adapter, whose scale is in its B.
    Raises ValueError naming the first weight that does not fit.
    """
    if not weights:
        raise ValueError("weights must name at least one linear")
    if not staged and (in_place or top_k != 1 or any(len(weight.up) != 1 for weight in weights)):
        raise ValueError("staged=False needs one expert and a pristine copy")
    for index, weight in enumerate(weights):
        _check_weight(index, weight, weights[0].target, top_k, in_place)
    segments = 2 * top_k if in_place else top_k
    device = weights[0].target.device
    sizes = [segments * weight.rank * weight.target.shape[1] if staged else 0 for weight in weights]
    # Rows of all weights start at multiples of 16 bytes as long as `in` does.
    stage = torch.zeros(max(1, sum(sizes)), dtype=weights[0].target.dtype, device=device)
    starts = np.cumsum([0, *sizes[:-1]]) * stage.element_size() + stage.data_ptr()
    records = np.zeros((len(weights), RECORD_COLUMNS), np.int64)
    for record, weight, start in zip(records, weights, starts, strict=True):
        record[[TARGET, SOURCE, UP, DOWN]] = [tensor.data_ptr() for tensor in _tensors(weight)]
        record[STAGE] = start if staged else weight.down.data_ptr()
        record[[OUT, IN, RANK]] = *weight.target.shape, weight.rank
        record[[TARGET_STRIDE, SOURCE_STRIDE, UP_STRIDE, DOWN_STRIDE]] = [
            tensor.stride(0) for tensor in _tensors(weight)
        ]
    records[:, STAGE_ROWS] = np.cumsum([0] + [top_k * weight.rank for weight in weights])[:-1]
    return SgmmPlan(
        weights=tuple(weights),
        records=torch.from_numpy(records).to(device),
        stage=stage,
        gates=torch.zeros(len(weights), segments, device=device),
        top_k=top_k,
        segments=segments,
        staged=staged,
    )


def _tensors(weight: SgmmWeight) -> tuple[torch.Tensor, ...]:
    return weight.target, weight.source, weight.up, weight.down


def _check_weight(index: int, weight: SgmmWeight, like: torch.Tensor, top_k: int, in_place: bool) -> None:
    out, inp = weight.target.shape
    experts, rank = weight.up.shape[:2]
    wanted = {
        "target": (weight.target, (out, inp)),
        "source": (weight.source, (out, inp)),
        "up": (weight.up, (experts, rank, out)),
        "down": (weight.down, (experts, rank, inp)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor.shape != shape or min(shape) < 1:
            raise ValueError(
                f"weight {index}: {name} must have shape {list(shape)}, not {list(tensor.shape)}"
            )
        if tensor.dtype != like.dtype or tensor.device != like.device:
            raise ValueError(f"weight {index}: {name} must be {like.dtype} on {like.device}")
        if not tensor[0].is_contiguous():
            raise ValueError(f"weight {index}: {name} must have contiguous rows")
    if top_k > experts:
        raise ValueError(f"weight {index}: top_k(={top_k}) must be <= its {experts} experts")
    if (weight.source.data_ptr() == weight.target.data_ptr()) != in_place:
        raise ValueError(f"weight {index}: source must {'be' if in_place else 'not be'} target")


def _tiles_of(weight: int, out: int, inp: int, block_out: int, block_in: int) -> np.ndarray:
    """Return a weight's tiles."""
    blocks = _blocks(-(-out // block_out), -(-inp // block_in))
    tiles = np.zeros((len(blocks), 4), np.int32)
    tiles[:, 0] = weight
    tiles[:, 1:3] = blocks * (block_out, block_in)
    return tiles


def _spread(shape: torch.Size, block_out: int, block_in: int, programs: int, longest: int) -> int:
    """Return how long the runs of one weight should be: the last program done soonest, a panel costing as much as PANEL_TILES tiles."""
    tiles, columns = shape[0] // block_out, shape[1] // block_in
    parts = min(
        range(1, tiles + 1),
        key=lambda parts: -(-parts * columns // programs) * (-(-tiles // parts) + PANEL_TILES),
    )
    return min(longest, -(-tiles // parts))


def _runs_of(weight: int, shape: torch.Size, block_out: int, block_in: int, longest: int) -> np.ndarray:
    """Return a weight's runs of about as many tiles each; those of the same rows, which share UP, side by side."""
    tiles, columns = shape[0] // block_out, shape[1] // block_in
    parts = -(-tiles // longest)
    edges = np.arange(parts + 1) * tiles // parts
    runs = np.zeros((len(edges) - 1, columns, 4), np.int32)
    runs[..., 0] = weight
    runs[..., 1] = (edges[:-1] * block_out)[:, None]
    runs[..., 2] = np.arange(columns) * block_in
    runs[..., 3] = np.diff(edges)[:, None]
    return runs.reshape(-1, 4)


@cache
def _blocks(rows: int, columns: int) -> np.ndarray:
    """Return (row, column) of the blocks of a matrix: GROUP_ROWS rows of them, column by column, then the next ones."""
    row, column = np.divmod(np.arange(rows * columns), columns)
    return np.stack([row, column], axis=1)[np.lexsort((row, column, row // GROUP_ROWS))]
