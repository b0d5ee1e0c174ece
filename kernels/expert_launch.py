"""How the kernels of unmerged experts are launched: one function from a step's tokens to launch parameters, and what may be tuned."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertTuning:
    """Constants that change the kernels' speed, not their result. Of one token (or two), then of tiles of tokens."""

    token_rows: int = 2  # of A, of one program of the shrink,
    token_part: int = 2048  # and elements of `in`
    tile_rows: int = 16
    tile_parts: int = 4  # that `in` is cut into
    columns_factor: int = 1  # of y, of one program of the expand, times what the width gives

    @property
    def name(self) -> str:
        """Return a short name, for tables."""
        return (
            f"{self.token_rows}x{self.token_part} {self.tile_rows}/{self.tile_parts} c{self.columns_factor}"
        )


TOKEN_CANDIDATES = (
    ExpertTuning(),
    ExpertTuning(token_rows=4),
    ExpertTuning(token_part=4096),
    ExpertTuning(token_rows=4, token_part=1024),
    ExpertTuning(token_rows=1, token_part=4096),
    ExpertTuning(columns_factor=2),
)
TILE_CANDIDATES = (
    ExpertTuning(),
    ExpertTuning(tile_parts=8),
    ExpertTuning(tile_parts=2),
    ExpertTuning(tile_rows=32),
    ExpertTuning(columns_factor=2),
)
"""What the benchmark times in one visit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLaunch:
    """Launch parameters of one group of linears. All but tile_tokens change the speed alone."""

    tile_tokens: int  # rows that share an expert's bytes: 1, 16 or 32
    shrink_rows: int
    shrink_part: int
    expand_columns: int
    pdl: bool = True

    def parts(self, in_features: int) -> int:
        """Return the planes of the bridge."""
        return -(-in_features // self.shrink_part)


WHOLE_FROM = 64
"""With more tokens tiles alone keep the GPU busy: `in` is not cut, and the bridge has one plane."""


def tile_tokens_of(tokens: int) -> int:
    """Return how many tokens share a tile in a step of so many. Up to 2, the tokens' experts are mostly different ones."""
    return 1 if tokens <= 2 else 16 if tokens <= 16 else 32


def expert_launch(
    tokens: int, in_features: int, width: int, tuning: ExpertTuning | None = None
) -> ExpertLaunch:
    """Return the launch parameters of a group with so many inputs and columns of output, all its linears together.

    Not measured yet (docs/measured/switch.py times the candidates). One token: parts of 2,048 elements and 2 rows of A make 128 programs or
    more of 8 KB each for k · r = 128.
    """
    tuning = tuning or ExpertTuning()
    tile = tile_tokens_of(tokens)
    if tile == 1:
        columns = 32 if width <= 4096 else 64 if width <= 8192 else 128
        return ExpertLaunch(
            tile_tokens=1,
            shrink_rows=tuning.token_rows,
            shrink_part=tuning.token_part,
            expand_columns=min(128, columns * tuning.columns_factor),  # more would spill at k · r = 256
        )
    return ExpertLaunch(
        tile_tokens=tile,
        shrink_rows=tuning.tile_rows,
        shrink_part=max(
            256, -(-in_features // (tuning.tile_parts if tokens <= WHOLE_FROM else 1) // 256) * 256
        ),
        expand_columns=(64 if width <= 8192 else 128) * tuning.columns_factor,
    )
