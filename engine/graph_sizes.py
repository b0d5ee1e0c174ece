"""To how many tokens a step is padded: CUDA graphs are captured for some sizes, and a step runs the next one up."""

from __future__ import annotations

from bisect import bisect_left
from functools import lru_cache

# (up to, in steps of): fine where a decode step would pay for the padding, coarser where matmuls have tiles of 64 or 128 tokens anyway.
# 448 is left out: cuBLAS takes 416 µs for a layer of Llama-3.1-8B there and 310 µs at 512 (H200, torch 2.11, 2026-11-22).
_LADDER = ((8, 1), (16, 4), (256, 8), (384, 64), (512, 128), (1024, 128), (8192, 512))


@lru_cache(maxsize=64)
def graph_sizes(most_tokens: int) -> tuple[int, ...]:
    """Return the captured token counts up to `most_tokens`, ascending; the last is `most_tokens` itself."""
    sizes: list[int] = []
    low = 0
    for high, stride in _LADDER:
        sizes += [size for size in range(low + stride, high + 1, stride) if size < most_tokens]
        low = high
    return (*sizes, most_tokens) if most_tokens > 0 else ()


def padded_tokens(tokens: int, graph_max_tokens: int) -> int:
    """Return the tokens that a step of `tokens` computes: the graph's size, or its own where no graph is that large."""
    sizes = graph_sizes(graph_max_tokens)
    if not sizes or tokens > sizes[-1]:
        return tokens
    return sizes[bisect_left(sizes, tokens)]
