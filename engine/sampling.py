"""How the next token is chosen."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """temperature 0 (or below 10⁻⁵) takes the likeliest token; else tokens are drawn with softmax(logits / temperature), of the smallest set of
    the likeliest that has probability `top_p` at least, and of those as likely as its last. Draws depend on `seed` and the token's position
    alone.

    Raises ValueError naming field, value and bound.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and 0 <= self.temperature <= 100):
            raise ValueError(f"temperature(={self.temperature}) must be in 0..100")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p(={self.top_p}) must be above 0 and at most 1")
        if not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"seed(={self.seed}) must fit 64 bits")


GREEDY = Sampling()
